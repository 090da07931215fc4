"""Writing files so that nobody ever sees half of one."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pixelclip.errors import visible


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends without an error.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        part.open("xb").close()  # the user's own permissions apply
        permissions = part.stat().st_mode
        yield part
        part.chmod(permissions)  # some writers make the file anew, with theirs
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def printable(path: Path) -> str:
    """The path as one line that any encoder takes; bytes that are no UTF-8 are question marks."""
    return visible(os.fsencode(path).decode("utf-8", "replace"))
