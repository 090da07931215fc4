"""Worker processes: when they may be started, and how they end."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pixelclip.errors import ConfigError


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_threads(count: int) -> None:
    """Let torch compute with so many threads in this process, be it loaded or not.

    Results may depend on that number in the last bit: oneDNN cuts sums into as many parts.
    """
    os.environ["OMP_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(count)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Likewise, while the block lasts."""
    before = os.environ.get("OMP_NUM_THREADS")
    torch_before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else cores()
    set_threads(count)
    try:
        yield
    finally:
        set_threads(torch_before)
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def check_not_importing() -> None:
    """Make sure that this is no worker process on its way through the user's script.

    A worker that is not forked imports the main script. If that starts work as it is imported,
    each worker would begin all of it again.

    Raises:
        ConfigError: it is.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ConfigError(
            "pixelclip was called while a worker process started: put the call under"
            " if __name__ == '__main__':"
        )


def end_with_parent() -> None:
    """In a worker: leave Ctrl-C to the process that started it, and end with that.

    SIGTERM is heeded: it is how Python and PyTorch end a worker, and they wait for it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
