"""A contact sheet of the photos a model does worst on: photo, truth, prediction."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Integer
from PIL import Image

from pixelclip.evaluation.datasets import SegmentationDataset
from pixelclip.evaluation.evaluate import with_background
from pixelclip.images import for_overlay, load_photo, png_bytes, write_bytes
from pixelclip.masks.layout import Key, captioned, grid, legend
from pixelclip.overlay import palette
from pixelclip.segmenter import Segmenter

HEIGHT = 200  # pixels, of each picture
LEGEND_WIDTH, KEYS = 200, 9
UNLABELLED = (225, 225, 225)


def write_sheet(
    path: Path,
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    worst: Sequence[tuple[int, float]],
    title: str,
) -> None:
    """Draw photo, truth and prediction of some pairs, and a legend of each.

    Args:
        path: of the PNG.
        segmenter: segments them again.
        dataset: of the pairs.
        worst: indices of pairs and their mIoU in percent.
        title: to stand above.

    Raises:
        DataError: a photo can no longer be read, or the file cannot be written.
    """
    rows = [_row(segmenter, dataset, index, miou) for index, miou in worst]
    write_bytes(path, png_bytes(grid(rows, title=title)))


def _row(
    segmenter: Segmenter, dataset: SegmentationDataset, index: int, miou: float
) -> list[Image.Image]:
    photo, label_path = dataset.pairs[index]
    picture = for_overlay(load_photo(photo, segmenter.config.max_pixels))
    truth = dataset.truth(label_path)
    labels = with_background(segmenter(photo).labels, dataset)
    size = (max(1, round(picture.width * HEIGHT / picture.height)), HEIGHT)
    count = len(dataset.classes)
    return [
        captioned(image, [text], least_width=0)
        for image, text in (
            (picture.resize(size, Image.Resampling.BILINEAR), photo.name),
            (_coloured(truth, count, size), "truth"),
            (_coloured(np.where(truth < count, labels, count), count, size), f"mIoU {miou:.1f}"),
            (_legend(truth, labels, dataset.classes), ""),
        )
    ]


def _coloured(labels: Integer[np.ndarray, "H W"], count: int, size: tuple[int, int]) -> Image.Image:
    """Labels in the colours of their classes; pale where there is none."""
    columns, rows = (
        np.arange(shown) * full // shown
        for shown, full in zip(size, reversed(labels.shape), strict=True)
    )
    colours = np.vstack([palette(count), np.array([UNLABELLED], dtype=np.uint8)])
    return Image.fromarray(colours[np.minimum(labels[np.ix_(rows, columns)], count)])


def _legend(
    truth: Integer[np.ndarray, "H W"], labels: Integer[np.ndarray, "H W"], classes: Sequence[str]
) -> Image.Image:
    """The classes of truth and prediction with their shares of the truth, the largest first."""
    count = len(classes)
    valid = truth < count
    true = np.bincount(truth[valid], minlength=count)
    found = np.bincount(labels[valid & (labels < count)], minlength=count)
    order = np.lexsort((np.arange(count), -found, -true))
    keys = [
        Key(classes[k], palette(count)[k], float(true[k] / max(1, valid.sum())))
        for k in order
        if true[k] + found[k]
    ]
    return legend(keys, width=LEGEND_WIDTH, height=HEIGHT, limit=KEYS)
