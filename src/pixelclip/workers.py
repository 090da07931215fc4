"""Worker processes: when they may be started, and how they end."""

import multiprocessing
import os
import signal
import threading

from pixelclip.errors import ConfigError


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
