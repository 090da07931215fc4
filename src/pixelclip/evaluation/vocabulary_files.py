"""The vocabulary report as Markdown and as pictures."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pixelclip.errors import MissingExtra
from pixelclip.evaluation.vocabulary_report import ClassRow, VocabularyReport
from pixelclip.images import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 12


def check_plots() -> None:
    """Make sure that pictures can be drawn, before the work and not after it.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401  # only whether it is there
    except ImportError as error:
        raise MissingExtra(
            "pictures need matplotlib: pip install 'pixelclip[plots]', or give --no-plots"
        ) from error


def markdown(report: VocabularyReport) -> str:
    """The report as one page."""
    parts = [_head(report), _classes(report), _wordings(report), _near(report), _pairs(report)]
    for title, lines in (
        ("Left out", [f"{label}: {reason}" for label, reason in report["left_out"].items()]),
        ("Failed", report["failed"]),
    ):
        if lines:
            parts.append(f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _head(report: VocabularyReport) -> str:
    spread, near = report["spread"], report["near_misses"]
    lines = [
        f"# Words and classes: {report['model']} on {report['dataset']}",
        f"mIoU {report['miou']:.1f} % on {report['photos']} photos. Over {spread['wordings']}"
        f" wordings of all names: mean {spread['mean']:.1f}, standard deviation"
        f" {spread['deviation']:.1f}, worst {spread['lowest']:.1f} ({spread['worst']}), best"
        f" {spread['highest']:.1f} ({spread['best']}).",
    ]
    if near is not None:
        lines.append(
            f"With {len(near['names'])} near misses in the vocabulary: mIoU {near['after']:.1f}"
            f" instead of {near['before']:.1f}, mean accuracy {near['accuracy_after']:.1f} instead"
            f" of {near['accuracy_before']:.1f}; they take {near['pixels']:.1f} % of the labelled"
            " pixels."
        )
    return "\n\n".join(lines)


def _classes(report: VocabularyReport) -> str:
    correlation = report["rank_correlation"]
    said = ", ".join(
        f"{name} {'not defined' if value is None else f'{value:+.2f}'}"
        for name, value in (
            ("share of pixels", correlation["pixels"]),
            ("number of photos", correlation["photos"]),
            ("median piece", correlation["piece_area"]),
            ("objects", correlation["object_area"]),
        )
    )
    head = [
        "class",
        "IoU %",
        "% of pixels",
        "photos",
        "pieces",
        "median piece, pixels",
        "size of objects",
    ]
    rows = [
        [row["name"], row["iou"], row["pixels"], row["photos"], row["pieces"],
         None if row["piece_area"] is None else round(row["piece_area"]), row["object_area"]]
        for row in report["classes"]
    ]  # fmt: skip
    return (
        "## Frequency and size\n\nRank correlation (Spearman) of a class's IoU with its"
        f" {said}. Half of a class's pixels lie in pieces of at least the size of its objects."
        f"\n\n{_table(head, rows)}"
    )


def _wordings(report: VocabularyReport) -> str:
    every = [row for row in report["wordings"] if row["kind"] not in {"one synonym", "near misses"}]
    first = _table(
        ["all names", "mIoU %", "change"],
        [[f"`{row['label']}`" if row["kind"] == "template" else row["label"],
          row["miou"], f"{row['change']:+.1f}"] for row in every],
    )  # fmt: skip
    second = _table(
        ["class", "IoU %", "mean", "deviation", "lowest", "highest", "worst wording", "best"],
        [[row["name"], row["iou"], own["mean"], own["deviation"], own["lowest"], own["highest"],
          own["worst"], own["best"]] for row in report["classes"] if (own := row["wording"])],
    )  # fmt: skip
    swaps = [row for row in report["wordings"] if row["kind"] == "one synonym"]
    swaps.sort(key=lambda row: row["change"])
    chosen = swaps if len(swaps) <= 2 * SHOWN else swaps[:SHOWN] + swaps[-SHOWN:]
    third = _table(
        ["one name changed", "IoU % of the class", "mIoU %", "change"],
        [[row["label"], row["iou"], row["miou"], f"{row['change']:+.1f}"] for row in chosen],
    )
    parts = ["## Wording", first, second]
    return "\n\n".join([*parts, third] if swaps else parts)


def _near(report: VocabularyReport) -> str:
    if report["near_misses"] is None:
        return ""
    rows = [
        [row["name"], loss["share"], loss["most"]]
        for row in report["classes"]
        if (loss := row["near_misses"])
    ]
    return (
        "## Near misses\n\nShare of each class's pixels that was right and is lost, and the name"
        " that takes most.\n\n" + _table(["class", "lost %", "near miss"], rows)
        + "\n\nAdded: " + ", ".join(report["near_misses"]["names"]) + "."
    )  # fmt: skip


def _pairs(report: VocabularyReport) -> str:
    rows = [[row["true"], row["predicted"], row["share"]] for row in report["confused"]]
    return "## Confused\n\n" + _table(["true", "labelled as", "% of the true class"], rows)


def write_pictures(report: VocabularyReport, folder: Path) -> list[Path]:
    """Draw IoU against frequency and size, and the spread over wordings; the files written.

    Raises:
        DataError: a file cannot be written.
    """
    from matplotlib.figure import Figure  # no pyplot: it keeps a global state

    rows = [row for row in report["classes"] if row["iou"] is not None]
    title = f"{report['model']} on {report['dataset']}"
    written = []
    for name, size, draw in (
        ("frequency_and_size.png", (12.0, 5.5), _draw_classes),
        ("wordings.png", (8.0, 1.5 + 0.28 * len(rows)), _draw_wordings),
    ):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title)
        draw(figure, rows)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
        write_bytes(folder / name, buffer.getvalue())
        written.append(folder / name)
    return written


def _draw_classes(figure: "Figure", rows: Sequence[ClassRow]) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    for axes, what, values in (
        (panels[0], "share of the labelled pixels, %", [row["pixels"] for row in rows]),
        (panels[1], "size of objects, pixels", [row["object_area"] for row in rows]),
    ):
        ious = [row["iou"] for row in rows]
        axes.scatter(values, ious, s=18)
        for row, x, y in zip(rows, values, ious, strict=True):
            axes.annotate(row["name"].split(",")[0], (x, y), (3, 3), textcoords="offset points",
                          fontsize=7)  # fmt: skip
        axes.set(xscale="log", xlabel=what, ylim=(0, 100), xmargin=0.12)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("IoU, %")


def _draw_wordings(figure: "Figure", rows: Sequence[ClassRow]) -> None:
    axes = figure.subplots()
    rows = sorted(rows, key=lambda row: row["iou"] or 0)
    places = range(len(rows))
    spreads = [row["wording"] for row in rows if row["wording"]]
    lowest, highest = [own["lowest"] for own in spreads], [own["highest"] for own in spreads]
    axes.hlines(places, lowest, highest, color="0.6", linewidth=2, label="worst to best wording")
    axes.plot([own["mean"] for own in spreads], places, "|", color="C0", label="mean")
    axes.plot([row["iou"] or 0 for row in rows], places, "o", color="C0", label="as given")
    axes.set_yticks(places, [row["name"].split(",")[0] for row in rows], fontsize=8)
    axes.set(xlabel="IoU, %", xlim=(0, 100))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
