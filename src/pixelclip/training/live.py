"""Masks made of each view while it is trained on, as the authors do with DINO (behaviour.md 19)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pixelclip.backbones import weights_hash
from pixelclip.config import TrainConfig
from pixelclip.masks.kmeans import (
    DinoSettings,
    MiniSettings,
    cluster_maps,
    load_tower,
    photos_at_once,
)
from pixelclip.masks.records import Size
from pixelclip.masks.runs import PhotoMasks
from pixelclip.photos import Photo
from pixelclip.training.batch import Batch, framed, nearest

SOURCES: dict[str, type[DinoSettings] | type[MiniSettings]] = {
    "dino": DinoSettings,
    "mini": MiniSettings,
}


def live_source(masks: str | Path | None) -> str | None:
    """The source that `--masks` names; None where it is a path, as all are that exist."""
    return str(masks) if str(masks) in SOURCES and not Path(str(masks)).exists() else None


@dataclass(frozen=True)
class WholePhotos:
    """The reader of masks that are yet to be made: all of a photo is one.

    What a view keeps of it is where masks may lie: neither in the padding nor in the cut-out.
    """

    def knows(self, photo: Photo) -> bool:
        """That goes for every photo."""
        return True

    def __call__(self, photo: Photo, size: Size) -> PhotoMasks:
        """The mask of a photo of this height and width."""
        height, width = size
        return PhotoMasks(
            height=height,
            width=width,
            starts=np.zeros(1, dtype=np.int64),
            ends=np.array([height * width]),
            owners=np.zeros(1, dtype=np.int64),
            count=1,
            scores=np.ones(1, dtype=np.float32),
        )


class LiveMasks:
    """Makes the masks of a batch, on the device: clusters of what a model sees in the weak views.

    The model is no part of what is trained, and of no checkpoint.

    Attributes:
        weights: hash of the model's.
    """

    def __init__(
        self, source: str, config: TrainConfig, colour: Float[Tensor, "3 1 1"], device: str
    ):
        """Load the model.

        Args:
            source: key of `SOURCES`.
            config: the fields that begin with `mask_`, the seed, `authors_defects`.
            colour: of the padding that the model sees.
            device: auto, cpu, cuda, cuda:N or mps.

        Raises:
            ModelError: the model cannot be loaded.
        """
        # First centres and edges as the authors have them (behaviour.md 19b and 19c).
        named = {} if config.mask_model is None else {"model": config.mask_model}
        self.settings = SOURCES[source](
            **named,
            checkpoint=config.mask_checkpoint,
            clusters=config.mask_clusters,
            start="random",
            edges="nearest",
        )
        self.tower = load_tower(self.settings, device)
        self.weights = weights_hash(self.tower)
        self.config, self.colour = config, colour

    def __call__(self, batch: Batch, positions: Sequence[int]) -> Batch:
        """The batch with a partition of each view in the place of its masks.

        Args:
            batch: its masks say where masks may lie; the authors put them everywhere (19c).
            positions: number of each sample in the run, from which it draws its first centres.
        """
        randoms = [np.random.default_rng([self.config.seed, 3, number]) for number in positions]
        at_once = photos_at_once(self.tower.device)
        labels = cluster_maps(
            self.tower, self._inputs(batch), randoms, self.settings, at_once=at_once
        )
        # From the grid's rows to the frame's, and from these to the map's, each time the nearest.
        rows, columns = (
            nearest(side, self.config.mask_size) * cells // side
            for side, cells in zip(batch.weak.shape[2:], labels.shape[1:], strict=True)
        )
        labels = labels[:, rows.to(labels.device)][:, :, columns.to(labels.device)]
        masks = F.one_hot(labels, self.settings.clusters).permute(0, 3, 1, 2).bool()
        if not self.config.authors_defects:
            allowed = [grid.any(dim=0) for grid in batch.masks]
            masks = masks & torch.stack(allowed)[:, None]
        return replace(batch, masks=tuple(part[part.any(dim=(1, 2))] for part in masks))

    def _inputs(self, batch: Batch) -> Float[Tensor, "B 3 _ _"]:
        """The weak views in [0, 1], resized to whole cells."""
        stride = self.tower.stride
        sides = [self.config.mask_input or side for side in batch.weak.shape[2:]]
        size = [max(1, side // stride) * stride for side in sides]
        views = framed(batch.weak, batch.sizes, self.colour)
        return F.interpolate(views, size, mode="bilinear", align_corners=False)
