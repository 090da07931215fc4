"""What a job is made of."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from pixelclip.photos import Photo


class Piece(NamedTuple):
    """Photos that are done together.

    Attributes:
        number: of the piece in its job.
        photos: at least one.
    """

    number: int
    photos: tuple[Photo, ...]


class Outcome(NamedTuple):
    """What became of a photo.

    Attributes:
        photo: as it stands in the piece.
        error: one line; empty if all went well.
        is_new: whether it was done now, and not in an earlier run.
    """

    photo: Photo
    error: str = ""
    is_new: bool = True


Do = Callable[[Piece], Iterator[Outcome]]


@runtime_checkable
class Work(Protocol):
    """What a job does; goes to worker processes as it is and is started once in each."""

    def start(self) -> Do:
        """A function that does a piece; it gives an outcome per photo, in any order."""
        ...


def cut(photos: Sequence[Photo], size: int, first: int = 0) -> list[Piece]:
    """Pieces of that many photos, numbered from `first`."""
    starts = range(0, len(photos), size)
    return [Piece(first + i, tuple(photos[at : at + size])) for i, at in enumerate(starts)]
