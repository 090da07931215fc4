"""What a photo is called where its masks are kept."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from urllib.parse import quote_from_bytes

from pixelclip.photos import Photo


def relative_path(photo: Photo) -> Path:
    """The path of a photo below its folder, with its suffix."""
    return photo.stem.with_name(photo.path.name)


def photo_name(photo: Photo) -> str:
    """What a photo is called in a store: its path below its folder, parts joined by `/`.

    Of photos from several folders with one such path, the second and later ones have a number
    (`a.jpg-2`, by `find_photos`). A name that is not UTF-8 is percent-encoded after a `/`, which
    no other name begins with.
    """
    is_numbered = photo.stem.name.startswith(f"{photo.path.name}-")
    name = (photo.stem if is_numbered else relative_path(photo)).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        return f"/{quote_from_bytes(os.fsencode(name))}"
    return name


@dataclass(frozen=True)
class SharedNames:
    """Names that several photos of a run have, so that none of them is found by it.

    Attributes:
        paths: paths below the photos' folders, with and without suffix.
        names: last parts of the paths, with and without suffix.
    """

    paths: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()

    def paths_of(self, photo: Photo) -> list[str]:
        """Path of a photo below its folder, with and without suffix, as far as it is its own."""
        path = relative_path(photo)
        return [name for name in _with_and_without(path) if name not in self.paths]

    def names_of(self, photo: Photo) -> list[str]:
        """Last part of that path, with and without suffix, as far as it is its own."""
        path = PurePath(photo.path.name)
        return [name for name in _with_and_without(path) if name not in self.names]


def shared_names(photos: Sequence[Photo]) -> SharedNames:
    """The names that several of the photos have."""
    return SharedNames(
        paths=_shared(relative_path(photo) for photo in photos),
        names=_shared(PurePath(photo.path.name) for photo in photos),
    )


def shared_files(photos: Sequence[Photo]) -> SharedNames:
    """The same for files beside the photos: of neighbours only."""
    return SharedNames(paths=_shared(photo.path for photo in photos))


def _shared(paths: Iterable[PurePath]) -> frozenset[str]:
    counts = Counter(name for path in paths for name in set(_with_and_without(path)))
    return frozenset(name for name, count in counts.items() if count > 1)


def _with_and_without(path: PurePath) -> tuple[str, str]:
    return path.as_posix(), path.with_suffix("").as_posix()
