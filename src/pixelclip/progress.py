"""A progress bar with the time left, on stderr."""

import logging

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(*, quiet: bool) -> Progress:
    """A bar that shows what is done, how much there is and the time left; silent if `quiet`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet,
        transient=True,
    )


def hush(quiet: bool) -> None:
    """Keep notes, and the hub's own bars, from a user who asked for quiet."""
    if quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        logging.getLogger("pixelclip").setLevel(logging.WARNING)
        disable_progress_bars()
