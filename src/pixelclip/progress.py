"""A progress bar with the time left, on stderr."""

import logging
import math
import sys
import time
from threading import Event, Thread

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("pixelclip")

FIRST_LINE, LINE_EVERY = 10.0, 60.0  # seconds, where lines stand in for the bar


def progress_bar(*, quiet: bool, note: bool = False) -> Progress:
    """A bar that shows what is done, how much there is and the time left, on a terminal.

    Elsewhere it would leave empty lines behind, so it is silent, as it is if `quiet`.

    Args:
        quiet: show nothing.
        note: a text that changes stands behind the bar instead of the time left: the task's field
            `note`.
    """
    last = TextColumn("{task.fields[note]}") if note else TimeRemainingColumn()
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), last]
    console = Console(stderr=True)
    is_shown = not quiet and sys.stderr.isatty()
    return Progress(*columns, console=console, disable=not is_shown, transient=True)


class Shown:
    """Progress of a long run: a bar, or a line now and then where stderr is no terminal.

    The first line comes after ten seconds, also if nothing is done by then; the time between two
    doubles up to a minute.
    """

    def __init__(self, what: str, total: int, first: int, *, quiet: bool, unit: str = "steps"):
        self.what, self.total, self.first, self.unit = what, total, first, unit
        self.done, self.note = first, ""
        self.measured: tuple[float, int] | None = None  # when the first new ones were done
        is_terminal = sys.stderr.isatty()
        self.has_lines = not quiet and not is_terminal
        self.bar = progress_bar(quiet=quiet, note=True)
        self.task = self.bar.add_task(what, total=total, completed=first, note=unit)
        self.ended = Event()
        self.lines = Thread(target=self._say_lines, daemon=True)

    def __enter__(self) -> "Shown":
        """Show it."""
        self.bar.start()
        if self.has_lines:
            self.lines.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take it away."""
        self.bar.stop()
        self.ended.set()
        if self.has_lines:
            self.lines.join()

    def update(self, done: int, note: str) -> None:
        """Say how much is done, and what else is to be said."""
        self.done, self.note = done, note
        if self.measured is None and done > self.first:
            self.measured = time.monotonic(), done - self.first
        self.bar.update(self.task, completed=done, note=f"{self.unit}{self._rest()}")

    def seconds_left(self) -> float | None:
        """Time left by that of what was done in this run after its first; None: not known yet.

        What came before the first is the start, which is not repeated.
        """
        if self.measured is None:
            return None
        since, first = self.measured
        new = self.done - self.first - first
        return (time.monotonic() - since) / new * (self.total - self.done) if new > 0 else None

    def _rest(self) -> str:
        left = self.seconds_left()
        said = [] if left is None else [f"{math.ceil(left / 60)} min left"]
        return "".join(f", {text}" for text in [*said, self.note] if text)

    def _say_lines(self) -> None:
        pause = FIRST_LINE
        while not self.ended.wait(pause):
            pause = min(LINE_EVERY, 2 * pause)
            done = f"{self.done} of {self.total} {self.unit}"
            log.info("%s: %s%s", self.what, done, self._rest())


def hush(quiet: bool) -> None:
    """Keep notes, and the hub's own bars, from a user who asked for quiet."""
    if quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        logging.getLogger("pixelclip").setLevel(logging.WARNING)
        disable_progress_bars()
