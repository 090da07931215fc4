"""Which masks get one class each: those of a source by name, or made before."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from pixelclip.errors import ConfigError, DataError
from pixelclip.files import printable
from pixelclip.images import Photograph, photo_size, resized
from pixelclip.masks.annotations import MaskReader, count_known, open_masks
from pixelclip.masks.runs import PhotoMasks
from pixelclip.masks.sources import (
    MASK_SOURCES,
    MaskSource,
    described,
    find_source,
    source_settings,
)
from pixelclip.photos import Photo


@dataclass(frozen=True)
class MadeBefore:
    """Masks that lie somewhere; goes to worker processes as it is.

    Attributes:
        reader: of the masks.
        path: where they lie.
        state: hash of the names, sizes and dates of the files there.
        folder: photos that come by their path alone are named by their path below it.
    """

    reader: MaskReader
    path: Path
    state: str
    folder: Path | None = None


Refine = str | Path | MaskSource | MaskReader | MadeBefore


def find_masks(refine: str | Path, photos: Sequence[Photo] = ()) -> str | MadeBefore:
    """The name of a mask source as it is, or the masks that lie there.

    Args:
        refine: name of a source, or path of a mask store, of files in SA-1B's layout or COCO's, or
            of label maps. A name of a source is never a path: write `./superpixels`.
        photos: all that masks will be asked for, as for `open_masks`.

    Raises:
        ConfigError: there is neither such a source nor such a path.
        DataError: what lies there holds no masks, or none of these photos.
    """
    if refine in MASK_SOURCES:
        return str(refine)
    path = Path(refine)
    if not path.exists():
        raise ConfigError(
            f"no masks at {printable(path)}; give a file or folder of masks, or one of"
            f" {', '.join(MASK_SOURCES)}"
        )
    reader = open_masks(path, photos)
    if photos and not count_known(reader, photos):
        raise DataError(f"none of the photos has masks in {printable(path)}; names must match")
    return MadeBefore(reader, path, _state(path), _folder(photos))


def is_light(refine: str | None) -> bool:
    """Whether no large model makes the masks."""
    return refine not in MASK_SOURCES or find_source(str(refine)).is_light


def check_apart(masks: str | None, output: Path | None, option: str = "--refine") -> None:
    """Make sure that results are not written among the masks, which would then be others.

    Raises:
        ConfigError: they would be.
    """
    if masks is None or masks in MASK_SOURCES or output is None:
        return
    if output.resolve().is_relative_to(Path(masks).resolve()):
        raise ConfigError(
            f"-o {printable(output)} lies among the masks of {option}; choose another folder"
        )


def _folder(photos: Sequence[Photo]) -> Path | None:
    """The folder below which all photos are named; None if there are several."""
    folders = {photo.path.parents[len(photo.stem.parts) - 1] for photo in photos if not photo.url}
    return folders.pop() if len(folders) == 1 else None


def _state(path: Path) -> str:
    """Changes when a file there is added, removed or written."""
    digest = hashlib.sha256()
    try:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                stat = file.stat()
                line = f"{file.relative_to(path)}\n{stat.st_size} {stat.st_mtime_ns}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise DataError(f"cannot read {printable(path)}: {error.strerror or error}") from error
    return digest.hexdigest()


class Refiner:
    """The masks of photos, from wherever they come.

    Args:
        refine: name of a source, a path, or what gives masks.
        device: of a source by name.

    Raises:
        ConfigError: there is neither such a source nor such a path.
        DataError: what lies there holds no masks.
        ModelError: a source's model cannot be loaded.

    Attributes:
        description: all that decides the masks of a photo, for results.
    """

    def __init__(self, refine: Refine, device: str = "auto"):
        self.description: dict[str, object]
        self.source: MaskSource | MaskReader
        self.folder: Path | None = None
        if isinstance(refine, str | Path):
            refine = find_masks(refine)
        if isinstance(refine, str):
            settings = source_settings(refine, {})
            self.source = find_source(refine).make(settings, device)
            self.description = {"source": refine, **described(settings)}
        elif isinstance(refine, MadeBefore):
            self.source, self.folder = refine.reader, refine.folder
            self.description = {"masks": printable(refine.path), "state": refine.state}
        else:
            self.source = refine
            own = getattr(refine, "settings", None)
            settings_of = described(own) if isinstance(own, BaseModel) else {}
            self.description = {"source": type(refine).__name__, **settings_of}

    def photo(self, path: Path) -> Photo:
        """The photo of a path, by the name that masks made before have for it."""
        if self.folder is not None and path.is_relative_to(self.folder):
            return Photo(path, path.relative_to(self.folder).with_suffix(""))
        return Photo(path, Path(path.stem))

    def __call__(self, image: Photograph, photo: Photo | None) -> PhotoMasks:
        """The masks of a photo.

        Args:
            image: as it was read.
            photo: by which masks made before are found; None: it has no name.

        Raises:
            DataError: there are none, or they cannot be made.
        """
        width, height = photo_size(image)
        if isinstance(self.source, MaskSource):
            return self.source([np.asarray(resized(image, (width, height)))])[0]
        if photo is None:
            raise DataError("a photo without a path has no masks made before; give its path")
        masks = self.source(photo, (height, width))
        if masks is None:
            where = self.description.get("masks", "the masks given")
            raise DataError(f"{photo.shown} has no masks in {where}")
        if (masks.height, masks.width) != (height, width):
            raise DataError(
                f"{photo.shown} has {width} x {height} pixels, its masks are of a photo of"
                f" {masks.width} x {masks.height}"
            )
        return masks
