"""Features averaged as a DINO tower attends: ProxyCLIP, and the same for any image tower."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pixelclip.backbones import Visual
from pixelclip.backbones.blocks import project
from pixelclip.backbones.dino import DenseTimm
from pixelclip.backbones.vit import DenseViT
from pixelclip.masks.kmeans import MiniLevels
from pixelclip.upsample import axis

Tower = DenseTimm | MiniLevels


class RivalSettings(BaseModel):
    """How much cells must look alike to listen to each other (proxyclip, proxy).

    Attributes:
        beta: a cell is listened to if its cosine exceeds beta times the photo's mean cosine.
        gamma: factor on cosines before the softmax.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    beta: float = Field(1.2, ge=0, le=100)
    gamma: float = Field(3.0, gt=0, le=1000)


DEFAULTS = RivalSettings()


def proxy_attention(
    maps: Float[Tensor, "D h w"], settings: RivalSettings = DEFAULTS
) -> Float[Tensor, "n n"]:
    """Which cells listen to which, n = h * w: ProxyCLIP (arXiv 2408.04883), adaptive masking.

    Softmax over gamma (s - beta mean(s)), s the cosine of two cells, the mean over all pairs; pairs
    below zero are left out. As `custom_attn` in the authors' open_clip/transformer.py
    (github.com/mc-lan/ProxyCLIP, f2919bb). Where all cells look alike, the mean nears 1 and no pair
    would be left, which gives them NaN; no pair is left out then. In float32 whatever the autocast:
    cosines in bfloat16 have two digits, and pairs near the threshold would change sides.

    Args:
        maps: features of the guiding tower.
        settings: beta and gamma.
    """
    directions = F.normalize(maps.flatten(1).float(), dim=0)
    with torch.autocast(maps.device.type, enabled=False):
        similarity = directions.T @ directions
    logits = settings.gamma * (similarity - settings.beta * similarity.mean())
    is_out = logits < 0
    is_out &= ~is_out.diagonal().any()  # a cell's cosine with itself is the highest
    return logits.masked_fill_(is_out, -torch.inf).softmax(dim=1)


def regrid(
    maps: Float[Tensor, "B D h w"], grid: tuple[int, int], scale: float
) -> Float[Tensor, "B D _ _"]:
    """Maps on another grid over the same pixels, bilinear between the centres of cells.

    Equal to `F.interpolate(align_corners=False)`, as the authors do, where both grids fill the
    same pixels; the last cells of a photo of any size may reach beyond it by different lengths.

    Args:
        maps: to be interpolated.
        grid: rows and columns wanted.
        scale: old cells per new cell, along a side.
    """
    for dim, points in ((2, grid[0]), (3, grid[1])):
        where = axis(points, maps.shape[dim], scale)
        lower = torch.from_numpy(where.lower).to(maps.device)
        upper = (lower + 1).clamp(max=maps.shape[dim] - 1)
        weight = torch.from_numpy(where.weight).to(maps)
        weight = weight[:, None] if dim == 2 else weight
        maps = torch.lerp(maps.index_select(dim, lower), maps.index_select(dim, upper), weight)
    return maps


def _listened(
    values: Float[Tensor, "B D h w"], maps: Float[Tensor, "B C H W"], settings: RivalSettings
) -> Float[Tensor, "B N D"]:
    """Values on the grid of `maps` averaged over the cells each one listens to."""
    cells = values.flatten(2).mT  # [B, N, D]
    pairs = zip(maps, cells, strict=True)  # a photo at a time: attention is quadratic in the cells
    return torch.stack([proxy_attention(one, settings).to(v) @ v for one, v in pairs])


class ProxyClip(nn.Module):
    """ProxyCLIP: values of a ViT's last block, attention from a DINO tower (its grid, too).

    As the authors' code: values up-sampled to the tower's grid, one attention for all heads, output
    projection; no class token, no residual, no MLP; final norm and projection.
    """

    def __init__(self, visual: DenseViT, dino: Tower, settings: RivalSettings):
        super().__init__()
        self.visual = visual
        self.dino = dino
        self.settings = settings
        self.stride, self.dim = dino.stride, visual.dim
        self.attention = _said("proxyclip", settings, dino)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """Dense features, not normalised, per cell of the DINO tower."""
        tokens, grid = self.visual.tokens(images)
        block = self.visual.tower.transformer.resblocks[-1]
        values = project(block, tokens)[2][:, :, 1:]  # [B, heads, hw, C]
        values = values.transpose(2, 3).flatten(1, 2).unflatten(2, grid)
        maps = self.dino.dense(images)
        finer = (maps.shape[2], maps.shape[3])
        values = regrid(values, finer, self.stride / self.visual.stride)
        mixed = block.ls_1(block.attn.out_proj(_listened(values, maps, self.settings)))
        return self.visual.project(mixed, finer)

    def pooled(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Ordinary CLIP image embedding, not normalised."""
        return self.visual.pooled(images)


class ProxyFeatures(nn.Module):
    """The same idea for any image tower: its unit dense features, averaged over cells alike."""

    def __init__(self, visual: Visual, dino: Tower, settings: RivalSettings):
        super().__init__()
        self.visual = visual
        self.dino = dino
        self.settings = settings
        self.stride, self.dim = dino.stride, visual.dim
        self.attention = _said("proxy", settings, dino) + over(visual)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """Dense features, not normalised, per cell of the guiding tower."""
        values = F.normalize(self.visual(images), dim=1)
        maps = self.dino.dense(images)
        grid = (maps.shape[2], maps.shape[3])
        values = regrid(values, grid, self.stride / self.visual.stride)
        return _listened(values, maps, self.settings).mT.unflatten(2, grid)

    def pooled(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """The model's own image embedding, not normalised."""
        return self.visual.pooled(images)


def _said(name: str, settings: RivalSettings, dino: Tower) -> str:
    """What results say of a rival."""
    guide = "mini's levels" if isinstance(dino, MiniLevels) else dino.config.architecture
    return f"{name} beta={settings.beta:g} gamma={settings.gamma:g} by {guide}"


def over(visual: Visual) -> str:
    """What they say of the features that a rival averages."""
    return f" over {visual.attention}" if isinstance(visual, DenseViT) else ""
