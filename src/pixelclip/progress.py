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


class Ticker:
    """Lines in place of a bar where stderr is no terminal: one a minute."""

    def __init__(self, total: int, first: int, *, quiet: bool):
        self.total, self.first = total, first
        self.silent = quiet or sys.stderr.isatty()
        self.started = self.last = time.monotonic()

    def tick(self, done: int, note: str) -> None:
        """Say how much is done, and the time left, if a minute has passed."""
        now = time.monotonic()
        if self.silent or now - self.last < LINE_EVERY:
            return
        self.last = now
        left = (now - self.started) / (done - self.first) * (self.total - done)
        minutes = math.ceil(left / 60)
        log.info("%d of %d, %d min left, %s", done, self.total, minutes, note)


def hush(quiet: bool) -> None:
    """Keep notes, and the hub's own bars, from a user who asked for quiet."""
    if quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        logging.getLogger("pixelclip").setLevel(logging.WARNING)
        disable_progress_bars()
