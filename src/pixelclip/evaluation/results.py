"""What an evaluation of models over data sets prints and writes."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from pixelclip.evaluation.datasets import SegmentationDataset
from pixelclip.evaluation.protocols import published
from pixelclip.evaluation.report import (
    Report,
    Scores,
    print_failed,
    print_report,
    print_terms,
    row_name,
    write_classes,
    write_confusion,
    write_csv,
)
from pixelclip.evaluation.sheet import Case, write_sheet
from pixelclip.evaluation.table import (
    Row,
    csv_cells,
    document,
    our_rows,
    print_table,
    published_rows,
)
from pixelclip.images import write_bytes, write_json


@dataclass(frozen=True)
class Result:
    """A model or rival on a data set.

    Attributes:
        report: the figures.
        scores: what they are made of.
        drawn: label maps of the worst photos, by the number of the pair.
        dataset: photos with labels.
        max_pixels: of photos that are read.
    """

    report: Report
    scores: Scores
    drawn: Mapping[int, Integer[np.ndarray, "_ _"]]
    dataset: SegmentationDataset
    max_pixels: int


@dataclass(frozen=True)
class Results:
    """All of an evaluation.

    Attributes:
        found: model by model, data set by data set.
        sets: columns of the table, those without results included.
        missing: a line for each data set without results.
        with_published: published figures stand beside ours.
    """

    found: tuple[Result, ...]
    sets: tuple[str, ...]
    missing: tuple[str, ...] = ()
    with_published: bool = False

    @property
    def reports(self) -> list[Report]:
        """The figures."""
        return [result.report for result in self.found]

    @property
    def rows(self) -> list[Row]:
        """The lines of the table: ours, then what others have published."""
        lines = published() if self.with_published else ()
        ours = our_rows(self.reports, self.sets, partial=self.partial)
        return [*ours, *published_rows(lines, self.sets)]

    @property
    def partial(self) -> dict[str, tuple[str, ...]]:
        """Official data sets that were not evaluated whole, and what they lack."""
        return {
            result.dataset.name: result.dataset.lacking
            for result in self.found
            if result.dataset.expected is not None
            and (result.dataset.lacking or result.report["failed"])
        }


def as_document(results: Results) -> dict[str, object]:
    """The results as JSON has them; specified in docs/formats.md."""
    return {
        "table": {
            "sets": list(results.sets),
            "rows": [
                {"name": row.name, "source": row.source or "this run",
                 "miou": dict(zip(results.sets, row.values, strict=True)), "mean": row.mean,
                 "not_whole": [name for name in results.sets if name in row.marked]}
                for row in results.rows
            ],
        },
        "results": results.reports,
        "missing": list(results.missing),
    }  # fmt: skip


def write_results(results: Results, output: Path | None, json_file: Path | None) -> None:
    """Write all that is asked for: a folder, a file of figures, or nothing.

    Raises:
        DataError: a file cannot be written.
    """
    is_single = len(results.found) == 1 and not results.missing and not results.with_published
    everything = as_document(results)
    if json_file is not None:
        write_json(json_file, results.reports[0] if is_single else everything)
    if output is None:
        return
    write_json(output / "results.json", everything)
    write_csv(output / "table.csv", csv_cells(results.rows, results.sets))
    text = document(results.reports, results.rows, results.sets, results.missing)
    write_bytes(output / "report.md", text.encode("utf-8", "replace"))
    for result in results.found:
        _write_result(output, result)


def _write_result(output: Path, result: Result) -> None:
    report = result.report
    folder = output / _file_name(report["dataset"]) / _file_name(row_name(report))
    write_classes(folder / "classes.csv", report)
    write_confusion(folder / "confusion.csv", report, result.scores.counts)
    cases = [
        Case(number, listed["miou"], labels)
        for (number, labels), listed in zip(result.drawn.items(), report["worst"], strict=True)
    ]
    title = f"{report['dataset']}, {row_name(report)}: the photos of lowest mIoU"
    write_sheet(folder / "worst.png", result.dataset, cases, title, result.max_pixels)


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip(".-") or "_"


def print_results(results: Results, *, quiet: bool) -> None:
    """Print the figures of one evaluation, or the table of several; what is missing on stderr."""
    if not quiet:
        if len(results.found) == 1 and not results.with_published:
            print_report(results.reports[0])
        else:
            print_table(results.rows, results.sets, results.reports)
        lacking = {line for lines in results.partial.values() for line in lines}  # said below
        print_terms(results.reports, lacking)
    print_failed(results.reports)
    for name, lines in results.partial.items():
        for line in lines:
            print(f"pixelclip: not whole: {name}: {line}", file=sys.stderr)
    print_lines(results.missing)


def print_lines(missing: Sequence[str]) -> None:
    """Print what is not evaluated, on stderr."""
    for line in missing:
        print(f"pixelclip: not evaluated: {line}", file=sys.stderr)
