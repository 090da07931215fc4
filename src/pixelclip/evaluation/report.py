"""The figures of an evaluation, and the files they are written to."""

import csv
import io
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from pixelclip.errors import DataError
from pixelclip.evaluation.datasets import SegmentationDataset
from pixelclip.evaluation.metrics import (
    Counts,
    accuracy_per_class,
    boundary_iou_per_class,
    frequency_weighted_iou,
    iou_per_class,
    mean_accuracy,
    mean_iou,
    pixel_accuracy,
)
from pixelclip.evaluation.pieces import worst_of
from pixelclip.files import printable
from pixelclip.images import write_bytes
from pixelclip.segmenter import Segmenter

WIDEST = 10_000  # characters of a line
NOT_WHOLE = "* not of all photos: some are missing, have no label map, or could not be used."


class WorstPhoto(TypedDict):
    """A photo and its own mIoU in percent, over the classes of its truth.

    The photo is told by its path below the folder that all photos of the set lie in.
    """

    photo: str
    miou: float


class Report(TypedDict):
    """Figures of one evaluation; all in percent. Specified in docs/formats.md.

    What is given per class is None for classes that do not occur in the truth.
    """

    dataset: str
    model: str
    rival: str | None
    protocol: str
    departures: list[str]
    photos: int
    whole: bool
    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    boundary_iou: float
    frequency_weighted_iou: float
    classes_present: int
    per_class: dict[str, float | None]
    per_class_accuracy: dict[str, float | None]
    per_class_boundary_iou: dict[str, float | None]
    per_class_pixels: dict[str, int]
    worst: list[WorstPhoto]
    failed: list[str]
    settings: dict[str, object]


class Scores(NamedTuple):
    """What came of all photos of a data set.

    Attributes:
        counts: of all of them.
        mious: of each in [0, 1]; NaN where nothing is labelled, or the pair could not be used.
        failed: one line for each pair that could not be used.
    """

    counts: Counts
    mious: Float[np.ndarray, " N"]
    failed: list[str]


class Terms(NamedTuple):
    """On which terms a figure stands, beside the settings.

    Attributes:
        rival: whose way from photo to features it is; None: the model's own.
        protocol: name of a protocol.
        departures: where this is not what that protocol says, a line each.
    """

    rival: str | None = None
    protocol: str = "default"
    departures: Sequence[str] = ()


def make_report(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    scores: Scores,
    terms: Terms = Terms(),  # noqa: B008 - it cannot be changed
) -> Report:
    """The figures, with all that made them.

    Raises:
        DataError: no pair could be used, or no pixel is labelled.
    """
    counts, failed = scores.counts, scores.failed
    if len(failed) == len(dataset.pairs):
        raise DataError(f"none of the {len(failed)} photos could be used; first: {failed[0]}")
    matrix = counts.confusion
    if not matrix.any():
        raise DataError(f"no pixel of {dataset.name} is labelled")
    boundary_ious = boundary_iou_per_class(counts)
    settings = {
        "classes_sha256": dataset.classes_sha256,
        "torch": version("torch"),
        **segmenter.description(),
    }
    return Report(
        dataset=dataset.name,
        model=segmenter.backbone.card.name,
        rival=terms.rival,
        protocol=terms.protocol,
        departures=list(terms.departures),
        photos=len(dataset.pairs) - len(failed),
        whole=not (dataset.lacking or failed),
        miou=_percent(mean_iou(matrix)),
        pixel_accuracy=_percent(pixel_accuracy(matrix)),
        mean_accuracy=_percent(mean_accuracy(matrix)),
        boundary_iou=_percent(float(np.nanmean(boundary_ious))),
        frequency_weighted_iou=_percent(frequency_weighted_iou(matrix)),
        classes_present=int((matrix.sum(axis=1) > 0).sum()),
        per_class=_by_name(dataset.classes, iou_per_class(matrix)),
        per_class_accuracy=_by_name(dataset.classes, accuracy_per_class(matrix)),
        per_class_boundary_iou=_by_name(dataset.classes, boundary_ious),
        per_class_pixels=dict(zip(dataset.classes, matrix.sum(axis=1).tolist(), strict=True)),
        worst=_worst(dataset, scores),
        failed=failed,
        settings=settings,
    )


def _worst(dataset: SegmentationDataset, scores: Scores) -> list[WorstPhoto]:
    folder = os.path.commonpath([photo.parent for photo, _ in dataset.pairs])
    return [
        WorstPhoto(
            photo=printable(dataset.pairs[index][0].relative_to(folder)),
            miou=_percent(float(scores.mious[index])),
        )
        for index in worst_of(scores.mious)
    ]


def row_name(report: Report) -> str:
    """What a result is called in tables."""
    settings, parts = report["settings"], [report["model"]]
    if report["rival"] is not None:
        parts.append(report["rival"])
    refine = settings.get("refine")
    if isinstance(refine, dict):
        parts.append(f"refined by {refine.get('source') or Path(str(refine.get('masks'))).name}")
    if settings.get("fused"):
        parts.append("templates of single classes")
    return ", ".join(parts)


def _percent(share: float) -> float:
    return round(100 * share, 3)


def _by_name(classes: Sequence[str], shares: Float[np.ndarray, " K"]) -> dict[str, float | None]:
    pairs = zip(classes, shares.tolist(), strict=True)
    return {name: None if np.isnan(share) else _percent(share) for name, share in pairs}


def write_classes(path: Path, report: Report) -> None:
    """Write the figures of every class, in percent, as CSV; empty where it does not occur."""
    head = ("class", "iou", "accuracy", "boundary_iou", "pixels")
    parts = (
        report["per_class"], report["per_class_accuracy"], report["per_class_boundary_iou"],
        report["per_class_pixels"],
    )  # fmt: skip
    write_csv(path, [head, *([name, *(part[name] for part in parts)] for name in parts[0])])


def write_confusion(path: Path, report: Report, counts: Counts) -> None:
    """Write the confusion matrix as CSV: rows are true classes, columns predictions, pixels."""
    names = list(report["per_class"])
    rows = ([name, *row] for name, row in zip(names, counts.confusion.tolist(), strict=True))
    write_csv(path, [["true \\ predicted", *names, "no class"], *rows])


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write rows as CSV; None is an empty cell.

    Raises:
        DataError: the file cannot be written.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_bytes(path, text.getvalue().encode("utf-8", "replace"))


def print_wide(table: Table) -> None:
    """Print a table whose figures stay in one line; where no terminal reads it, all else too."""
    console = Console()
    for column in table.columns:
        column.no_wrap = column.justify == "right"
        column.overflow = "fold"
    needed = Measurement.get(console, console.options.update(max_width=WIDEST), table)
    least = needed.minimum if console.is_terminal else needed.maximum
    Console(width=max(console.width, least)).print(table)


def print_report(report: Report) -> None:
    """Print the figures: a table of the classes that occur, then one line."""
    title = f"{report['dataset']}, {row_name(report)}"
    table = Table("class", "IoU %", "boundary %", title=escape(title))
    for column in table.columns[1:]:
        column.justify = "right"
    for class_name, iou in report["per_class"].items():
        edge = report["per_class_boundary_iou"][class_name]
        if iou is not None and edge is not None:
            table.add_row(escape(class_name), f"{iou:.1f}", f"{edge:.1f}")
    print_wide(table)
    star = "" if report["whole"] else " *"
    Console().print(
        f"mIoU {report['miou']:.1f}{star} over {report['classes_present']} classes, pixel accuracy"
        f" {report['pixel_accuracy']:.1f}, mean accuracy {report['mean_accuracy']:.1f}, boundary"
        f" IoU {report['boundary_iou']:.1f} ({report['photos']} photos)",
        highlight=False,
    )
    if not report["whole"]:
        print(NOT_WHOLE)


def print_terms(reports: Sequence[Report], said: Collection[str] = ()) -> None:
    """Print the departures from each protocol, once each, but for those said elsewhere."""
    lines = dict.fromkeys(
        f"{report['protocol']}, {report['dataset']}: {line}"
        for report in reports
        for line in report["departures"]
        if line not in said
    )
    if lines:
        console = Console()
        console.print("Departures from the protocol:", highlight=False)
        for line in lines:
            console.print(f"  {line}", highlight=False, markup=False)


def print_failed(reports: Sequence[Report]) -> None:
    """Print the pairs that could not be used, on stderr, once each."""
    for line in dict.fromkeys(line for report in reports for line in report["failed"]):
        print(f"pixelclip: failed: {line}", file=sys.stderr)
