"""Run a segmenter over a data set and report the figures."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import numpy as np
from jaxtyping import Int, Integer
from rich.console import Console
from rich.table import Table

from pixelclip.errors import DataError
from pixelclip.evaluation.datasets import SegmentationDataset
from pixelclip.evaluation.metrics import (
    confusion,
    iou_per_class,
    mean_accuracy,
    mean_iou,
    pixel_accuracy,
)
from pixelclip.images import read_labels, write_bytes
from pixelclip.segmenter import Segmenter


class Report(TypedDict):
    """Figures of one evaluation; all in percent.

    `per_class` holds the IoU of every class, None for those that do not occur in the truth.
    """

    dataset: str
    model: str
    photos: int
    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    classes_present: int
    per_class: dict[str, float | None]
    failed: list[str]
    settings: dict[str, object]


def evaluate(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    on_photo: Callable[[], None] = lambda: None,
) -> Report:
    """Segment every photo and compare with its labels; broken pairs are listed, not fatal.

    Args:
        segmenter: its classes are the data set's.
        dataset: photos with labels.
        on_photo: called after each photo, for progress.

    Raises:
        DataError: no pair could be used.
    """
    count = len(dataset.classes)
    matrix = np.zeros((count, count + 1), dtype=np.int64)
    failed: list[str] = []
    for photo, label_path in dataset.pairs:
        try:
            matrix += _compare(segmenter, photo, label_path, dataset)
        except DataError as error:
            failed.append(str(error))
        on_photo()
    if len(failed) == len(dataset.pairs):
        raise DataError(f"none of the {len(failed)} photos could be used; first: {failed[0]}")
    if not matrix.any():
        raise DataError(f"no pixel of {dataset.name} is labelled")
    return report(segmenter, dataset, matrix, failed)


def _compare(
    segmenter: Segmenter, photo: Path, label_path: Path, dataset: SegmentationDataset
) -> Int[np.ndarray, "K K1"]:
    truth = checked_labels(label_path, dataset)
    labels = segmenter(photo).labels
    if truth.shape != labels.shape:
        raise DataError(
            f"{label_path} is {truth.shape[1]} x {truth.shape[0]}, its photo"
            f" {labels.shape[1]} x {labels.shape[0]}"
        )
    return confusion(truth, labels, len(dataset.classes))


def checked_labels(path: Path, dataset: SegmentationDataset) -> Integer[np.ndarray, "H W"]:
    """The label map, all of whose values are classes or "not labelled".

    Raises:
        DataError: a value is neither.
    """
    truth = read_labels(path)
    wrong = truth[(truth != dataset.ignore) & ((truth >= len(dataset.classes)) | (truth < 0))]
    if wrong.size:
        raise DataError(
            f"{path} holds the value {wrong[0]}, but there are {len(dataset.classes)} classes"
            f" (0 to {len(dataset.classes) - 1}; {dataset.ignore} = not labelled)"
        )
    return truth


def report(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    matrix: Int[np.ndarray, "K K1"],
    failed: list[str],
) -> Report:
    """The figures of a confusion matrix, with all that made them."""
    ious = iou_per_class(matrix)
    names = json.dumps(list(segmenter.classes), ensure_ascii=False)
    settings: dict[str, object] = {
        "classes_sha256": hashlib.sha256(names.encode()).hexdigest(),
        **segmenter.description(),
    }
    return Report(
        dataset=dataset.name,
        model=segmenter.backbone.card.name,
        photos=len(dataset.pairs) - len(failed),
        miou=round(100 * mean_iou(matrix), 3),
        pixel_accuracy=round(100 * pixel_accuracy(matrix), 3),
        mean_accuracy=round(100 * mean_accuracy(matrix), 3),
        classes_present=int((matrix.sum(axis=1) > 0).sum()),
        per_class={
            name: None if np.isnan(iou) else round(100 * float(iou), 3)
            for name, iou in zip(dataset.classes, ious, strict=True)
        },
        failed=failed,
        settings=settings,
    )


def write_report(path: Path, report: Report) -> None:
    """Write the report as JSON, whole or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode())


def print_report(report: Report) -> None:
    """Print the figures: a table of the classes that occur, then one line."""
    table = Table("class", "IoU %", title=f"{report['dataset']}, {report['model']}")
    table.columns[1].justify = "right"
    for name, iou in report["per_class"].items():
        if iou is not None:
            table.add_row(name, f"{iou:.1f}")
    console = Console()
    console.print(table)
    console.print(
        f"mIoU {report['miou']:.1f} over {report['classes_present']} classes, pixel accuracy"
        f" {report['pixel_accuracy']:.1f}, mean accuracy {report['mean_accuracy']:.1f}"
        f" ({report['photos']} photos)",
        highlight=False,
    )
    for line in report["failed"]:
        print(f"pixelclip: failed: {line}", file=sys.stderr)
