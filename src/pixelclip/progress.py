"""A progress bar with the time left, on stderr."""

import logging
import math
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("pixelclip")

LINE_EVERY = 60.0  # seconds, where lines stand in for the bar


def progress_bar(*, quiet: bool, note: bool = False) -> Progress:
    """A bar that shows what is done, how much there is and the time left; silent if `quiet`.

    Args:
        quiet: show nothing.
        note: a text that changes stands behind the bar: the task's field `note`.
    """
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn()]  # fmt: skip
    if note:
        columns.append(TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True)


class Shown:
    """Progress of a long run: a bar, or a line a minute where stderr is no terminal."""

    def __init__(self, what: str, total: int, first: int, *, quiet: bool):
        self.total, self.first = total, first
        is_terminal = sys.stderr.isatty()
        self.has_lines = not quiet and not is_terminal
        self.bar = progress_bar(quiet=quiet or not is_terminal, note=True)
        self.task = self.bar.add_task(what, total=total, completed=first, note="")
        self.started = self.last = time.monotonic()

    def __enter__(self) -> "Shown":
        """Show it."""
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take it away."""
        self.bar.stop()

    def update(self, done: int, note: str) -> None:
        """Say how much is done, and what else is to be said."""
        self.bar.update(self.task, completed=done, note=note)
        now = time.monotonic()
        if self.has_lines and now - self.last >= LINE_EVERY:
            self.last = now
            left = (now - self.started) / max(1, done - self.first) * (self.total - done)
            minutes = math.ceil(left / 60)
            text = f"{done} of {self.total}, {minutes} min left"
            log.info("%s", f"{text}, {note}" if note else text)


def hush(quiet: bool) -> None:
    """Keep notes, and the hub's own bars, from a user who asked for quiet."""
    if quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        logging.getLogger("pixelclip").setLevel(logging.WARNING)
        disable_progress_bars()
