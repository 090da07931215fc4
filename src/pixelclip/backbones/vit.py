"""Dense features of open_clip's ViT: the authors' path and the training-free rivals'."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from pixelclip.backbones.blocks import project, run_block, run_mlp
from pixelclip.backbones.pixels import channel_buffer, normalise_and_pad
from pixelclip.errors import ConfigError

Grid = tuple[int, int]


class DenseViT(nn.Module):
    """A plain open_clip ViT whose forward gives a feature per patch.

    `attention` selects what happens in the last block: see `LAST_BLOCKS`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        tower: VisionTransformer,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        attention: str = "pixelclip",
    ):
        super().__init__()
        check_attention(attention)
        self.tower = tower
        self.attention = attention
        self.stride = int(tower.patch_size[0])
        self.dim = int(tower.proj.shape[1])
        self.register_buffer("mean", channel_buffer(mean), persistent=False)
        self.register_buffer("std", channel_buffer(std), persistent=False)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """Dense features, not normalised; h = ceil(H / stride), w = ceil(W / stride).

        Args:
            images: RGB in [0, 1], of any height and width.
        """
        tokens, grid = self.tokens(images)
        hidden = LAST_BLOCKS[self.attention](self.tower.transformer.resblocks[-1], tokens, grid)
        return self.project(hidden, grid)

    def tokens(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B L C"], Grid]:
        """Token states entering the last block, class token first, and the patch grid."""
        tower = self.tower
        pixels = normalise_and_pad(images, self.mean, self.std, self.stride)
        patches = tower.conv1(pixels)  # [B, C, h, w]
        grid = (patches.shape[2], patches.shape[3])
        hidden = patches.flatten(2).transpose(1, 2)  # [B, hw, C]
        start = tower.class_embedding.to(hidden.dtype).expand(len(hidden), 1, -1)
        hidden = torch.cat([start, hidden], dim=1) + self.positions(grid).to(hidden.dtype)
        hidden = tower.ln_pre(tower.patch_dropout(hidden))
        for block in tower.transformer.resblocks[:-1]:
            hidden = run_block(block, hidden)
        return hidden, grid

    def positions(self, grid: Grid) -> Float[Tensor, "L C"]:
        """Position embedding for that grid: bicubic, half-pixel centres (behaviour.md 5).

        The authors take the square root of the token count for both sides and fail on
        photos that are not square; this does not.
        """
        table = self.tower.positional_embedding
        stored = tuple(self.tower.grid_size)
        if stored == grid:
            return table
        patches = table[1:].T.reshape(1, -1, *stored)
        patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
        return torch.cat([table[:1], patches.flatten(2)[0].T])

    def project(self, hidden: Float[Tensor, "B hw C"], grid: Grid) -> Float[Tensor, "B D h w"]:
        """Final norm and projection of every patch token (behaviour.md 4)."""
        features = self.tower.ln_post(hidden) @ self.tower.proj  # [B, hw, D]
        return features.transpose(1, 2).unflatten(2, grid)

    def pooled(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Ordinary CLIP image embedding (class token), not normalised."""
        tokens, _ = self.tokens(images)
        hidden = run_block(self.tower.transformer.resblocks[-1], tokens)[:, 0]
        return self.tower.ln_post(hidden) @ self.tower.proj


def check_attention(name: str) -> None:
    """Make sure that there is such a last block.

    Raises:
        ConfigError: there is none.
    """
    if name not in LAST_BLOCKS:
        raise ConfigError(f"unknown attention {name!r}; available: {', '.join(LAST_BLOCKS)}")


def _listen(rows: Tensor, values: Tensor, bonus: Tensor | None = None) -> Tensor:
    """Values averaged for each patch by how alike its row is to every row, class token included.

    By the kernel that sums in float32: scores rounded to bfloat16 lose much of NACLIP's bonus.
    """
    return F.scaled_dot_product_attention(rows[:, :, 1:], rows, values, attn_mask=bonus)


def _join(block: ResidualAttentionBlock, mixed: Tensor) -> Tensor:
    """All heads through the output projection."""
    return block.ls_1(block.attn.out_proj(mixed.transpose(1, 2).flatten(2)))


def _values(block: ResidualAttentionBlock, tokens: Tensor) -> Tensor:
    """Value path: value third of the input projection, then the output projection."""
    width = tokens.shape[-1]
    weight, bias = block.attn.in_proj_weight[2 * width :], block.attn.in_proj_bias[2 * width :]
    values = F.linear(block.ln_1(tokens[:, 1:]), weight, bias)
    return block.ls_1(block.attn.out_proj(values))


def _with_mlp(block: ResidualAttentionBlock, hidden: Tensor) -> Tensor:
    return hidden + block.ls_2(run_mlp(block.mlp, block.ln_2(hidden)))


def pixelclip_block(block: ResidualAttentionBlock, tokens: Tensor, grid: Grid) -> Tensor:
    """The authors' path: values, class token as residual, MLP (behaviour.md 2 and 3)."""
    return _with_mlp(block, tokens[:, :1] + _values(block, tokens))


def plain_block(block: ResidualAttentionBlock, tokens: Tensor, grid: Grid) -> Tensor:
    """The block as CLIP has it, all patch tokens kept."""
    return run_block(block, tokens)[:, 1:]


def maskclip_block(block: ResidualAttentionBlock, tokens: Tensor, grid: Grid) -> Tensor:
    """MaskCLIP (arXiv 2112.01071, section 3.2): values, own residual, MLP."""
    return _with_mlp(block, tokens[:, 1:] + _values(block, tokens))


def sclip_block(block: ResidualAttentionBlock, tokens: Tensor, grid: Grid) -> Tensor:
    """SCLIP (arXiv 2312.01597, equation 3): softmax(qq) + softmax(kk), residual, MLP."""
    queries, keys, values = project(block, tokens)
    mixed = _listen(queries, values) + _listen(keys, values)
    return _with_mlp(block, tokens[:, 1:] + _join(block, mixed))


def clearclip_block(block: ResidualAttentionBlock, tokens: Tensor, grid: Grid) -> Tensor:
    """ClearCLIP (arXiv 2407.12442): softmax(qq) alone; no residual, no MLP."""
    queries, _, values = project(block, tokens)
    return _join(block, _listen(queries, values))


def naclip_block(
    block: ResidualAttentionBlock, tokens: Tensor, grid: Grid, *, std: float = 5.0
) -> Tensor:
    """NACLIP (arXiv 2404.08181): kk plus a Gaussian of the distance; no residual, no MLP.

    Args:
        block: the last block.
        tokens: its input, class token first.
        grid: rows and columns of patches.
        std: of the Gaussian, in patches (5 in the paper).
    """
    _, keys, values = project(block, tokens)
    rows, columns = grid
    y, x = (torch.arange(n, device=tokens.device, dtype=torch.float32) for n in (rows, columns))
    near_y = torch.exp(-((y[:, None] - y) ** 2) / (2 * std**2))
    near_x = torch.exp(-((x[:, None] - x) ** 2) / (2 * std**2))
    bonus = F.pad(torch.kron(near_y, near_x), (1, 0))  # the class token gets none
    return _join(block, _listen(keys, values, bonus.to(keys.dtype)))


LAST_BLOCKS: dict[str, Callable[[ResidualAttentionBlock, Tensor, Grid], Tensor]] = {
    "pixelclip": pixelclip_block,
    "plain": plain_block,
    "maskclip": maskclip_block,
    "sclip": sclip_block,
    "naclip": naclip_block,
    "clearclip": clearclip_block,
}
