"""Which photos there are: files, folders, and places that fsspec knows."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeVar

from pixelclip.errors import DataError, MissingExtra, visible
from pixelclip.files import printable

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
OUR_SUFFIXES = (".labels.png", ".overlay.png", ".clusters.png", ".masks.png")
MAX_BYTES = 2**30  # of a photo that is fetched

Item = TypeVar("Item")


class Photo(NamedTuple):
    """A photo to read and the stem, relative to the output folder, of what is written for it.

    Attributes:
        path: of the file; of a photo elsewhere, its path below the place that was given.
        stem: the path below the folder without suffix, or what stands for it.
        url: where fsspec finds it; empty for a local file.
    """

    path: Path
    stem: Path
    url: str = ""

    @property
    def shown(self) -> str:
        """What the photo is called in messages and results."""
        return _printable_url(self.url) if self.url else printable(self.path)


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """So many of them, the first and the last included; all, if there are no more."""
    last, gaps = len(items) - 1, min(count, len(items)) - 1
    step = last / gaps if gaps > 0 else 0.0
    return [items[round(number * step)] for number in range(gaps + 1)]


def find_photos(paths: Sequence[Path | str]) -> list[Photo]:
    """The photos among files and folders (searched with their subfolders), sorted per folder.

    Each gets a stem of its own: where several would share one, they keep their suffix (`a.png`),
    and where that is not enough, a number follows (`a.png-2`). Hidden files and folders, and
    results of ours, are passed over. A text with `://` in it is a place for fsspec
    (`s3://bucket/photos`, `file:///data/photos`).

    Raises:
        DataError: a path does not exist or is a pipe, or a folder holds no photo.
        MissingExtra: a place needs a package that is not installed.
    """
    found: dict[str | Path, tuple[Path, Path]] = {}
    for path in paths:
        if is_remote(path):
            for url, relative in _remote(str(path)):
                found.setdefault(url, (relative, relative))
            continue
        path = Path(path)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if is_photo(p, path))
            if not inside:
                raise DataError(f"no photos in {path} (looked for {_suffixes()})")
            found |= {p: (p, p.relative_to(path)) for p in inside}
        elif path.is_file():
            found.setdefault(path, (path, Path(path.name)))
        elif path.exists():
            raise DataError(f"{printable(path)} is neither a file nor a folder")
        else:
            raise DataError(f"no such photo or folder: {path}")
    stems = [relative.with_suffix("") for _, relative in found.values()]
    shared = Counter(stems)
    taken: set[Path] = set()
    photos = []
    for (key, (path, relative)), stem in zip(found.items(), stems, strict=True):
        unique = stem if shared[stem] == 1 else relative
        number = 2
        while unique in taken:
            unique = relative.with_name(f"{relative.name}-{number}")
            number += 1
        taken.add(unique)
        photos.append(Photo(path, unique, key if isinstance(key, str) else ""))
    return photos


def is_photo(path: Path, folder: Path) -> bool:
    """Whether a file in a folder is named like a photo that a person put there."""
    return _is_named_like_photo(path.relative_to(folder)) and path.is_file()


def is_remote(path: Path | str) -> bool:
    """Whether that is a place for fsspec and not a local path."""
    return isinstance(path, str) and "://" in path


@contextmanager
def at_hand(photo: Photo) -> Iterator[Photo]:
    """The photo as a local file, for as long as the block lasts.

    Raises:
        DataError: it cannot be fetched; whatever goes wrong with the file inside the block is
            said of the photo's own place.
    """
    if not photo.url:
        yield photo
        return
    with TemporaryDirectory(prefix="pixelclip-") as folder:
        local = photo._replace(path=Path(folder) / photo.path.name, url="")
        _fetch(photo.url, local.path)
        try:
            yield local
        except DataError as error:
            raise DataError(str(error).replace(str(local.path), photo.url)) from error


def _is_named_like_photo(relative: Path) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    ours = relative.name.endswith(OUR_SUFFIXES)
    return relative.suffix.lower() in PHOTO_SUFFIXES and not hidden and not ours


def _printable_url(url: str) -> str:
    return visible(os.fsencode(url).decode("utf-8", "replace"))


def _suffixes() -> str:
    return ", ".join(sorted(PHOTO_SUFFIXES))


def _remote(url: str) -> list[tuple[str, Path]]:
    """Address and path below the place of each photo there."""
    with _reaching(url):
        from fsspec.core import url_to_fs

        system, root = url_to_fs(url)
        files = sorted(system.find(root))
        inside = []
        for file in files:
            parts = PurePosixPath(file).parts[len(PurePosixPath(root).parts) :]
            relative = Path(*parts) if parts else Path(PurePosixPath(file).name)
            if ".." not in parts and (not parts or _is_named_like_photo(relative)):
                inside.append((system.unstrip_protocol(file), relative))
    if not inside:
        raise DataError(f"no photos in {url} (looked for {_suffixes()})")
    return inside


def _fetch(url: str, path: Path) -> None:
    """Copy a photo to a local file."""
    with _reaching(url):
        from fsspec.core import url_to_fs

        system, remote = url_to_fs(url)
        if (system.size(remote) or 0) > MAX_BYTES:
            raise DataError(f"{url} is too large: the limit is {MAX_BYTES / 1e6:.0f} MB")
        system.get_file(remote, str(path))


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Whatever goes wrong with a place inside the block becomes a line on it."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        raise MissingExtra(f"{url}: {error}") from error
    except Exception as error:  # every file system of fsspec has errors of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot read {url}: {reason}") from error
