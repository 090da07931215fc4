"""One table: a row per model or rival, a column per data set and the mean."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from pixelclip.evaluation.protocols import Published
from pixelclip.evaluation.report import NOT_WHOLE, Report, print_wide, row_name

FIGURES = {
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "boundary_iou": "boundary IoU",
    "frequency_weighted_iou": "frequency-weighted IoU",
}
NAMED = 10  # classes that do not occur


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        name: of the model, with the rival; or the published method.
        source: where the figures are from; empty: this run.
        values: in percent, as the columns; None: not evaluated, or not published.
        is_whole: none of the official data sets lacks photos.
        marked: names of data sets of which photos are not in the figure.
    """

    name: str
    source: str
    values: tuple[float | None, ...]
    is_whole: bool = True
    marked: frozenset[str] = frozenset()

    @property
    def mean(self) -> float | None:
        """Over the data sets; None where one is missing or not whole: it cannot be compared."""
        known = [value for value in self.values if value is not None]
        complete = len(known) == len(self.values) and known and self.is_whole
        return round(sum(known) / len(known), 3) if complete else None


def our_rows(
    reports: Sequence[Report],
    sets: Sequence[str],
    figure: str = "miou",
    *,
    partial: Collection[str] = (),
) -> list[Row]:
    """A row for each model and rival, in the order they come in.

    Args:
        reports: of this run.
        sets: names of the columns.
        figure: key of `FIGURES`.
        partial: names of data sets that lack photos.
    """
    rows: dict[str, dict[str, float]] = {}
    marked: dict[str, set[str]] = {}
    for report in reports:
        if not report["whole"]:
            marked.setdefault(row_name(report), set()).add(report["dataset"])
        rows.setdefault(row_name(report), {})[report["dataset"]] = report[figure]  # type: ignore[literal-required]  # a key of FIGURES
    return [
        Row(
            name,
            "",
            tuple(map(values.get, sets)),
            values.keys().isdisjoint(partial),
            frozenset(marked.get(name, ())),
        )
        for name, values in rows.items()
    ]


def published_rows(lines: Sequence[Published], sets: Sequence[str]) -> list[Row]:
    """A row for each method with a figure for one of these sets; blank where there is none."""
    rows = [Row(line.method, line.source, tuple(map(line.mious.get, sets))) for line in lines]
    return [row for row in rows if any(value is not None for value in row.values)]


def cells(rows: Sequence[Row], sets: Sequence[str]) -> list[list[str]]:
    """The table as text, head first; no mean of one set, no sources if all are from this run.

    Figures that are not of all photos have a star.
    """
    return _cells(rows, sets, 1, " *")


def csv_cells(rows: Sequence[Row], sets: Sequence[str]) -> list[list[str]]:
    """The same for programs: three digits, and a column of the sets that would have a star."""
    head, *lines = _cells(rows, sets, 3, "")
    not_whole = (" ".join(name for name in sets if name in row.marked) for row in rows)
    return [
        [*head, "not whole"],
        *([*line, names] for line, names in zip(lines, not_whole, strict=True)),
    ]


def _cells(rows: Sequence[Row], sets: Sequence[str], digits: int, star: str) -> list[list[str]]:
    has_sources = any(row.source for row in rows)
    has_mean = len(sets) > 1
    head = ["mIoU %", *sets, *(["mean"] * has_mean), *(["source"] * has_sources)]
    lines = []
    for row in rows:
        values = [*zip(row.values, sets, strict=True), *([(row.mean, "")] * has_mean)]
        figures = [
            "" if v is None else f"{v:.{digits}f}{star * (name in row.marked)}"
            for v, name in values
        ]
        lines.append([row.name, *figures, *([row.source or "this run"] if has_sources else [])])
    return [head, *lines]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its head being the first line; figures to the right."""
    safe = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    rule = [
        "---" if column == 0 or not _is_figures(safe, column) else "---:"
        for column in range(len(safe[0]))
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in (safe[0], rule, *safe[1:]))


def _is_figures(lines: Sequence[Sequence[str]], column: int) -> bool:
    return all(not line[column] or line[column][0].isdigit() for line in lines[1:])


def document(
    reports: Sequence[Report], rows: Sequence[Row], sets: Sequence[str], missing: Sequence[str]
) -> str:
    """The whole evaluation in Markdown: mIoU beside what is published, and all else per set."""
    parts = ["# Evaluation\n", markdown(cells(rows, sets))]
    if any(row.marked for row in rows):
        parts.append(f"\\{NOT_WHOLE}\n")
    parts.append(f"{kinds_of_sets(reports)}\n")
    if missing:
        parts.append("Not evaluated:\n" + "".join(f"\n- {line}" for line in missing) + "\n")
    for name in dict.fromkeys(report["dataset"] for report in reports):
        of_set = [report for report in reports if report["dataset"] == name]
        parts += [f"## {name}\n", _figures(of_set), _terms(of_set), _classes(of_set)]
    return "\n".join(part for part in parts if part)


def _figures(reports: Sequence[Report]) -> str:
    lines = [["%", *FIGURES.values(), "photos"]]
    for report in reports:
        figures = [f"{report[key]:.1f}" for key in FIGURES]  # type: ignore[literal-required]  # as above
        lines.append([row_name(report), *figures, str(report["photos"])])
    return markdown(lines)


def _terms(reports: Sequence[Report]) -> str:
    first = reports[0]
    names = f"SHA-256 of the class names: {first['settings']['classes_sha256']}"
    lines = [f"Protocol: {first['protocol']}. {names}.\n"]
    departures = dict.fromkeys(line for report in reports for line in report["departures"])
    if departures:
        lines.append("Departures from the protocol:\n")
        lines += [f"- {line}" for line in departures]
        lines.append("")
    if first["failed"]:
        count = len(first["failed"])
        lines.append(f"{count} photo{'s' * (count > 1)} could not be used; the first:\n")
        lines += [f"- {first['failed'][0]}", ""]
    return "\n".join(lines)


def _classes(reports: Sequence[Report]) -> str:
    names = [row_name(report) for report in reports]
    heads = [f"{name}: " if len(names) > 1 else "" for name in names]
    columns = [f"{head}{what} %" for head in heads for what in ("IoU", "boundary IoU")]
    lines = [["class", *columns, "pixels"]]
    absent = []
    for name, pixels in reports[0]["per_class_pixels"].items():
        pairs = [(r["per_class"][name], r["per_class_boundary_iou"][name]) for r in reports]
        figures = ["" if v is None else f"{v:.1f}" for pair in pairs for v in pair]
        if pixels:
            lines.append([name, *figures, str(pixels)])
        else:
            absent.append(name)
    return markdown(lines) + (f"\n{absent_line(absent)}\n" if absent else "")


def absent_line(names: Sequence[str]) -> str:
    """A line on the classes that do not occur."""
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    verb = "class does" if len(names) == 1 else "classes do"
    return f"{len(names)} {verb} not occur: {', '.join(names[:NAMED])}{more}."


def kinds_of_sets(reports: Sequence[Report]) -> str:
    """A line on how much stands behind each column."""
    sets = {report["dataset"]: report for report in reversed(reports)}
    said = [
        f"{name} {report['photos']} photos, {report['classes_present']} of"
        f" {len(report['per_class'])} classes"
        for name, report in reversed(sets.items())
    ]
    mean = "; each counts the same in the mean" if len(said) > 1 else ""
    return f"Photos and classes that occur: {'; '.join(said)}{mean}."


def print_table(rows: Sequence[Row], sets: Sequence[str], reports: Sequence[Report]) -> None:
    """Print the table, and what stands behind its columns."""
    head, *lines = cells(rows, sets)
    table = Table(*map(escape, head))
    for column, name in zip(table.columns, head, strict=True):
        column.justify = "left" if name in (head[0], "source") else "right"
    for line in lines:
        table.add_row(*map(escape, line))
    print_wide(table)
    if any(row.marked for row in rows):
        print(NOT_WHOLE)
    print(kinds_of_sets(reports))
