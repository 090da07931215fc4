"""Training-free rivals as backbones: same weights, same text, another way to dense features.

What a rival changes is its image tower's `forward`; windows, up-sampling and metrics are those of
every other model. The five that change the last block only live in `backbones.vit`.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from pixelclip.backbones import Backbone, Visual
from pixelclip.backbones.dino import DenseTimm, dino_of, load_dense
from pixelclip.backbones.mini import MiniVisual
from pixelclip.backbones.vit import DenseViT
from pixelclip.errors import ConfigError
from pixelclip.evaluation.proxy import (
    DEFAULTS,
    ProxyClip,
    ProxyFeatures,
    RivalSettings,
    Tower,
    over,
)
from pixelclip.masks.kmeans import MiniLevels
from pixelclip.masks.refine import mask_means, paint
from pixelclip.masks.sources import MaskSource
from pixelclip.masks.superpixels import Superpixels
from pixelclip.upsample import axis


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
        departures: what its authors' code does and we do not, a line each.
    """

    description: str
    needs: frozenset[str]
    make: Callable[[Parts], nn.Module]
    departures: tuple[str, ...] = ()


class MaskAveraged(nn.Module):
    """Unit dense features averaged inside the masks of a source; a cell is what its pixels are.

    This is `masks.refine` on the grid of cells: a cell that several masks share is their mixture.
    """

    def __init__(self, visual: Visual, source: MaskSource):
        super().__init__()
        self.visual = visual
        self.source = source
        self.settings = getattr(source, "settings", None)  # they tell it from others
        self.stride, self.dim = visual.stride, visual.dim
        self.attention = "superpixels" + over(visual)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """Dense features, not normalised, per cell of the image tower."""
        maps = F.normalize(self.visual(images).float(), dim=1)
        pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pairs = zip(maps.permute(0, 2, 3, 1), pixels, strict=True)
        with torch.autocast(images.device.type, enabled=False):  # means are exact in pixels
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
_POSITIONS = "positions are interpolated to the grid's size, the authors' by (n + 0.1) / side"
RIVALS: dict[str, Rival] = {
    "plain": Rival("CLIP as it is, patch tokens", VIT, _last_block("plain")),
    "maskclip": Rival(
        "values of the last block, no attention",
        VIT,
        _last_block("maskclip"),
        (
            "no key smoothing, no prompt denoising; options of the authors' code",
            "the model's own activation; the authors' ViT has GELU, and 1e-6 in its norms",
            "windows as the protocol says; the authors' photos are whole",
        ),
    ),
    "sclip": Rival(
        "queries attend to queries, keys to keys",
        VIT,
        _last_block("sclip"),
        ("no PAMR; an option of the authors' code", _POSITIONS),
    ),
    "naclip": Rival(
        "keys attend to keys that lie near",
        VIT,
        _last_block("naclip"),
        (
            "no PAMR; the authors' code refines scores by 10 steps of it",
            "windows as the protocol says; the authors' VOC photos are whole",
            _POSITIONS,
        ),
    ),
    "clearclip": Rival(
        "queries attend to queries, no residual",
        VIT,
        _last_block("clearclip"),
        (
            "sizes as the protocol says; the authors' short side is 448, windows of 448 every 224"
            " (Cityscapes: of 224)",
            _POSITIONS,
        ),
    ),
    "proxyclip": Rival(
        "values averaged as a DINO tower attends",
        VIT_AND_DINO,
        _proxyclip,
        (
            "sizes as the protocol says; the authors' windows are of 336 every 112, padded to"
            " multiples of 56, short side 336 (ADE20K: 448; Cityscapes: 448, windows of 224)",
            "the tower is the one given; the authors' is DINO ViT-B/8, whose positions are"
            " interpolated without antialiasing",
            _POSITIONS,
        ),
    ),
    "proxy": Rival("features averaged as a DINO tower attends", frozenset({"dino"}), _proxy),
    "superpixels": Rival("features averaged in superpixels", frozenset(), _superpixels),
}


def departures_of(name: str) -> tuple[str, ...]:
    """What a rival's authors do and we do not, a line each; none for the model itself ("")."""
    return tuple(f"{name}: {line}" for line in RIVALS[name].departures) if name else ()


def check_rivals(names: Sequence[str], dino: str | None) -> None:
    """Make sure, before a model is loaded, that there are such rivals, and one for the tower.

    Raises:
        ConfigError: there is no rival of a name, or none of them needs a DINO tower.
    """
    for name in names:
        if name not in RIVALS:
            raise ConfigError(f"unknown rival {name!r}; available: {', '.join(RIVALS)}")
    if dino is not None and not any("dino" in RIVALS[name].needs for name in names):
        guided = [name for name, rival in RIVALS.items() if "dino" in rival.needs]
        raise ConfigError(f"--dino goes with --rival {' or '.join(guided)}")


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
            file of a DINO ViT. Its similarities guide, and its cells are the rival's.
        settings: numbers of the rival.
        source: of the masks in which `superpixels` averages; None: superpixels.

    Raises:
        ConfigError: there is no such rival, or it needs another backbone or a DINO tower.
        ModelError: the DINO tower cannot be loaded.
    """
    check_rivals([name], None)
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
        return load_dense(dino_of(name), checkpoint=name, device=device)
    return load_dense(name, device=device)


def _refusal(name: str, backbone: Backbone) -> ConfigError:
    """Why a rival does not run, and which do."""
    needs, runs = RIVALS[name].needs, ", ".join(rivals_of(backbone))
    kind = f"{backbone.card.name} is a {backbone.card.family}"
    if "vit" in needs and not isinstance(backbone.visual, DenseViT):
        return ConfigError(f"the rival {name} needs a ViT; {kind}, on which these run: {runs}")
    return ConfigError(f"the rival {name} needs a DINO tower; without one these run: {runs}")
