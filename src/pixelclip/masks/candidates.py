"""Masks that a model proposes for points of a photo: where it is asked, and which are kept.

The steps of `SamAutomaticMaskGenerator` (facebookresearch/segment-anything, utils/amg.py), which
SAM 2's generator shares.
"""

import math
from collections.abc import Sequence
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from skimage.measure import label
from torch import Tensor
from torchvision.ops import nms  # type: ignore[import-untyped]  # torchvision has no types

from pixelclip.masks.runs import PhotoMasks, from_masks

MAX_RUNS = 2**24  # of candidates, 16 bytes each; those of a photo have some hundred thousand
THIN = 1 / 16  # pixels
EDGE = 20  # photo pixels: what ends this near the edge of a crop is taken for cut off

Box = tuple[int, int, int, int]  # left, top, right, bottom
Frame = tuple[int, int]  # height, width of the photo


class Candidate(NamedTuple):
    """A mask that may be kept.

    Attributes:
        starts: of its runs in the photo, as in `PhotoMasks`.
        ends: of its runs.
        box: first and last column and row that it covers.
        predicted_iou: the model's estimate; may leave [0, 1].
        stability: see `stability_scores`.
        point: that was asked, x and y in the photo.
        crop: that it was found in, with the first column and row beyond it.
    """

    starts: Int64[np.ndarray, " R"]
    ends: Int64[np.ndarray, " R"]
    box: Box
    predicted_iou: float
    stability: float
    point: tuple[float, float]
    crop: Box

    def details(self) -> dict[str, object]:
        """What is known of it, in SA-1B's fields: boxes have a corner, width and height."""
        left, top, right, bottom = self.crop
        return {
            "predicted_iou": self.predicted_iou,
            "stability_score": self.stability,
            "point_coords": [list(self.point)],
            "crop_box": [left, top, right - left, bottom - top],
        }


def crop_boxes(frame: Frame, layers: int, overlap_ratio: float) -> list[tuple[Box, int]]:
    """The photo and its overlapping crops, each with its layer; layer i has up to 4^i of them.

    Crops of a tiny photo that would be empty or come twice are left out.
    """
    height, width = frame
    crops: dict[Box, int] = {(0, 0, width, height): 0}
    for layer in range(1, layers + 1):
        per_side = 2**layer
        overlap = int(overlap_ratio * min(frame) * 2 / per_side)
        crop_width, crop_height = (
            math.ceil((overlap * (per_side - 1) + side) / per_side) for side in (width, height)
        )
        for column, row in product(range(per_side), repeat=2):
            left, top = column * (crop_width - overlap), row * (crop_height - overlap)
            if left < width and top < height:
                box = left, top, min(left + crop_width, width), min(top + crop_height, height)
                crops.setdefault(box, layer)
    return list(crops.items())


def area(box: Box) -> int:
    """Pixels of a box."""
    left, top, right, bottom = box
    return (right - left) * (bottom - top)


def point_grid(per_side: int) -> Float64[np.ndarray, "P 2"]:
    """Points (x, y) in the middle of the cells of a grid over the unit square, row by row."""
    side = np.linspace(0.5 / per_side, 1 - 0.5 / per_side, per_side)
    return np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)


def stability_scores(logits: Float[Tensor, "M H W"], offset: float) -> Float[Tensor, " M"]:
    """IoU of each mask cut off at the logits `offset` and `-offset`; NaN if both are empty."""
    inner = (logits > offset).sum(dim=2, dtype=torch.int32).sum(dim=1)
    outer = (logits > -offset).sum(dim=2, dtype=torch.int32).sum(dim=1)
    return inner / outer


def mask_boxes(masks: Bool[Tensor, "M H W"]) -> Int64[Tensor, "M 4"]:
    """First column and row and last column and row of each mask; an empty one has no meaning."""
    columns, rows = masks.any(dim=1).byte(), masks.any(dim=2).byte()
    lasts = [line.shape[1] - 1 - line.flip(1).argmax(dim=1) for line in (columns, rows)]
    return torch.stack([columns.argmax(dim=1), rows.argmax(dim=1), *lasts], dim=1)


def is_cut_off(boxes: Int64[Tensor, "M 4"], crop: Box, frame: Sequence[int]) -> Bool[Tensor, " M"]:
    """Whether a box in the photo ends near an edge of its crop that is no edge of the photo."""
    photo = [0, 0, frame[1], frame[0]]
    near_crop, near_photo = (
        (boxes - torch.tensor(edges, device=boxes.device)).abs() <= EDGE for edges in (crop, photo)
    )
    return (near_crop & ~near_photo).any(dim=1)


def mask_runs(
    masks: Bool[Tensor, "M h w"], crop: Box, frame: Frame
) -> list[Int64[np.ndarray, "2 _"]]:
    """The runs of each mask of a crop in the photo: their starts, and their ends."""
    left, top, right, bottom = crop
    height, width = frame
    columns = torch.nn.functional.pad(masks, (left, width - right, top, height - bottom)).mT
    flat = torch.nn.functional.pad(columns.flatten(1), (1, 1))  # background before and after
    edges = (flat[:, 1:] != flat[:, :-1]).nonzero().cpu().numpy()
    bounds = np.searchsorted(edges[:, 0], np.arange(len(masks) + 1))
    return [
        np.stack([edges[first:last:2, 1], edges[first + 1 : last : 2, 1]])
        for first, last in pairwise(bounds)
    ]


def within_memory(candidates: list[Candidate]) -> tuple[list[Candidate], int]:
    """Those of the best predicted IoU whose runs fit in memory, in their order; how many do not.

    Noise has a run in every second pixel, and a broken model makes thousands of such masks.
    """
    lengths = np.array([len(candidate.starts) for candidate in candidates], dtype=np.int64)
    if lengths.sum() <= MAX_RUNS:
        return candidates, 0
    order = np.argsort([-candidate.predicted_iou for candidate in candidates], kind="stable")
    kept = np.sort(order[np.cumsum(lengths[order]) <= MAX_RUNS])
    return [candidates[index] for index in kept], len(candidates) - len(kept)


def without_duplicates(
    candidates: Sequence[Candidate], scores: Sequence[float], limit: float
) -> list[Candidate]:
    """Those kept by non-maximum suppression of their boxes, the best first.

    Args:
        candidates: of equally good ones the first is kept.
        scores: which of two is kept.
        limit: IoU of boxes above which only one is. As in the authors' code, the sides of a box
            are those between the middles of its outer pixels; but a box one pixel wide gets some
            width, as boxes without area would never be duplicates.
    """
    if not candidates:
        return []
    boxes = torch.tensor([candidate.box for candidate in candidates], dtype=torch.float32)
    boxes[:, 2:] = boxes[:, 2:].maximum(boxes[:, :2] + THIN)
    kept = nms(boxes, torch.tensor(scores, dtype=torch.float32), limit)
    return [candidates[index] for index in kept.tolist()]


def without_small_parts(candidate: Candidate, frame: Frame, min_pixels: float) -> Candidate | None:
    """The mask with holes below that size filled and smaller regions removed; None if none is left.

    Pixels that share a corner are of one region. The mask itself if nothing changes.
    """
    height, width = frame
    left, top, right, bottom = candidate.box
    # Rows and columns around the box, each with the number of those beyond it that are like it.
    rows = np.arange(max(top - 1, 0), min(bottom + 2, height))
    columns = np.arange(max(left - 1, 0), min(right + 2, width))
    row_counts, column_counts = np.ones(len(rows)), np.ones(len(columns))
    row_counts[0], column_counts[0] = rows[0] + 1, columns[0] + 1
    row_counts[-1] += height - 1 - rows[-1]
    column_counts[-1] += width - 1 - columns[-1]
    before = joined([candidate], frame).sample(rows, columns)[0]
    after = before | _small_regions(~before, np.outer(row_counts, column_counts), min_pixels)
    after &= ~_small_regions(after, np.outer(row_counts, column_counts), min_pixels)
    if not after.any():
        return None
    if np.array_equal(before, after):
        return candidate
    # A hole that was filled may reach beyond the box, to the edge of the photo.
    masks = np.zeros((1, height, width), dtype=bool)
    row_spread = np.arange(height).clip(rows[0], rows[-1]) - rows[0]
    column_spread = np.arange(width).clip(columns[0], columns[-1]) - columns[0]
    masks[0] = after[row_spread[:, None], column_spread]
    runs = from_masks(masks)
    box = tuple(mask_boxes(torch.from_numpy(masks))[0].tolist())
    return candidate._replace(starts=runs.starts, ends=runs.ends, box=box)


def _small_regions(
    mask: Bool[np.ndarray, "h w"], areas: Float64[np.ndarray, "h w"], min_pixels: float
) -> Bool[np.ndarray, "h w"]:
    """The pixels of regions with less area than that."""
    regions = label(mask, connectivity=2)
    sizes = np.bincount(regions.ravel(), areas.ravel())
    is_small = sizes < min_pixels
    is_small[0] = False  # what is not in the mask
    return is_small[regions]


def joined(candidates: Sequence[Candidate], frame: Frame, left_out: int = 0) -> PhotoMasks:
    """The masks of a photo."""
    empty = np.zeros(0, dtype=np.int64)
    lengths = [len(candidate.starts) for candidate in candidates]
    scores = np.array([candidate.predicted_iou for candidate in candidates], dtype=np.float32)
    return PhotoMasks(
        height=frame[0],
        width=frame[1],
        starts=np.concatenate([empty, *(candidate.starts for candidate in candidates)]),
        ends=np.concatenate([empty, *(candidate.ends for candidate in candidates)]),
        owners=np.repeat(np.arange(len(candidates)), lengths),
        count=len(candidates),
        scores=scores.clip(0, 1),
        broken=left_out,
        details=tuple(candidate.details() for candidate in candidates),
    )
