"""Pixel counts over a data set, and the figures made of them.

Counts are integers and are added up photo by photo, so the figures of a data set do not depend on
who counted which photo, or in what order.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int64, Integer, UInt8

BOUNDARY_SHARE = 0.02  # of the photo's diagonal: the width of a boundary (Cheng et al. 2021)


class Boundary(NamedTuple):
    """How well edges agree, per class; in pixels of the boundaries' bands.

    Attributes:
        intersection: in the band of the class in both the truth and the prediction.
        union: in either.
    """

    intersection: Int64[np.ndarray, " K"]
    union: Int64[np.ndarray, " K"]


@dataclass(frozen=True, eq=False)
class Counts:
    """What is counted in photos; the sum over photos is the count over all of them.

    Attributes:
        confusion: rows are true classes, columns predictions, the last one "no class".
        boundary: pixels of the boundaries.
    """

    confusion: Int64[np.ndarray, "K K1"]
    boundary: Boundary

    def __add__(self, other: "Counts") -> "Counts":
        """The counts of both, exactly."""
        bands = zip(self.boundary, other.boundary, strict=True)
        boundary = Boundary(*(mine + theirs for mine, theirs in bands))
        return Counts(self.confusion + other.confusion, boundary)


def no_counts(num_classes: int) -> Counts:
    """The counts of no photo."""
    nothing = np.zeros(num_classes, dtype=np.int64)
    confused = np.zeros((num_classes, num_classes + 1), dtype=np.int64)
    return Counts(confused, Boundary(nothing, nothing))


def count_photo(
    truth: Integer[np.ndarray, "H W"], labels: Integer[np.ndarray, "H W"], num_classes: int
) -> Counts:
    """The counts of one photo.

    Args:
        truth: class indices; pixels that are not of a class (any other value) do not count.
        labels: predicted indices; any other value is "no class".
        num_classes: K.
    """
    radius = boundary_radius(*truth.shape)
    bands = boundary_band(truth, radius) * np.uint8(2) + boundary_band(labels, radius)
    pairs = _pairs(truth, labels, num_classes, bands)[:, :num_classes]  # [4, K, K + 1]
    square = pairs[:, :, :num_classes]
    both = np.diagonal(square[3])
    union = pairs[2:].sum(axis=(0, 2)) + square[1::2].sum(axis=(0, 1)) - both
    return Counts(pairs.sum(axis=0), Boundary(both.copy(), union))


def confusion(
    truth: Integer[np.ndarray, "H W"], labels: Integer[np.ndarray, "H W"], num_classes: int
) -> Int64[np.ndarray, "K K1"]:
    """Pixel counts: rows are true classes, columns predictions, the last one "no class".

    Arguments as of `count_photo`.
    """
    return _pairs(truth, labels, num_classes, np.zeros(truth.shape, np.uint8))[0, :num_classes]


def _pairs(
    truth: Integer[np.ndarray, "H W"],
    labels: Integer[np.ndarray, "H W"],
    num_classes: int,
    kinds: UInt8[np.ndarray, "H W"],
) -> Int64[np.ndarray, "4 K1 K1"]:
    """Pixels of each kind (0 to 3), true class and predicted class; K is "no class"."""
    size = num_classes + 1
    index = kinds.astype(np.intp)
    for part in (truth, labels):
        if np.issubdtype(part.dtype, np.signedinteger):
            part = np.where(part < 0, num_classes, part)
        index *= size
        index += np.minimum(part.astype(np.intp, copy=False), num_classes)
    counts = np.bincount(index.ravel(), minlength=4 * size * size)
    return counts.astype(np.int64, copy=False).reshape(4, size, size)


def boundary_radius(height: int, width: int) -> int:
    """Width of the band along a boundary: 2 % of the diagonal, at least one pixel.

    Cheng et al., Boundary IoU, CVPR 2021, and their `boundary_iou/utils/boundary_utils.py`.
    """
    return max(1, round(BOUNDARY_SHARE * float(np.hypot(height, width))))


def boundary_band(labels: Integer[np.ndarray, "H W"], radius: int) -> Bool[np.ndarray, "H W"]:
    """Pixels at most so far inside the mask of their own label, the photo's frame being outside.

    In the paper each class is a mask, and the band is what an erosion by a square of
    2 * radius + 1 takes away. A pixel is taken from its own class's mask just where that square
    holds another label, that is where two neighbours in it differ: found for all classes at once.
    """
    across = np.zeros(labels.shape, dtype=bool)  # differs from the next pixel of the row
    across[:, :-1] = labels[:, 1:] != labels[:, :-1]
    down = np.zeros(labels.shape, dtype=bool)
    down[:-1] = labels[1:] != labels[:-1]
    near = _any_within(across.T, radius, radius - 1).T
    band = _any_within(near, radius, radius) | _any_within(down, radius, radius - 1)
    band[:radius] = band[-radius:] = True
    band[:, :radius] = band[:, -radius:] = True
    return band


def _any_within(flags: Bool[np.ndarray, "H W"], before: int, after: int) -> Bool[np.ndarray, "H W"]:
    """Whether any flag is set from so many rows before each row to so many after it.

    By doubling the rows that are covered: 7 ORs of bytes for a window of 65 rows.
    """
    covered, length = 1, before + after + 1
    found = np.pad(flags, ((before, after), (0, 0)))
    while covered < length:
        step = min(covered, length - covered)
        found = found[:-step] | found[step:]
        covered += step
    return found


def iou_per_class(matrix: Int[np.ndarray, "K K1"]) -> Float[np.ndarray, " K"]:
    """Intersection over union in [0, 1]; NaN for classes that do not occur in the truth."""
    hits = np.diagonal(matrix).astype(np.float64)
    true, predicted = matrix.sum(axis=1), matrix[:, : len(matrix)].sum(axis=0)
    union = np.maximum(true + predicted - hits, 1)
    return np.where(true > 0, hits / union, np.nan)


def mean_iou(matrix: Int[np.ndarray, "K K1"]) -> float:
    """Mean IoU in [0, 1] over the classes that occur in the truth (behaviour.md 18a)."""
    return float(np.nanmean(iou_per_class(matrix))) if matrix.any() else float("nan")


def frequency_weighted_iou(matrix: Int[np.ndarray, "K K1"]) -> float:
    """Mean IoU in [0, 1], every class weighted with its share of the true pixels."""
    true = matrix.sum(axis=1)
    seen = true > 0
    ious = iou_per_class(matrix)[seen]
    return float((ious * true[seen]).sum() / true.sum()) if seen.any() else float("nan")


def boundary_iou_per_class(counts: Counts) -> Float[np.ndarray, " K"]:
    """Boundary IoU in [0, 1]; NaN for classes that do not occur in the truth."""
    union = np.maximum(counts.boundary.union, 1)
    return np.where(counts.confusion.sum(axis=1) > 0, counts.boundary.intersection / union, np.nan)


def pixel_accuracy(matrix: Int[np.ndarray, "K K1"]) -> float:
    """Share of the labelled pixels that are right, in [0, 1]."""
    total = matrix.sum()
    return float(np.diagonal(matrix).sum() / total) if total else float("nan")


def accuracy_per_class(matrix: Int[np.ndarray, "K K1"]) -> Float[np.ndarray, " K"]:
    """Share of each class's pixels that are right; NaN for classes that do not occur."""
    true = matrix.sum(axis=1)
    return np.where(true > 0, np.diagonal(matrix) / np.maximum(true, 1), np.nan)


def mean_accuracy(matrix: Int[np.ndarray, "K K1"]) -> float:
    """Mean over the classes that occur of the share of their pixels that are right."""
    return float(np.nanmean(accuracy_per_class(matrix))) if matrix.any() else float("nan")
