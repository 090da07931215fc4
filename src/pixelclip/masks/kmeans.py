"""Masks by k-means on the dense features of an image tower, a photo at a time (behaviour.md 19)."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer, UInt8
from pydantic import BaseModel, ConfigDict, Field
from skimage.measure import label
from torch import Tensor, nn

from pixelclip.backbones import Backbone, load_backbone
from pixelclip.backbones.dino import DINO, DenseTimm, load_dense
from pixelclip.backbones.mini import LAST_CHANNELS, LEVEL_CHANNELS, MiniVisual
from pixelclip.backbones.pixels import to_pixels
from pixelclip.images import resized
from pixelclip.masks.runs import MAX_MASKS, PhotoMasks, from_labels

GPU_BATCH = 8
FAR = 1e30  # finite, as nothing times infinity is no number, and would spoil interpolation
LEVEL_WEIGHTS = (0.7, 1.0, 0.5)  # of mini's levels, by the score of its masks
LONGEST = 2  # times the short side; a longer photo is looked at with a shorter short side


class KMeansSettings(BaseModel):
    """How features become masks.

    Attributes:
        short_side: of the network's input, in pixels; both sides are rounded to whole cells.
        clusters: at most so many of a photo; those that end up empty make no mask.
        max_iterations: of k-means.
        tolerance: iterations end when the squared shifts of all centres add up to no more.
        start: first centres: `spread` over the features (k-means++), or drawn `random` from all
            cells, with replacement, a centre without cells becoming zero (the authors', 19b).
        seed: of the first centres, the same for every photo.
        edges: `nearest`: masks are made of whole cells, as the authors'; `smooth`: centres compete
            for each pixel of the input with their interpolated distances.
        components: each connected piece of a cluster is a mask of its own.
        min_share: smaller masks, as a share of the photo, are left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    short_side: int = Field(640, ge=16, le=4096)
    clusters: int = Field(16, ge=1, le=256)
    max_iterations: int = Field(100, ge=1, le=10_000)
    tolerance: float = Field(1e-4, ge=0)
    start: Literal["spread", "random"] = "spread"
    seed: int = Field(0, ge=0, lt=2**32)
    edges: Literal["nearest", "smooth"] = "smooth"
    components: bool = False
    min_share: float = Field(0.0, ge=0, le=1)


class DinoSettings(KMeansSettings):
    """K-means on DINO, DINOv2, DINOv3 or another of timm's towers.

    Attributes:
        model: timm's name, `hf-hub:org/name`, or a folder that timm has saved.
        checkpoint: weight file that replaces the model's, or a folder that timm has saved.
    """

    model: str = DINO
    checkpoint: str | None = None


class MiniSettings(KMeansSettings):
    """K-means on the levels of mini's tower, which needs no download, or another's dense features.

    Its defaults are those of the best score (`masks.score`) on human regions.

    Attributes:
        model: name that `load_backbone` knows, weight file or run directory.
        checkpoint: weight file or run directory that replaces the model's weights.
    """

    model: str = "mini"
    checkpoint: str | None = None
    short_side: int = Field(448, ge=16, le=4096)
    clusters: int = Field(6, ge=1, le=256)
    components: bool = True
    min_share: float = Field(0.001, ge=0, le=1)


class MiniLevels(nn.Module):
    """What mini's image tower sees on three of its levels, before it is turned into words.

    Its dense features proper are smoothed among neighbours, and clusters of them are blobs.
    """

    def __init__(self, visual: MiniVisual):
        super().__init__()
        self.visual = visual
        self.stride = visual.stride

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.visual.mean.device

    def dense(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """Channels of variance 1 over the photo; the levels weigh as `LEVEL_WEIGHTS` says."""
        levels = self.visual.levels(images)[1][..., LAST_CHANNELS:].permute(0, 3, 1, 2)
        spread, mean = torch.std_mean(levels, dim=(2, 3), keepdim=True, correction=0)
        parts = ((levels - mean) / (spread + 1e-6)).split(LEVEL_CHANNELS, dim=1)
        weighted = zip(parts, LEVEL_WEIGHTS, strict=True)
        return torch.cat([w / math.sqrt(part.shape[1]) * part for part, w in weighted], dim=1)


Tower = DenseTimm | MiniLevels | Backbone


def load_tower(settings: DinoSettings | MiniSettings, device: str = "auto") -> Tower:
    """The model that settings name: `dense` gives the features to cluster.

    Raises:
        ModelError: it cannot be loaded, or has no dense features.
        ConfigError: the device is not available.
    """
    if isinstance(settings, DinoSettings):
        return load_dense(settings.model, checkpoint=settings.checkpoint, device=device)
    backbone = load_backbone(settings.model, checkpoint=settings.checkpoint, device=device)
    visual = backbone.visual
    return MiniLevels(visual) if isinstance(visual, MiniVisual) else backbone


def photos_at_once(device: torch.device) -> int:
    """How many photos are computed together; more are of no use on a CPU."""
    return 1 if device.type == "cpu" else GPU_BATCH


class KMeansMasks:
    """Makes masks of photos; each photo's depend on it and the settings only."""

    def __init__(self, settings: DinoSettings | MiniSettings, device: str = "auto"):
        self.settings = settings
        self.tower = load_tower(settings, device)
        self.batch_size = photos_at_once(self.tower.device)

    def __call__(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> list[PhotoMasks]:
        """The masks of upright photos, each in the photo's own pixels.

        Raises:
            DataError: a photo is too large for masks.
        """
        side, stride = self.settings.short_side, self.tower.stride
        sizes = [input_size(image.shape[0], image.shape[1], side, stride) for image in images]
        masks: dict[int, PhotoMasks] = {}
        for height, width in sorted(set(sizes)):
            alike = [index for index, size in enumerate(sizes) if size == (height, width)]
            inputs = [to_pixels(resized(images[index], (width, height))) for index in alike]
            randoms = [np.random.default_rng(self.settings.seed) for _ in alike]
            maps = cluster_maps(
                self.tower, torch.stack(inputs), randoms, self.settings, at_once=self.batch_size
            )
            for index, labels in zip(alike, maps.cpu().numpy(), strict=True):
                masks[index] = to_masks(
                    labels, images[index].shape[0], images[index].shape[1], self.settings
                )
        return [masks[index] for index in range(len(images))]


DinoMasks = KMeansMasks
MiniMasks = KMeansMasks


def input_size(height: int, width: int, short_side: int, stride: int) -> tuple[int, int]:
    """Height and width of the network's input, in whole cells, nearly in the photo's shape.

    The longer side is at most twice `short_side`, as memory grows with its square.
    """
    scale = min(short_side / min(height, width), LONGEST * short_side / max(height, width))
    rows, columns = (max(1, round(side * scale / stride)) for side in (height, width))
    return rows * stride, columns * stride


@torch.no_grad()
def cluster_maps(
    tower: Tower,
    pixels: Float[Tensor, "B 3 H W"],
    randoms: Sequence[np.random.Generator],
    settings: KMeansSettings,
    *,
    at_once: int = 1,
) -> Int[Tensor, "B _ _"]:
    """Cluster of each cell, or of each pixel where `edges` is `smooth`.

    Batches are always full, if need be with copies: the shape of a batch decides how it is
    computed, and with it the last bit of a feature.

    Args:
        tower: whose features are clustered.
        pixels: RGB in [0, 1].
        randoms: a generator for each photo.
        settings: of k-means, and `edges`.
        at_once: photos in a batch.
    """
    maps = []
    for first in range(0, len(pixels), at_once):
        chosen = torch.arange(first, first + at_once).clamp(max=len(pixels) - 1)
        draws = [copy.deepcopy(randoms[index]) for index in chosen.tolist()]
        batch = pixels[chosen.to(pixels.device)].to(tower.device)
        maps.append(_batch_maps(tower, batch, draws, settings))
    return torch.cat(maps)[: len(pixels)]


def _batch_maps(
    tower: Tower,
    pixels: Float[Tensor, "B 3 H W"],
    randoms: Sequence[np.random.Generator],
    settings: KMeansSettings,
) -> Int[Tensor, "B _ _"]:
    features = tower.dense(pixels).float()
    tokens = features.flatten(2).mT.contiguous()  # [B, N, D]
    centres = move_centres(tokens, first_centres(tokens, randoms, settings), settings)
    maps = nearness(tokens, centres).mT.unflatten(2, features.shape[2:])  # [B, K, h, w]
    if settings.edges == "nearest":
        return maps.argmax(dim=1)
    size = (pixels.shape[2], pixels.shape[3])
    # Nearness is a distance but for a term that all centres share: both interpolate alike.
    return torch.stack(
        [F.interpolate(part[None], size, mode="bilinear")[0].argmax(dim=0) for part in maps]
    )


def first_centres(
    tokens: Float[Tensor, "B N D"],
    randoms: Sequence[np.random.Generator],
    settings: KMeansSettings,
) -> Float[Tensor, "B K D"]:
    """The first centres, which are tokens; some are equal where tokens are few."""
    count, num = tokens.shape[1], settings.clusters
    photos = torch.arange(len(tokens), device=tokens.device)
    if settings.start == "random":
        drawn = np.stack([random.integers(count, size=num) for random in randoms])
        return tokens[photos[:, None], torch.from_numpy(drawn).to(tokens.device)]
    # k-means++ (Arthur and Vassilvitskii, 2007): a token is drawn in proportion to its squared
    # distance from the centres so far. It is the one of the largest log distance + Gumbel noise;
    # the cumulative sum that other ways to draw need is not the same twice on a GPU.
    noise = np.stack([random.gumbel(size=(num, count)) for random in randoms]).astype(np.float32)
    draws = torch.from_numpy(noise).to(tokens).unbind(dim=1)  # K of [B, N]
    distances = torch.ones_like(draws[0])
    centres = []
    for draw in draws:
        centres.append(tokens[photos, (distances.log() + draw).argmax(dim=1)])  # [B, D]
        apart = (tokens - centres[-1][:, None]).square().sum(dim=2)
        distances = apart if len(centres) == 1 else torch.minimum(distances, apart)
    return torch.stack(centres, dim=1)


def move_centres(
    tokens: Float[Tensor, "B N D"], centres: Float[Tensor, "B K D"], settings: KMeansSettings
) -> Float[Tensor, "B K D"]:
    """Centres after Lloyd's iterations: those by which the authors' last labels are found (19b)."""
    for _ in range(settings.max_iterations - 1):
        labels = nearness(tokens, centres).argmax(dim=2)
        members = F.one_hot(labels, centres.shape[1]).to(tokens.dtype)  # [B, N, K]
        counts = members.sum(dim=1)[..., None]  # [B, K, 1]
        means = members.mT @ tokens / counts.clamp(min=1)
        if settings.start == "spread":
            means = torch.where(counts > 0, means, centres)
        is_moving = (means - centres).square().sum(dim=(1, 2)) > settings.tolerance
        if not is_moving.any():
            break
        centres = torch.where(is_moving[:, None, None], means, centres)
    return centres


def nearness(
    tokens: Float[Tensor, "B N D"], centres: Float[Tensor, "B K D"]
) -> Float[Tensor, "B N K"]:
    """Half the squared length of a token less half its squared distance from each centre.

    Of equal centres the first is the nearest; rounding would share their tokens at random.
    """
    same = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist") == 0
    is_repeated = same.tril(-1).any(dim=2)  # [B, K]
    half = (centres.square().sum(dim=2) / 2).masked_fill(is_repeated, FAR)
    return tokens @ centres.mT - half[:, None]


def to_masks(
    labels: Integer[np.ndarray, "h w"], height: int, width: int, settings: KMeansSettings
) -> PhotoMasks:
    """Masks of a photo from a map of its clusters at any size; of too many, the largest.

    Raises:
        DataError: a photo cannot have that height and width.
    """
    if settings.components:
        labels = label(labels, connectivity=1, background=-1)
    areas = np.bincount(labels.ravel())
    by_area = np.argsort(-areas, kind="stable")
    num_large = int((areas >= max(1, settings.min_share * labels.size)).sum())
    num_kept = min(num_large, MAX_MASKS)
    rows = np.arange(height) * labels.shape[0] // height
    columns = np.arange(width) * labels.shape[1] // width
    masks = from_labels(labels[rows[:, None], columns], ignore=by_area[num_kept:].tolist())
    return replace(masks, broken=num_large - num_kept)
