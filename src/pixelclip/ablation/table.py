"""The table of an ablation: JSON with everything, CSV and Markdown."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple, cast

from pixelclip.ablation.plot import Bar, Panels, write_plot
from pixelclip.images import write_bytes

FIGURES = ("miou", "pixel_accuracy", "mean_accuracy", "boundary_iou")
SEED = "seed"


class Result(NamedTuple):
    """What became of a cell.

    Attributes:
        label: of the row.
        row: its name in the plan, if it has one.
        values: what is varied, by name.
        run: name of its run directory.
        is_baseline: whether it is the model before training.
        figures: in percent, by data set and figure; what is not there yet is missing.
        training: steps, last loss, clusters in use, seconds.
        error: why there are no figures.
        note: what else to know.
        is_new: whether anything was done now.
        stopped: whether it was interrupted.
    """

    label: str
    row: str
    values: Mapping[str, object]
    run: str = ""
    is_baseline: bool = False
    figures: dict[str, dict[str, float]] = {}  # noqa: RUF012 - a default that is not written to
    training: Mapping[str, object] = {}
    error: str = ""
    note: str = ""
    is_new: bool = False
    stopped: bool = False

    def miou(self, dataset: str) -> float | None:
        """On a data set, if it is known."""
        return self.figures.get(dataset, {}).get("miou")


class Table(NamedTuple):
    """All cells of an ablation.

    Attributes:
        title: one line.
        datasets: their names.
        photos: their numbers of photos.
        rows: cells in the plan's order.
        plan: all that was asked for.
        stopped: whether it was interrupted.
    """

    title: str
    datasets: tuple[str, ...]
    photos: tuple[int, ...]
    rows: tuple[Result, ...]
    plan: Mapping[str, object]
    stopped: bool = False

    @property
    def failed(self) -> list[Result]:
        """Cells without figures, or with figures of fewer photos than there are."""
        return [row for row in self.rows if row.error or row.note]

    def mean(self, row: Result) -> float | None:
        """Mean mIoU over the data sets, once all are known."""
        known = [miou for name in self.datasets if (miou := row.miou(name)) is not None]
        return sum(known) / len(known) if len(known) == len(self.datasets) else None


def write_table(table: Table, out: Path, *, plot: bool = True) -> None:
    """Write `table.json`, `table.csv`, `table.md`, and `plot.png` and `plot.svg`.

    Nothing is drawn before there is a figure beside those of the model before training.

    Raises:
        DataError: a file cannot be written.
        MissingExtra: matplotlib is not installed.
    """
    write_bytes(out / "table.json", _json(table).encode())
    write_bytes(out / "table.csv", _csv(table).encode())
    write_bytes(out / "table.md", markdown(table).encode())
    if plot and any(row.figures for row in table.rows if not row.is_baseline):
        write_plot(panels(table), out / "plot")


def _json(table: Table) -> str:
    rows = [
        {
            "label": row.label,
            "values": dict(row.values),
            "run": row.run,
            "mean_miou": _rounded(table.mean(row)),
            "figures": row.figures,
            "training": dict(row.training),
            "error": row.error,
            "note": row.note,
        }
        for row in table.rows
    ]
    sets = dict(zip(table.datasets, table.photos, strict=True))
    document = {"title": table.title, "photos": sets, "rows": rows, "plan": dict(table.plan)}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _csv(table: Table) -> str:
    names = list(dict.fromkeys(name for row in table.rows for name in row.values))
    head = ["label", *names, "mean_miou"]
    head += [f"{dataset}_{figure}" for dataset in table.datasets for figure in FIGURES]
    head += ["loss", "used_clusters", "seconds", "error", "note"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    for row in table.rows:
        figures = [row.figures.get(d, {}).get(f) for d in table.datasets for f in FIGURES]
        training = [row.training.get(name) for name in ("loss", "used_clusters", "seconds")]
        said = [row.error, row.note]
        values = [row.values.get(name) for name in names]
        writer.writerow([row.label, *values, _rounded(table.mean(row)), *figures, *training, *said])
    return buffer.getvalue()


def markdown(table: Table) -> str:
    """The table for people: mIoU per data set, what is missing, and how it was made."""
    several = len(table.datasets) > 1
    head = ["mIoU %", *table.datasets, *(["mean"] if several else [])]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in table.rows:
        figures = [row.miou(dataset) for dataset in table.datasets]
        figures += [table.mean(row)] if several else []
        lines.append([row.label, *("" if f is None else f"{f:.2f}" for f in figures)])
    return f"# {table.title}\n\n{_lines(lines)}{_over_seeds(table)}\n{_notes(table)}"


def _over_seeds(table: Table) -> str:
    """Mean and standard deviation (of n - 1) of rows that differ in their seed."""
    if all(SEED not in row.values for row in table.rows):
        return ""
    shown = panels(table)
    lines = [["mIoU % over seeds", *shown.panels], ["---", *["---:"] * len(shown.panels)]]
    name = f"{shown.axis}=" if shown.is_line else ""
    lines += [
        [bar.label if bar.is_baseline else name + bar.label, *map(_spread, bar.values)]
        for bar in shown.bars
    ]
    return f"\n{_lines(lines)}"


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values)
    return f"{mean(values):.2f} ± {stdev(values):.2f} ({len(values)})"


def _lines(lines: Sequence[Sequence[str]]) -> str:
    return "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines
    )


def _notes(table: Table) -> str:
    plan = table.plan
    some = ", evenly spaced" if plan.get("photos") else ""
    sets = ", ".join(
        f"{name} ({photos} photos{some})"
        for name, photos in zip(table.datasets, table.photos, strict=True)
    )
    notes = [
        f"From {plan['model']}; evaluated on {sets}, protocol {plan['protocol']}. All settings:"
        " `table.json`, `runs/*/run.json`."
    ]
    if all(SEED not in row.values for row in table.rows):
        notes.append("One seed: `--vary seed=0,1,2` tells differences from chance.")
    notes += [f"Failed: {row.label}: {row.error}" for row in table.rows if row.error]
    notes += [f"{row.label}: {row.note}" for row in table.rows if row.note]
    notes += [f"Still to do: {todo}."] if (todo := _to_do(table)) else []
    return "".join(f"- {note}\n" for note in notes)


def _to_do(table: Table) -> str:
    todo = sum(not row.figures and not row.error for row in table.rows)
    return f"{todo} of {len(table.rows)} rows" if todo else ""


def panels(table: Table) -> Panels:
    """What the plot shows: a value for each row, seeds together, in each panel."""
    adapted = [row for row in table.rows if not row.is_baseline]
    names = dict.fromkeys(name for row in adapted for name in row.values if name != SEED)
    is_axis = len(names) == 1 and not any(row.row for row in adapted)
    axis = next(iter(names)) if is_axis else ""
    is_line = is_axis and all(_is_number(row.values[axis]) for row in adapted)
    rows = [row for row in table.rows if row.is_baseline]
    # A line goes from the lowest number to the highest, however they were given.
    rows += sorted(adapted, key=lambda row: cast(float, row.values[axis])) if is_line else adapted
    groups: dict[str, list[Result]] = {}
    for row in rows:
        own = _without_seed(row)
        own = own.removeprefix(f"{axis}=") if is_line and not row.is_baseline else own
        groups.setdefault(own, []).append(row)
    bars = [
        Bar(name, is_baseline=rows[0].is_baseline, values=_values(table, rows))
        for name, rows in groups.items()
    ]
    titles = [
        f"{name} ({photos} photos)"
        for name, photos in zip(table.datasets, table.photos, strict=True)
    ]
    return Panels(
        title=f"{table.title} ({todo} to do)" if (todo := _to_do(table)) else table.title,
        panels=[*titles, *(["mean"] if len(titles) > 1 else [])],
        bars=bars,
        axis=axis,
        is_line=is_line,
    )


def _without_seed(row: Result) -> str:
    return ", ".join(part for part in row.label.split(", ") if not part.startswith(f"{SEED}="))


def _values(table: Table, rows: Sequence[Result]) -> list[list[float]]:
    """For each panel the known values of rows that differ in their seed."""
    found = [[row.miou(name) for row in rows] for name in table.datasets]
    if len(table.datasets) > 1:
        found.append([table.mean(row) for row in rows])
    return [[value for value in panel if value is not None] for panel in found]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
