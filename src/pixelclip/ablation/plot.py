"""The plot of an ablation, by matplotlib: a panel for each data set and one for their mean."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pixelclip.ablation.plan import ALIASES
from pixelclip.evaluation.plots import check_plots
from pixelclip.images import write_bytes

BLUE, GREY = "#2166ac", "#8c8c8c"
LONGEST_LABEL = 44
LEAST_SPAN = 2.0  # of a panel, in points: a tenth of one is not to look like a mountain


class Bar(NamedTuple):
    """A row of the table, or several that differ in their seed.

    Attributes:
        label: of the row.
        is_baseline: whether it is the model before training.
        values: mIoU in percent, of each seed, for each panel; none where it is not known.
    """

    label: str
    is_baseline: bool
    values: list[list[float]]


class Panels(NamedTuple):
    """What is drawn.

    Attributes:
        title: of all.
        panels: title of each.
        bars: in their order.
        axis: what is varied, if it is one thing.
        is_line: whether its values are numbers, which a line joins.
    """

    title: str
    panels: Sequence[str]
    bars: Sequence[Bar]
    axis: str
    is_line: bool


def write_plot(panels: Panels, path: Path) -> None:
    """Draw the panels as a PNG and an SVG.

    Args:
        panels: what is drawn.
        path: of the files, without suffix.

    Raises:
        DataError: a file cannot be written.
        MissingExtra: matplotlib is not installed.
    """
    check_plots("--no-plot")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {
        "svg.hashsalt": "pixelclip", "axes.spines.top": False, "axes.spines.right": False,
        "font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left",
    }  # fmt: skip
    with rc_context(style):
        count = len(panels.panels)
        size = _line_size(panels) if panels.is_line else _bars_size(panels)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(panels.title, x=0.01, ha="left", fontsize=11)
        drawn = figure.subplots(1, count, squeeze=False, sharey=not panels.is_line)[0]
        for index, axes in enumerate(drawn):
            axes.set_title(panels.panels[index], color="#444444")
            (_line if panels.is_line else _bars)(axes, panels, index)
        for suffix in ("png", "svg"):
            buffer = io.BytesIO()
            # Without the date, the same figures give the same bytes.
            metadata = {"Date": None} if suffix == "svg" else {"Software": None}
            figure.savefig(buffer, format=suffix, dpi=160, metadata=metadata)
            write_bytes(path.with_suffix(f".{suffix}"), buffer.getvalue())


def _line_size(panels: Panels) -> tuple[float, float]:
    width = max(3.2, 0.08 * sum(2 + len(bar.label) for bar in panels.bars if not bar.is_baseline))
    return 1 + width * len(panels.panels), 3.4


def _bars_size(panels: Panels) -> tuple[float, float]:
    longest = max(len(_short(bar.label)) for bar in panels.bars)
    return 0.5 + 0.075 * longest + 2.6 * len(panels.panels), 1.2 + 0.32 * len(panels.bars)


def _line(axes, panels: Panels, index: int) -> None:  # type: ignore[no-untyped-def]  # an extra's
    """Values over what is varied, evenly spaced; bars of error span the seeds."""
    shown = [bar for bar in panels.bars if not bar.is_baseline]
    known = [(at, bar.values[index]) for at, bar in enumerate(shown) if bar.values[index]]
    if known:
        means = [sum(values) / len(values) for _, values in known]
        axes.plot([at for at, _ in known], means, "o-", color=BLUE, markersize=4, linewidth=1.4)
        for (at, values), mean, before in zip(known, means, [means[0], *means], strict=False):
            if len(values) > 1:
                axes.vlines(at, min(values), max(values), color=BLUE, linewidth=1)
            is_below = mean < before  # where the line comes from above
            axes.annotate(
                f"{mean:.1f}", (at, min(values) if is_below else max(values)),
                xytext=(0, -12 if is_below else 5), textcoords="offset points",
                ha="center", fontsize=8,
            )  # fmt: skip
    for bar in panels.bars:
        if bar.is_baseline and bar.values[index]:
            axes.axhline(bar.values[index][0], color=GREY, linestyle="--", linewidth=1)
            axes.annotate(
                f"{bar.label} {bar.values[index][0]:.1f}", (1, bar.values[index][0]),
                xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
                ha="right", fontsize=8, color=GREY,
            )  # fmt: skip
    axes.set_xticks(range(len(shown)), [bar.label for bar in shown])
    axes.set_xlim(-0.4, len(shown) - 0.6)
    axes.margins(y=0.25)
    low, high = axes.get_ylim()
    missing = max(0.0, LEAST_SPAN - (high - low)) / 2
    axes.set_ylim(low - missing, high + missing)
    axes.set_xlabel(_axis_title(panels.axis))
    if index == 0:
        axes.set_ylabel("mIoU %")


def _bars(axes, panels: Panels, index: int) -> None:  # type: ignore[no-untyped-def]  # an extra's
    """A bar from zero for each row, its value at the end; lines span the seeds."""
    for at, bar in enumerate(panels.bars):
        values = bar.values[index]
        if not values:
            continue
        mean = sum(values) / len(values)
        axes.barh(at, mean, height=0.62, color=GREY if bar.is_baseline else BLUE)
        if len(values) > 1:
            axes.hlines(at, min(values), max(values), color="black", linewidth=1)
        axes.annotate(
            f"{mean:.1f}", (max(values), at), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(panels.bars)), [_short(bar.label) for bar in panels.bars])
    axes.set_ylim(len(panels.bars) - 0.4, -0.6)
    axes.margins(x=0.15)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("mIoU %")


def _axis_title(name: str) -> str:
    """What is varied, by its short name too."""
    return next((f"{short} ({name})" for short, full in ALIASES.items() if full == name), name)


def _short(label: str) -> str:
    """What is long is cut in its middle: paths and combinations differ at their ends."""
    part = (LONGEST_LABEL - 3) // 2
    return label if len(label) <= LONGEST_LABEL else f"{label[:part]}...{label[-part:]}"
