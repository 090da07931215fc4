"""The figures of named masks, and what is printed and written of them."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sklearn.metrics import average_precision_score

from pixelclip.errors import DataError
from pixelclip.evaluation.datasets import SegmentationDataset
from pixelclip.evaluation.maskclass_pieces import NamedMasks
from pixelclip.evaluation.metrics import mean_iou
from pixelclip.evaluation.report import Terms, write_csv
from pixelclip.evaluation.table import markdown
from pixelclip.images import write_bytes, write_json

FIGURES = {"accuracy": "accuracy", "miou": "mIoU", "ap": "AP"}  # of a cell of the table


class ClassFigures(TypedDict):
    """Of the masks of one class: their number, accuracy and AP in percent."""

    masks: int
    accuracy: float
    ap: float


@dataclass(frozen=True)
class MaskClassReport:
    """Figures of one run; all in percent. Specified in docs/formats.md.

    Attributes:
        dataset: its name.
        model: name on its card.
        rival: whose dense features they are; None: the model's own.
        protocol: name of a protocol.
        departures: where this is not what that protocol says, a line each.
        variant: what stands for a mask: pooled, crop or masked-crop.
        masks: where they come from.
        photos: that could be used.
        num_masks: that count: at least half of their pixels are labelled. The class of a mask is
            that of most of its labelled pixels.
        left_out: masks that do not count.
        accuracy: share of the masks whose class is found.
        mean_accuracy: the mean over classes of the share of their masks.
        miou: of the label maps in which every mask is painted with the class found, small masks on
            top; labelled pixels under no mask are wrong, or background in sets that have it.
        ap: mean over the classes that occur of the average precision (scikit-learn's: no
            interpolation) of ranking all masks of the data set by their probability for the class.
            Masks are given, so unlike COCO's it says nothing of masks that were not found.
        per_class: None for classes that no mask has.
        failed: what is wrong with the photos that could not be used.
        settings: all that the figures depend on.
    """

    dataset: str
    model: str
    rival: str | None
    protocol: str
    departures: tuple[str, ...]
    variant: str
    masks: str
    photos: int
    num_masks: int
    left_out: int
    accuracy: float
    mean_accuracy: float
    miou: float
    ap: float
    per_class: dict[str, ClassFigures | None]
    failed: tuple[str, ...]
    settings: dict[str, object]

    @property
    def row(self) -> str:
        """What the figures are called in tables."""
        rival = "" if self.rival is None else f", {self.rival}"
        return f"{self.model}{rival}: {self.variant}"


class MaskTerms(NamedTuple):
    """On which terms masks are named.

    Attributes:
        model: name on its card.
        variant: what stands for a mask.
        masks: where they come from.
        settings: all that the figures depend on.
        terms: protocol and rival.
    """

    model: str
    variant: str
    masks: str
    settings: dict[str, object]
    terms: Terms = Terms()


def make_mask_report(
    dataset: SegmentationDataset, named: NamedMasks, failed: Sequence[str], how: MaskTerms
) -> MaskClassReport:
    """The figures of all photos.

    Args:
        dataset: of the photos.
        named: the masks of those that could be used.
        failed: a line for each of the others.
        how: all else.

    Raises:
        DataError: no photo could be used, or no mask counts.
    """
    if len(failed) == len(dataset.pairs):
        raise DataError(f"none of the {len(failed)} photos could be used; first: {failed[0]}")
    counts = named.truth < len(dataset.classes)
    if not counts.any():
        raise DataError(f"no mask of {dataset.name} lies on labelled pixels")
    truth = named.truth[counts]
    hits = (named.found == named.truth)[counts]
    per_class: dict[str, ClassFigures | None] = dict.fromkeys(dataset.classes)
    shares, precisions = [], []
    for k in np.unique(truth).tolist():
        is_own = truth == k
        shares.append(float(hits[is_own].mean()))
        precisions.append(float(average_precision_score(is_own, named.scores[counts, k])))
        per_class[dataset.classes[k]] = ClassFigures(
            masks=int(is_own.sum()), accuracy=_percent(shares[-1]), ap=_percent(precisions[-1])
        )
    return MaskClassReport(
        dataset=dataset.name,
        model=how.model,
        rival=how.terms.rival,
        protocol=how.terms.protocol,
        departures=tuple(how.terms.departures),
        variant=how.variant,
        masks=how.masks,
        photos=len(dataset.pairs) - len(failed),
        num_masks=len(truth),
        left_out=len(counts) - len(truth),
        accuracy=_percent(float(hits.mean())),
        mean_accuracy=_percent(float(np.mean(shares))),
        miou=_percent(mean_iou(named.matrix)),
        ap=_percent(float(np.mean(precisions))),
        per_class=per_class,
        failed=tuple(failed),
        settings={"classes_sha256": dataset.classes_sha256, **how.settings},
    )


def _percent(share: float) -> float:
    return round(100 * share, 3)


@dataclass(frozen=True)
class MaskResults:
    """All figures of an evaluation of masks.

    Attributes:
        reports: row by row, data set by data set.
        sets: columns of the table, those without results included.
        missing: a line for each data set without results.
        partial: official data sets that are not whole, and what they lack.
    """

    reports: tuple[MaskClassReport, ...]
    sets: tuple[str, ...]
    missing: tuple[str, ...] = ()
    partial: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def rows(self) -> dict[str, dict[str, MaskClassReport]]:
        """Reports by row and data set."""
        rows: dict[str, dict[str, MaskClassReport]] = {}
        for report in self.reports:
            rows.setdefault(report.row, {})[report.dataset] = report
        return rows

    def figures(self, row: str, name: str) -> dict[str, float] | None:
        """The figures of a cell of the table; None where there are none.

        Args:
            row: of the table.
            name: of a data set, or `mean`: over all of them, if all are there and whole.
        """
        by_set = self.rows[row]
        if name != "mean":
            return {key: getattr(by_set[name], key) for key in FIGURES} if name in by_set else None
        every = [self.figures(row, own) for own in self.sets]
        known = [one for one in every if one is not None]
        if len(known) < len(every) or self.partial:
            return None
        return {key: round(sum(one[key] for one in known) / len(known), 3) for key in FIGURES}


def _cells(results: MaskResults) -> list[list[str]]:
    """The table as text, head first: a row per variant, three figures for each data set."""
    head = [f"{' / '.join(FIGURES.values())}, %", *results.sets, "mean"]
    lines = []
    for row in results.rows:
        every = [results.figures(row, name) for name in (*results.sets, "mean")]
        texts = (
            "" if one is None else " / ".join(f"{one[key]:.1f}" for key in FIGURES) for one in every
        )
        lines.append([row, *texts])
    return [head, *lines]


def as_table(reports: Sequence[MaskClassReport]) -> str:
    """The figures as a Markdown table, a line for each report."""
    head = ["data set", "model", "masks", "variant", "number", "left out"]
    lines = [[*head, "accuracy", "mean accuracy", "mIoU", "AP"]]
    for report in reports:
        figures = (report.accuracy, report.mean_accuracy, report.miou, report.ap)
        name = report.model if report.rival is None else f"{report.model}, {report.rival}"
        numbers = [str(report.num_masks), str(report.left_out)]
        cells = [report.dataset, name, report.masks, report.variant, *numbers]
        lines.append([*cells, *(f"{figure:.1f}" for figure in figures)])
    return markdown(lines)


def as_document(results: MaskResults) -> dict[str, object]:
    """The results as JSON has them; specified in docs/formats.md."""
    rows = [
        {
            "name": row,
            "figures": {name: results.figures(row, name) for name in results.sets},
            "mean": results.figures(row, "mean"),
        }
        for row in results.rows
    ]
    return {
        "table": {"sets": list(results.sets), "rows": rows},
        "results": [asdict(report) for report in results.reports],
        "missing": list(results.missing),
    }


def write_mask_results(results: MaskResults, output: Path | None, json_file: Path | None) -> None:
    """Write all that is asked for: a folder, a file of figures, or nothing.

    Raises:
        DataError: a file cannot be written.
    """
    document = as_document(results)
    if json_file is not None:
        write_json(json_file, document)
    if output is None:
        return
    write_json(output / "masks.json", document)
    write_csv(output / "masks.csv", _lines(results.reports))
    write_csv(output / "masks-classes.csv", _class_lines(results.reports))
    write_bytes(output / "masks.md", _page(results).encode("utf-8", "replace"))


def _lines(reports: Sequence[MaskClassReport]) -> list[list[object]]:
    """A line for each data set and row of the table."""
    names = ["dataset", "model", "rival", "variant", "masks", "photos", "num_masks", "left_out"]
    names += ["accuracy", "mean_accuracy", "miou", "ap"]
    return [list(names), *([getattr(report, name) for name in names] for report in reports)]


def _class_lines(reports: Sequence[MaskClassReport]) -> list[list[object]]:
    """A line for each class of each data set and row; empty where a class does not occur."""
    lines: list[list[object]] = [
        ["dataset", "model", "rival", "variant", "class", "masks", "accuracy", "ap"]
    ]
    for report in reports:
        own = [report.dataset, report.model, report.rival, report.variant]
        for name, known in report.per_class.items():
            found = [0, None, None] if known is None else list(known.values())
            lines.append([*own, name, *found])
    return lines


def _page(results: MaskResults) -> str:
    """The whole evaluation in Markdown."""
    parts = ["# Mask classification\n", markdown(_cells(results)), as_table(results.reports)]
    if results.missing:
        parts.append("Not evaluated:\n" + "".join(f"\n- {line}" for line in results.missing) + "\n")
    for name in results.sets:
        of_set = [report for report in results.reports if report.dataset == name]
        if of_set:
            parts += [f"## {name}\n", _terms(of_set), _classes(of_set)]
    return "\n".join(parts)


def _terms(reports: Sequence[MaskClassReport]) -> str:
    first = reports[0]
    names = f"SHA-256 of the class names: {first.settings['classes_sha256']}"
    lines = [f"Protocol: {first.protocol}. {names}.\n"]
    departures = dict.fromkeys(line for report in reports for line in report.departures)
    if departures:
        lines.append("Departures from the protocol:\n")
        lines += [f"- {line}" for line in departures]
        lines.append("")
    if first.failed:
        lines.append(f"{len(first.failed)} photos could not be used; the first:\n")
        lines += [f"- {first.failed[0]}", ""]
    return "\n".join(lines)


def _classes(reports: Sequence[MaskClassReport]) -> str:
    lines = [["accuracy / AP, %", *(report.row for report in reports), "masks"]]
    for name, first in reports[0].per_class.items():
        every = [report.per_class[name] for report in reports]
        figures = ["" if k is None else f"{k['accuracy']:.1f} / {k['ap']:.1f}" for k in every]
        lines.append([name, *figures, "0" if first is None else str(first["masks"])])
    return markdown(lines)


def print_mask_results(results: MaskResults, *, quiet: bool) -> None:
    """Print the table, what was named, and departures; what failed or is missing on stderr."""
    if not quiet:
        _print_table(results)
    for error in dict.fromkeys(line for report in results.reports for line in report.failed):
        print(f"pixelclip: failed: {error}", file=sys.stderr)
    for name, lines in results.partial.items():
        for text in lines:
            print(f"pixelclip: not whole: {name}: {text}", file=sys.stderr)
    for reason in results.missing:
        print(f"pixelclip: not evaluated: {reason}", file=sys.stderr)


def _print_table(results: MaskResults) -> None:
    console = Console()
    table = Table("data set", "", *(f"{name} %" for name in FIGURES.values()))
    for column in table.columns[2:]:
        column.justify = "right"
    for name in (*results.sets, "mean"):
        for row in results.rows:
            found = results.figures(row, name)
            if found is not None:
                texts = (f"{value:.1f}" for value in found.values())
                table.add_row(escape(name), escape(row), *texts)
        table.add_section()
    console.print(table)
    said = [_said(report) for report in results.reports]
    departures = [
        f"{report.protocol}, {report.dataset}: {line}"
        for report in results.reports
        for line in report.departures
    ]
    if departures:
        said += ["Departures from the protocol:", *departures]
    for text in dict.fromkeys(said):
        console.print(text, highlight=False, markup=False)


def _said(report: MaskClassReport) -> str:
    left_out = f", {report.left_out} left out (mostly not labelled)" if report.left_out else ""
    return (
        f"{report.dataset}: {report.num_masks} masks ({report.masks}) of {report.photos}"
        f" photos{left_out}"
    )
