"""The vocabulary report as Markdown and as pictures."""

import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from pixelclip.evaluation.vocabulary_report import ClassRow, VocabularyReport
from pixelclip.images import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 12
FONT = 7  # of the names beside points


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


def _table(
    head: Sequence[str], rows: Sequence[Sequence[object]], texts: Collection[int] = (0,)
) -> str:
    """A table; all columns but those of texts are set to the right."""
    marks = ["---" if column in texts else "---:" for column in range(len(head))]
    lines = [head, marks, *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _head(report: VocabularyReport) -> str:
    spread, near = report["spread"], report["near_misses"]
    changed = {row["label"]: row["changed"] for row in report["wordings"]}
    lines = [
        f"# Words and classes: {report['model']} on {report['dataset']}",
        f"mIoU {report['miou']:.1f} % on {report['photos']} photos. Over {spread['wordings']}"
        f" wordings of all names: mean {spread['mean']:.1f}, standard deviation"
        f" {spread['deviation']:.1f}, worst {spread['lowest']:.1f} ({spread['worst']}), best"
        f" {spread['highest']:.1f} ({spread['best']}).",
    ]
    ends = (("Worst", spread["worst"]), ("Best", spread["best"]))
    said = [f"- {end}, {label}: {_words(changed[label])}" for end, label in ends if changed[label]]
    lines += ["\n".join(said)] if said else []
    if near is not None:
        lines.append(
            f"With {len(near['names'])} near misses in the vocabulary: mIoU"
            f" {near['miou_after']:.1f}"
            f" instead of {near['miou_before']:.1f}, mean accuracy"
            f" {near['accuracy_after']:.1f} instead of {near['accuracy_before']:.1f}; they take"
            f" {near['pixels_percent']:.1f} % of the labelled pixels."
        )
    lines.append(
        f"Protocol {report['protocol']}; hash of the class names {report['classes_sha256'][:12]}."
    )
    if report["departures"]:
        lines.append("\n".join(f"- {line}" for line in report["departures"]))
    return "\n\n".join(lines)


def _words(changed: Mapping[str, str]) -> str:
    """What stands for what."""
    return ", ".join(f"{old} → {new}" for old, new in changed.items())


def _classes(report: VocabularyReport) -> str:
    correlation = report["rank_correlation"]
    said = ", ".join(
        f"{name} {'not defined' if value is None else f'{value:+.2f}'}"
        for name, value in (
            ("share of pixels", correlation["pixels_percent"]),
            ("number of photos", correlation["photos"]),
            ("median piece", correlation["piece_pixels"]),
            ("objects", correlation["object_pixels"]),
        )
    )
    head = [
        "class",
        "IoU %",
        "% of pixels",
        "photos",
        "pieces",
        "median piece, pixels",
        "size of objects, pixels",
    ]
    rows = [
        [row["name"], row["iou"], row["pixels_percent"], row["photos"], row["pieces"],
         None if row["piece_pixels"] is None else round(row["piece_pixels"]), row["object_pixels"]]
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
          _own(report, own["worst"], row["name"]), _own(report, own["best"], row["name"])]
         for row in report["classes"] if (own := row["wording"])],
        texts=(0, 6, 7),
    )  # fmt: skip
    swaps = [row for row in report["wordings"] if row["kind"] == "one synonym"]
    swaps.sort(key=lambda row: row["change"])
    chosen = swaps if len(swaps) <= 2 * SHOWN else swaps[:SHOWN] + swaps[-SHOWN:]
    third = _table(
        ["one name changed", "IoU % of the class", "mIoU %", "change"],
        [[row["label"], row["iou"], row["miou"], f"{row['change']:+.1f}"] for row in chosen],
    )
    several = [row for row in every if row["changed"]]
    lines = [f"- {row['label']}: {_words(row['changed'])}" for row in several]
    words = ["The words:", "\n".join(lines)] if lines else []
    parts = ["## Wording", first, *words, "Over all wordings that rename the class:", second]
    if not swaps:
        return "\n\n".join(parts)
    most = f", the {SHOWN} worst and the {SHOWN} best" if len(chosen) < len(swaps) else ""
    return "\n\n".join([*parts, f"One name at a time ({len(swaps)} in all{most}):", third])


def _own(report: VocabularyReport, label: str, name: str) -> str:
    """A wording, and the word that it has for a class, where the label does not say it."""
    changed = next(row["changed"] for row in report["wordings"] if row["label"] == label)
    is_said = name not in changed or label == _words(changed)
    return label if is_said else f"{changed[name]} ({label})"


def _near(report: VocabularyReport) -> str:
    if report["near_misses"] is None:
        return ""
    rows = [
        [row["name"], loss["percent"], loss["most"]]
        for row in report["classes"]
        if (loss := row["near_misses"])
    ]
    return (
        "## Near misses\n\nShare of each class's pixels that was right and is lost, and the name"
        " that takes most, right or wrong.\n\n"
        + _table(["class", "lost %", "near miss"], rows, texts=(0, 2))
        + "\n\nAdded: " + ", ".join(report["near_misses"]["names"]) + "."
    )  # fmt: skip


def _pairs(report: VocabularyReport) -> str:
    rows = [[row["true"], row["predicted"], row["percent"]] for row in report["confused"]]
    if not rows:
        return ""
    table = _table(["true", "labelled as", "% of the true class"], rows, texts=(0, 1))
    return f"## Confused\n\nThe {len(rows)} largest shares.\n\n{table}"


def write_pictures(report: VocabularyReport, folder: Path) -> list[Path]:
    """Draw IoU against frequency and size, and the spread over wordings; the files written.

    Raises:
        DataError: a file cannot be written.
    """
    from matplotlib.figure import Figure  # no pyplot: it keeps a global state

    count = sum(row["iou"] is not None for row in report["classes"])
    about = f"{report['model']} on {report['dataset']} ({report['photos']} photos)"
    written = []
    for name, title, size, draw in (
        ("frequency_and_size.png", "IoU of each class over its frequency and size",
         (13.0, 6.0), _draw_classes),
        ("wordings.png", "IoU of each class over the wordings of its name",
         (8.0, 1.7 + 0.28 * count), _draw_wordings),
    ):  # fmt: skip
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(f"{title}: {about}", fontsize=11)
        draw(figure, report)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
        write_bytes(folder / name, buffer.getvalue())
        written.append(folder / name)
    return written


def _seen(report: VocabularyReport) -> list[ClassRow]:
    return [row for row in report["classes"] if row["iou"] is not None]


def _draw_classes(figure: "Figure", report: VocabularyReport) -> None:
    from matplotlib.ticker import LogLocator

    rows, correlation = _seen(report), report["rank_correlation"]
    panels = figure.subplots(1, 2, sharey=True)
    ious = [row["iou"] or 0.0 for row in rows]
    for axes, what, key, values in (
        (panels[0], "share of the labelled pixels, %", "pixels_percent",
         [row["pixels_percent"] for row in rows]),
        (panels[1], "size of objects, pixels", "object_pixels",
         [float(row["object_pixels"] or 0) for row in rows]),
    ):  # fmt: skip
        axes.scatter(values, ious, s=18)
        axes.set(xscale="log", xlabel=what, ylim=(-4, 104), xmargin=0.12)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.xaxis.set_minor_formatter("")
        if (value := correlation[key]) is not None:
            axes.set_title(f"rank correlation {value:+.2f}", fontsize=9, color="0.3")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("IoU, %")
    figure.draw_without_rendering()  # places are known only then
    for axes, values in (
        (panels[0], [row["pixels_percent"] for row in rows]),
        (panels[1], [float(row["object_pixels"] or 0) for row in rows]),
    ):
        points = axes.transData.transform(list(zip(values, ious, strict=True))) * 72 / figure.dpi
        names = [row["name"].split(",")[0] for row in rows]
        for name, value, iou, offset in zip(names, values, ious, _offsets(points, names),
                                            strict=True):  # fmt: skip
            if offset is not None:
                axes.annotate(name, (value, iou), offset, textcoords="offset points",
                              fontsize=FONT, annotation_clip=False)  # fmt: skip


def _offsets(
    points: Float[np.ndarray, "N 2"], names: Sequence[str]
) -> list[tuple[float, float] | None]:
    """Where names stand beside their points, in points of 1/72 inch; None: there is no room."""
    taken = [(x - 2.5, y - 2.5, x + 2.5, y + 2.5) for x, y in points]
    offsets: list[tuple[float, float] | None] = []
    for (x, y), name in zip(points, names, strict=True):
        width, found = 0.56 * FONT * len(name), None
        for right, up in (
            (4, -2.5), (-4 - width, -2.5), (-width / 2, 4), (-width / 2, -4 - FONT), (3, 3),
            (3, -3 - FONT), (-3 - width, 3), (-3 - width, -3 - FONT),
        ):  # fmt: skip
            box = (x + right, y + up, x + right + width, y + up + FONT)
            if not any(
                box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken
            ):
                taken.append(box)
                found = (float(right), float(up))
                break
        offsets.append(found)
    return offsets


def _draw_wordings(figure: "Figure", report: VocabularyReport) -> None:
    axes = figure.subplots()
    rows = sorted(_seen(report), key=lambda row: row["iou"] or 0)
    places = range(len(rows))
    spreads = [row["wording"] for row in rows if row["wording"]]
    lowest, highest = [own["lowest"] for own in spreads], [own["highest"] for own in spreads]
    axes.hlines(places, lowest, highest, color="0.7", linewidth=3, label="worst to best wording")
    axes.plot([row["iou"] or 0 for row in rows], places, "o", color="C0", label="as given")
    axes.plot([own["mean"] for own in spreads], places, "|", color="black", markersize=9,
              label="mean")  # fmt: skip
    axes.set_yticks(places, [row["name"].split(",")[0] for row in rows], fontsize=8)
    axes.set(xlabel="IoU, %", xlim=(-1, 101), ylim=(-0.8, len(rows) - 0.2))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.03 - 2 / (4 + len(rows))), ncols=3,
                fontsize=8, frameon=False)  # fmt: skip
