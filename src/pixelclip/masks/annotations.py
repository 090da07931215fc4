"""Masks that lie beside photos; what kind they are is told by looking."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from pixelclip.errors import DataError
from pixelclip.images import Photo, read_labels
from pixelclip.masks.coco import open_coco
from pixelclip.masks.records import (
    Size,
    check_size,
    first_file,
    frame,
    masks_of,
    quality,
    read_json,
    records,
)
from pixelclip.masks.runs import PhotoMasks, from_labels
from pixelclip.masks.store import MANIFEST, MaskStore

MAX_PHOTO_BYTES = 2**26  # of the annotations of one photo; SA-1B's have about 0.5 MB
KINDS = (
    "a mask store, a folder with SA-1B's STEM.json per photo, a folder with a label map STEM.png"
    " per photo, or a COCO instances or panoptic JSON file"
)


@runtime_checkable
class MaskReader(Protocol):
    """Where the masks of photos come from; goes to worker processes as it is."""

    def __call__(self, photo: Photo, size: Size) -> PhotoMasks | None:
        """The masks of a photo of this height and width when upright; None if it has none.

        Raises:
            DataError: its annotations are damaged, or are those of another photo.
        """
        ...


def open_masks(path: Path | None = None) -> MaskReader:
    """The reader of masks in a file or folder; without one, of the JSON beside each photo.

    Raises:
        DataError: there is nothing, or nothing known, at that path.
    """
    if path is None:
        return PhotoJson(None)
    if path.is_file():
        return open_coco(path)
    if not path.is_dir():
        raise DataError(f"no masks at {path}: no such file or folder; accepted: {KINDS}")
    if (path / MANIFEST).is_file():
        return MaskStore(path)
    has_maps = False
    for file in path.rglob("*"):
        if file.suffix == ".json":
            return PhotoJson(path)
        has_maps = has_maps or file.suffix == ".png"
    if has_maps:
        return LabelMaps(path)
    raise DataError(f"no masks in {path}; accepted: {KINDS}")


@dataclass(frozen=True)
class PhotoJson:
    """Masks in one JSON file per photo, as SA-1B has them.

    Attributes:
        folder: with `STEM.json`, the stem with or without the photo's subfolders; None: the file
            lies beside the photo.
    """

    folder: Path | None

    def __call__(self, photo: Photo, size: Size) -> PhotoMasks | None:
        """The masks of a photo of this height and width; None without a file."""
        path = _find(self.folder, photo, ".json")
        if path is None:
            return None
        document = read_json(path, max_bytes=MAX_PHOTO_BYTES)
        annotations = records(document, "annotations", path)
        image = document.get("image")
        found = frame(image) if isinstance(image, dict) else None
        check_size(found or size, size, path)
        segmentations = [annotation.get("segmentation") for annotation in annotations]
        return masks_of(segmentations, [quality(a) for a in annotations], size, path)


@dataclass(frozen=True)
class LabelMaps:
    """Masks in one PNG of 8 or 16 bits per photo: every value is a mask.

    255, or 65535 in a map with values above 255, is no mask, as in label maps of ours.

    Attributes:
        folder: with `STEM.png`, the stem with or without the photo's subfolders.
    """

    folder: Path

    def __call__(self, photo: Photo, size: Size) -> PhotoMasks | None:
        """The masks of a photo of this height and width; None without a file."""
        path = _find(self.folder, photo, ".png")
        if path is None:
            return None
        check_size(_png_size(path), size, path)  # before a huge one is decoded
        labels = read_labels(path)
        return from_labels(labels, ignore=(255 if labels.max() <= 255 else 65535,))


def _find(folder: Path | None, photo: Photo, suffix: str) -> Path | None:
    """The annotation file of a photo: in the folder by stem or file name, or beside the photo."""
    beside = f"{photo.path.stem}{suffix}"
    if folder is None:
        paths = [photo.path.with_name(beside)]
    else:
        paths = [folder / f"{photo.stem.as_posix()}{suffix}", folder / beside]
    return first_file(paths)


def _png_size(path: Path) -> Size:
    """Height and width according to the header of a PNG.

    Raises:
        DataError: it is no PNG.
    """
    try:
        with path.open("rb") as file:
            signature, width, height = struct.unpack(">8s8x2I", file.read(24))
    except (OSError, struct.error) as error:
        raise DataError(f"cannot read label map {path}: {error}") from error
    if signature != b"\x89PNG\r\n\x1a\n":
        raise DataError(f"{path} is not a PNG")
    return height, width
