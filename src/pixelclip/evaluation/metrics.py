"""One confusion matrix over a data set, and the figures made of it."""

import numpy as np
from jaxtyping import Float, Int, Integer


def confusion(
    truth: Integer[np.ndarray, "H W"], labels: Integer[np.ndarray, "H W"], num_classes: int
) -> Int[np.ndarray, "K K1"]:
    """Pixel counts: rows are true classes, columns predictions, the last one "no class".

    Args:
        truth: class indices; pixels that are not of a class (any other value) do not count.
        labels: predicted indices; any other value is "no class".
        num_classes: K.
    """
    valid = (truth >= 0) & (truth < num_classes)
    rows = truth[valid].astype(np.int64)
    columns = np.minimum(labels[valid].astype(np.int64), num_classes)
    width = num_classes + 1
    counts = np.bincount(rows * width + columns, minlength=num_classes * width)
    return counts.reshape(num_classes, width)


def iou_per_class(matrix: Int[np.ndarray, "K K1"]) -> Float[np.ndarray, " K"]:
    """Intersection over union in [0, 1]; NaN for classes that do not occur in the truth."""
    hits = np.diagonal(matrix).astype(np.float64)
    true, predicted = matrix.sum(axis=1), matrix[:, : len(matrix)].sum(axis=0)
    union = np.maximum(true + predicted - hits, 1)
    return np.where(true > 0, hits / union, np.nan)


def mean_iou(matrix: Int[np.ndarray, "K K1"]) -> float:
    """Mean IoU in [0, 1] over the classes that occur in the truth (behaviour.md 18a)."""
    return float(np.nanmean(iou_per_class(matrix))) if matrix.any() else float("nan")


def pixel_accuracy(matrix: Int[np.ndarray, "K K1"]) -> float:
    """Share of the labelled pixels that are right, in [0, 1]."""
    total = matrix.sum()
    return float(np.diagonal(matrix).sum() / total) if total else float("nan")


def mean_accuracy(matrix: Int[np.ndarray, "K K1"]) -> float:
    """Mean over the classes that occur of the share of their pixels that are right."""
    true = matrix.sum(axis=1)
    seen = true > 0
    return float((np.diagonal(matrix)[seen] / true[seen]).mean()) if seen.any() else float("nan")
