"""A contact sheet of the photos a model does worst on: photo, truth, prediction."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Integer
from PIL import Image

from pixelclip.evaluation.datasets import SegmentationDataset
from pixelclip.images import for_overlay, load_photo, png_bytes, write_bytes
from pixelclip.masks.layout import Key, captioned, grid, legend
from pixelclip.overlay import palette

HEIGHT, WIDEST = 200, 800  # pixels, of each picture
LEGEND_WIDTH, KEYS = 220, 9
FEW = 24  # classes whose colours stay apart; of more, each row has colours of its own
UNLABELLED = (225, 225, 225)
CAPTION = (
    "Grey: no class, or not labelled in the truth: there the prediction is hidden. Percent: share"
    " of the labelled pixels; order: area, in truth or prediction."
)


class Case(NamedTuple):
    """A photo to draw.

    Attributes:
        number: of its pair in the data set.
        miou: in percent.
        labels: what was found in it, of the size of `small`; any other value is "no class".
    """

    number: int
    miou: float
    labels: Integer[np.ndarray, "h w"]


def small(labels: Integer[np.ndarray, "H W"]) -> Integer[np.ndarray, "h w"]:
    """A label map as large as it is drawn; each pixel has the label of one in its place."""
    height, width = labels.shape
    shown = max(1, min(WIDEST, round(width * HEIGHT / height)))
    rows, columns = np.arange(HEIGHT) * height // HEIGHT, np.arange(shown) * width // shown
    return labels[np.ix_(rows, columns)]


def write_sheet(
    path: Path, dataset: SegmentationDataset, cases: Sequence[Case], title: str, max_pixels: int
) -> None:
    """Draw photo, truth and prediction of some pairs, and a legend of each.

    Args:
        path: of the PNG.
        dataset: of the pairs.
        cases: what is drawn.
        title: to stand above.
        max_pixels: photos with more are refused.

    Raises:
        DataError: a photo can no longer be read, or the file cannot be written.
    """
    rows = [_row(dataset, case, max_pixels) for case in cases]
    write_bytes(path, png_bytes(grid(rows, title=title, subtitle=CAPTION)))


def _row(dataset: SegmentationDataset, case: Case, max_pixels: int) -> list[Image.Image]:
    photo, label_path = dataset.pairs[case.number]
    picture = for_overlay(load_photo(photo, max_pixels))
    count = len(dataset.classes)
    truth = small(dataset.truth(label_path))
    labels = np.where(truth < count, np.minimum(case.labels, count), count)
    order, shares = _shares(truth, labels, count)
    ranks = np.arange(count) if count <= FEW else np.argsort(order, kind="stable")
    colours = np.vstack([palette(count)[ranks], np.array([UNLABELLED], dtype=np.uint8)])
    keys = [Key(dataset.classes[k], colours[k], shares[k]) for k in order if k in shares]
    return [
        captioned(image, [text], least_width=0)
        for image, text in (
            (picture.resize(truth.shape[::-1], Image.Resampling.BILINEAR), photo.name),
            (Image.fromarray(colours[np.minimum(truth, count)]), "truth"),
            (Image.fromarray(colours[labels]), f"prediction, mIoU {case.miou:.1f}"),
            (legend(keys, width=LEGEND_WIDTH, height=HEIGHT, limit=KEYS), "share of the truth"),
        )
    ]


def _shares(
    truth: Integer[np.ndarray, "h w"], labels: Integer[np.ndarray, "h w"], count: int
) -> tuple[Int[np.ndarray, " K"], dict[int, float]]:
    """All classes, the largest in truth or prediction first; shares of the truth of those seen."""
    valid = truth < count
    true = np.bincount(truth[valid], minlength=count)
    found = np.bincount(labels[valid], minlength=count + 1)[:count]
    order = np.lexsort((np.arange(count), -np.maximum(true, found)))
    total = max(1, int(valid.sum()))
    return order, {int(k): float(true[k] / total) for k in order if true[k] + found[k]}
