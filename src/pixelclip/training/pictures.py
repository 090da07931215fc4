"""A picture of the clusters on a few photos, the same in every step."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from pixelclip.errors import DataError
from pixelclip.images import png_bytes, write_bytes
from pixelclip.masks.annotations import MaskReader
from pixelclip.masks.pictures import draw_masks, large_to_small, painted, stack
from pixelclip.masks.runs import from_masks
from pixelclip.overlay import palette, with_legend
from pixelclip.photos import Photo, evenly_spaced
from pixelclip.training.batch import Batch
from pixelclip.training.data import load_view
from pixelclip.training.live import LiveMasks
from pixelclip.training.model import PixelClip
from pixelclip.training.prompts import common_words
from pixelclip.training.views import (
    Geometry,
    ViewSettings,
    resized_size,
    sample_masks,
    to_frame,
)
from pixelclip.vocabulary import encode_classes

NUM_PHOTOS = 4
TILE = 256
PROMPTS_AT_ONCE = 256
NAMED = 20  # largest clusters in the legend


class ClusterPictures:
    """Rows of: photo, its masks, masks by nearest prompt, pixels by nearest prompt."""

    def __init__(
        self,
        photos: Sequence[Photo],
        reader: MaskReader,
        settings: ViewSettings,
        folder: Path,
        live: LiveMasks | None = None,
    ):
        self.photos = evenly_spaced(photos, NUM_PHOTOS)
        self.reader, self.settings, self.folder, self.live = reader, settings, folder, live
        self.words: tuple[tuple[str, ...], Tensor] | None = None

    def draw(self, model: PixelClip, step: int) -> None:
        """Write `step-00000500.clusters.png`; photos that cannot be read are left out.

        Raises:
            DataError: the picture cannot be written.
        """
        samples = [batch for photo in self.photos if (batch := self._sample(photo)) is not None]
        if not samples:
            return
        model.eval()
        with torch.no_grad():
            vectors = F.normalize(model.vectors(model.text).float(), dim=1)
            device = vectors.device
            batches = [batch.to(device) for batch in samples]
            if self.live is not None:
                batches = [self.live(batch, [number]) for number, batch in enumerate(batches)]
            rows = [_row(model, batch, vectors) for batch in batches]
            counts = np.bincount(np.concatenate([seen for _, seen in rows]))
            largest = [int(i) for i in np.argsort(-counts, kind="stable")[:NAMED] if counts[i]]
            names = self._names(model, vectors[largest])
        model.train()
        picture = Image.fromarray(np.concatenate([row for row, _ in rows]))
        legend = list(zip(names, largest, strict=True))
        drawn = with_legend(picture, legend, len(vectors))
        write_bytes(self.folder / f"step-{step:08d}.clusters.png", png_bytes(drawn))

    def _sample(self, photo: Photo) -> Batch | None:
        """The middle of a photo with its masks, undistorted; None if it cannot be read."""
        settings = self.settings
        try:
            view, geometry, masks = load_view(photo, self.reader, settings, self._middle)
        except DataError:
            return None
        grid = torch.zeros(0, settings.mask_size, settings.mask_size, dtype=torch.bool)
        return Batch(
            weak=to_frame(view, settings.crop_size)[None],
            strong=None,
            sizes=torch.tensor([[view.height, view.width]]),
            masks=(grid if masks is None else sample_masks(masks, geometry, settings, None),),
        )

    def _middle(self, size: tuple[int, int]) -> Geometry:
        """The crop in the middle of a photo of this width and height."""
        settings = self.settings
        resized = resized_size(size, settings.short_side, settings.long_side)
        width, height = (min(side, settings.crop_size) for side in resized)
        return Geometry(
            photo=size,
            resized=resized,
            left=(resized[0] - width) // 2,
            top=(resized[1] - height) // 2,
            width=width,
            height=height,
            is_flipped=False,
        )

    def _names(self, model: PixelClip, vectors: Float[Tensor, "n D"]) -> list[str]:
        """For each of these prompts the common word that is nearest."""
        if self.words is None:
            words = common_words()
            self.words = words, encode_classes(model.text, words, ("a photo of a {}.",))  # type: ignore[arg-type]
        words, features = self.words
        nearest = (vectors @ F.normalize(features.to(vectors), dim=1).T).argmax(dim=1)
        return [words[index] for index in nearest.tolist()]


def _row(
    model: PixelClip, batch: Batch, vectors: Float[Tensor, "K D"]
) -> tuple[UInt8[np.ndarray, "T T4 3"], Int[np.ndarray, " N"]]:
    """Four tiles of a photo, and the prompts of the pixels of the last one."""
    frame = Image.fromarray(batch.weak[0].permute(1, 2, 0).cpu().numpy())
    photo = frame.resize((TILE, TILE), Image.Resampling.BILINEAR)
    pooled = model.pool(batch)
    clusters = (F.normalize(pooled.features, dim=1) @ vectors.T).argmax(dim=1).cpu().numpy()
    masks = from_masks(pooled.masks.cpu().numpy())
    order = large_to_small(masks)
    top = stack(masks.select(order), photo.size).top
    features = model.visual(model.network_input(batch.weak, batch.sizes)).float()
    labels = _nearest_prompts(F.normalize(features, dim=1), vectors).cpu().numpy()
    colours = palette(len(vectors))
    tiles = [
        photo,
        draw_masks(photo, masks),
        painted(photo, np.append(clusters[order], -1)[top], colours),
        painted(photo, labels, colours),
    ]
    return np.concatenate([np.asarray(tile) for tile in tiles], axis=1), labels.ravel()


def _nearest_prompts(
    features: Float[Tensor, "1 D h w"], vectors: Float[Tensor, "K D"]
) -> Int[Tensor, "T T"]:
    """The nearest prompt of each pixel of a tile, some prompts at a time: K may be 65536."""
    best = torch.full((TILE, TILE), -torch.inf, device=vectors.device)
    labels = torch.zeros(TILE, TILE, dtype=torch.int64, device=vectors.device)
    for first in range(0, len(vectors), PROMPTS_AT_ONCE):
        part = vectors[first : first + PROMPTS_AT_ONCE]
        scores = torch.einsum("bdhw,kd->bkhw", features, part)
        scores = F.interpolate(scores, (TILE, TILE), mode="bilinear", align_corners=False)
        values, indices = scores[0].max(dim=0)  # [T, T]
        is_better = values > best
        best = torch.where(is_better, values, best)
        labels = torch.where(is_better, indices + first, labels)
    return labels
