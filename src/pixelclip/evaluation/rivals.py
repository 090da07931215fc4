"""Training-free rivals as backbones: same weights, same text, another way to dense features.

What a rival changes is its image tower's `forward`; windows, up-sampling and metrics are those of
every other model. The five that change the last block only live in `backbones.vit`.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pixelclip.backbones import Backbone, Visual
from pixelclip.backbones.blocks import project
from pixelclip.backbones.dino import DINO, DenseTimm, load_dense
from pixelclip.backbones.mini import MiniVisual
from pixelclip.backbones.vit import DenseViT
from pixelclip.errors import ConfigError
from pixelclip.masks.kmeans import MiniLevels
from pixelclip.masks.refine import mask_means, paint
from pixelclip.masks.sources import MaskSource
from pixelclip.masks.superpixels import Superpixels
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


class Parts(NamedTuple):
    """What rivals are made of.

    Attributes:
        backbone: whose weights are used.
        dino: tower whose similarities guide the features; None: none was given.
        settings: numbers of the rival.
        source: of masks in which features are averaged.
    """

    backbone: Backbone
    dino: Tower | None
    settings: RivalSettings
    source: MaskSource


class Rival(NamedTuple):
    """A rival before it is made.

    Attributes:
        description: one line.
        needs: `vit`, `dino`, both or nothing.
        make: its image tower.
    """

    description: str
    needs: frozenset[str]
    make: Callable[[Parts], nn.Module]


def proxy_attention(
    maps: Float[Tensor, "D h w"], settings: RivalSettings = DEFAULTS
) -> Float[Tensor, "n n"]:
    """Which cells listen to which, n = h * w: ProxyCLIP (arXiv 2408.04883), adaptive masking.

    Softmax over gamma (s - beta mean(s)), s the cosine of two cells, the mean over all pairs; pairs
    below zero are left out. As `custom_attn` in the authors' open_clip/transformer.py
    (github.com/mc-lan/ProxyCLIP, e442aeb). Where all cells look alike, the mean nears 1 and no pair
    would be left, which gives them NaN; no pair is left out then.

    Args:
        maps: features of the guiding tower.
        settings: beta and gamma.
    """
    directions = F.normalize(maps.flatten(1).float(), dim=0)
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
        self.attention = _said("proxyclip", settings)

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
        self.attention = _said("proxy", settings)

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


class MaskAveraged(nn.Module):
    """Unit dense features averaged inside the masks of a source; a cell is what its pixels are.

    This is `masks.refine` on the grid of cells: a cell that several masks share is their mixture.
    """

    def __init__(self, visual: Visual, source: MaskSource):
        super().__init__()
        self.visual = visual
        self.source = source
        self.stride, self.dim = visual.stride, visual.dim
        self.attention = "superpixels"

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """Dense features, not normalised, per cell of the image tower."""
        maps = F.normalize(self.visual(images), dim=1)
        pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pairs = zip(maps.permute(0, 2, 3, 1), pixels, strict=True)
        return torch.stack([self._averaged(*pair) for pair in pairs])

    def _averaged(
        self, features: Float[Tensor, "h w D"], photo: UInt8[np.ndarray, "H W 3"]
    ) -> Float[Tensor, "D h w"]:
        """One photo's features; pixels under no mask keep those of their cell."""
        height, width = photo.shape[:2]
        (masks,) = self.source([photo])
        rows, columns = (
            axis(pixels, points, 1 / self.stride)
            for pixels, points in zip((height, width), features.shape[:2], strict=True)
        )
        means = mask_means(features, masks, rows, columns)
        owner = np.full((height, width), masks.count, dtype=np.int64)
        owner = paint(owner, masks, np.arange(masks.count))
        cells = np.add.outer(
            np.arange(height) // self.stride * features.shape[1], np.arange(width) // self.stride
        )
        size = features.shape[0] * features.shape[1]
        counts = np.bincount(
            (cells * (masks.count + 1) + owner).ravel(), minlength=size * (masks.count + 1)
        ).reshape(size, -1)
        shares = torch.from_numpy(counts / counts.sum(axis=1, keepdims=True)).to(means)
        mixed = shares[:, :-1] @ means + shares[:, -1:] * features.flatten(0, 1)
        return mixed.T.unflatten(1, features.shape[:2])

    def pooled(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """The model's own image embedding, not normalised."""
        return self.visual.pooled(images)


def _said(name: str, settings: RivalSettings) -> str:
    """What results say of a rival."""
    return f"{name} beta={settings.beta:g} gamma={settings.gamma:g}"


def _last_block(name: str) -> Callable[[Parts], nn.Module]:
    def make(parts: Parts) -> nn.Module:
        card, visual = parts.backbone.card, parts.backbone.visual
        assert isinstance(visual, DenseViT)
        return DenseViT(visual.tower, mean=card.mean, std=card.std, attention=name)

    return make


def _proxyclip(parts: Parts) -> nn.Module:
    assert isinstance(parts.backbone.visual, DenseViT)
    assert parts.dino is not None
    return ProxyClip(parts.backbone.visual, parts.dino, parts.settings)


def _proxy(parts: Parts) -> nn.Module:
    """On mini without a tower, its own levels guide, and its own smoothing is left out."""
    visual = parts.backbone.visual
    if not isinstance(visual, MiniVisual):
        assert parts.dino is not None
        return ProxyFeatures(cast(Visual, visual), parts.dino, parts.settings)
    rough = copy.copy(visual)  # shares all weights
    rough.config = visual.config.model_copy(update={"affinity_steps": 0})
    return ProxyFeatures(rough, parts.dino or MiniLevels(visual), parts.settings)


def _superpixels(parts: Parts) -> nn.Module:
    return MaskAveraged(cast(Visual, parts.backbone.visual), parts.source)


VIT, VIT_AND_DINO = frozenset({"vit"}), frozenset({"vit", "dino"})
RIVALS: dict[str, Rival] = {
    "plain": Rival("CLIP as it is, patch tokens", VIT, _last_block("plain")),
    "maskclip": Rival("values of the last block, no attention", VIT, _last_block("maskclip")),
    "sclip": Rival("queries attend to queries, keys to keys", VIT, _last_block("sclip")),
    "naclip": Rival("keys attend to keys that lie near", VIT, _last_block("naclip")),
    "clearclip": Rival("queries attend to queries, no residual", VIT, _last_block("clearclip")),
    "proxyclip": Rival("values averaged as a DINO tower attends", VIT_AND_DINO, _proxyclip),
    "proxy": Rival("features averaged as a DINO tower attends", frozenset({"dino"}), _proxy),
    "superpixels": Rival("features averaged in superpixels", frozenset(), _superpixels),
}


def rivals_of(backbone: Backbone, *, with_dino: bool = False) -> tuple[str, ...]:
    """Names of the rivals that run on a backbone.

    Args:
        backbone: mini guides itself where others need a DINO tower.
        with_dino: whether there is one.
    """
    has = {"vit"} if isinstance(backbone.visual, DenseViT) else set()
    if with_dino or isinstance(backbone.visual, MiniVisual):
        has.add("dino")
    return tuple(name for name, rival in RIVALS.items() if rival.needs <= has)


def make_rival(
    name: str,
    backbone: Backbone,
    *,
    dino: DenseTimm | str | None = None,
    settings: RivalSettings = DEFAULTS,
    source: MaskSource | None = None,
) -> Backbone:
    """A backbone whose dense features are the rival's, to be used in the place of the given one.

    It shares the weights of the given one, which are frozen; its `origin` names the DINO tower, and
    `visual.attention` the rival with its numbers, so that results do.

    Args:
        name: key of `RIVALS`.
        backbone: mini, a CLIP, or one trained here.
        dino: for proxyclip and proxy: a tower, or its name or folder for `load_dense`, or a weight
            file of DINO ViT-S/16. Its similarities guide, and its cells are the rival's.
        settings: numbers of the rival.
        source: of the masks in which `superpixels` averages; None: superpixels.

    Raises:
        ConfigError: there is no such rival, or it needs another backbone or a DINO tower.
        ModelError: the DINO tower cannot be loaded.
    """
    if name not in RIVALS:
        raise ConfigError(f"unknown rival {name!r}; available: {', '.join(RIVALS)}")
    if name not in rivals_of(backbone, with_dino=dino is not None):
        raise _refusal(name, backbone)
    dino = dino if "dino" in RIVALS[name].needs else None
    tower = _tower(dino, backbone) if isinstance(dino, str) else dino
    parts = Parts(backbone, tower, settings, source or Superpixels())
    visual = RIVALS[name].make(parts).to(backbone.device)
    rival = Backbone(visual, backbone.text, backbone.card)
    rival.origin = backbone.origin if tower is None else f"{backbone.origin} + {tower.origin}"
    return rival


def _tower(name: str, backbone: Backbone) -> DenseTimm:
    """The DINO tower of that name, folder or weight file, where the backbone is."""
    device = str(backbone.device)
    if Path(name).is_file():
        return load_dense(DINO, checkpoint=name, device=device)
    return load_dense(name, device=device)


def _refusal(name: str, backbone: Backbone) -> ConfigError:
    """Why a rival does not run, and which do."""
    needs, runs = RIVALS[name].needs, ", ".join(rivals_of(backbone))
    kind = f"{backbone.card.name} is a {backbone.card.family}"
    if "vit" in needs and not isinstance(backbone.visual, DenseViT):
        return ConfigError(f"the rival {name} needs a ViT; {kind}, on which these run: {runs}")
    return ConfigError(f"the rival {name} needs a DINO tower; without one these run: {runs}")
