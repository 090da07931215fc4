"""Pixel counts over a data set, and the figures made of them.

Counts are integers and are added up photo by photo, so the figures of a data set do not depend on
who counted which photo, or in what order.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int64, Integer, UInt, UInt8

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

    Edges are those between labelled pixels, and the photo's frame: in the truth as in the
    prediction, so that one that is right wherever there is a truth has a boundary IoU of 1.
    """
    true, found = _indices(truth, num_classes), _indices(labels, num_classes)
    radius, is_labelled = boundary_radius(*truth.shape), true < num_classes
    of_truth, of_labels = (
        boundary_band(part, is_labelled, num_classes, radius) for part in (true, found)
    )
    bands = of_truth * np.uint8(2) + of_labels
    pairs = _pairs(true, found, num_classes, bands)[:, :num_classes]  # [4, K, K + 1]
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
    true, found = _indices(truth, num_classes), _indices(labels, num_classes)
    return _pairs(true, found, num_classes, np.zeros(truth.shape, np.uint8))[0, :num_classes]


def _indices(part: Integer[np.ndarray, "H W"], num_classes: int) -> UInt[np.ndarray, "H W"]:
    """Class indices as small as they can be; K is any other value."""
    if np.issubdtype(part.dtype, np.signedinteger):
        part = np.where(part < 0, num_classes, part)
    last = np.array(num_classes, dtype=np.min_scalar_type(num_classes))
    return np.minimum(part, last).astype(last.dtype, copy=False)


def _pairs(
    true: UInt[np.ndarray, "H W"],
    found: UInt[np.ndarray, "H W"],
    num_classes: int,
    kinds: UInt8[np.ndarray, "H W"],
) -> Int64[np.ndarray, "4 K1 K1"]:
    """Pixels of each kind (0 to 3), true class and predicted class; K is "no class"."""
    size = num_classes + 1
    index = kinds.astype(np.intp)
    for part in (true, found):
        index *= size
        index += part
    counts = np.bincount(index.ravel(), minlength=4 * size * size)
    return counts.astype(np.int64, copy=False).reshape(4, size, size)


def boundary_radius(height: int, width: int) -> int:
    """Width of the band along a boundary: 2 % of the diagonal, at least one pixel.

    Cheng et al., Boundary IoU, CVPR 2021, and their `boundary_iou/utils/boundary_utils.py`.
    """
    return max(1, round(BOUNDARY_SHARE * float(np.hypot(height, width))))


def boundary_band(
    classes: UInt[np.ndarray, "H W"],
    is_labelled: Bool[np.ndarray, "H W"],
    num_classes: int,
    radius: int,
) -> Bool[np.ndarray, "H W"]:
    """Labelled pixels at most so far inside the mask of their class, the frame being outside.

    In the paper each class is a mask, and the band is what an erosion by a square of
    2 * radius + 1 takes away. Where all is labelled, that is done here to all classes at once: a
    pixel is taken from its own mask just where that square holds another class, that is where the
    largest and the smallest index in it differ. Pixels that are not labelled are no class, and so
    no edge: they are taken for the least index where the largest is sought, and vice versa.

    Args:
        classes: 0 to num_classes, the last one being "no class"; that, too, is a mask.
        is_labelled: what counts; elsewhere the band is empty.
        num_classes: K.
        radius: width of the band in pixels.
    """
    band = is_labelled.copy()
    if min(band.shape) > 2 * radius:  # else all of the photo is near its frame
        inner = (slice(radius, -radius), slice(radius, -radius))
        last = classes.dtype.type(num_classes)
        largest = _over_square(np.maximum, classes * is_labelled, radius)
        smallest = _over_square(np.minimum, np.where(is_labelled, classes, last), radius)
        band[inner] &= largest != smallest
    return band


def _over_square(
    ufunc: np.ufunc, values: UInt[np.ndarray, "H W"], radius: int
) -> UInt[np.ndarray, "h w"]:
    """The maximum or minimum over the square around each pixel that is not near the frame.

    By doubling the rows that are covered: 7 steps for a square of 65 rows.
    """
    for _ in range(2):
        covered, length = 1, 2 * radius + 1
        while covered < length:
            step = min(covered, length - covered)
            values = ufunc(values[:-step], values[step:])
            covered += step
        values = values.T
    return values


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
