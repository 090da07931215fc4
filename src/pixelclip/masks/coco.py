"""Masks of COCO's annotation files: instances (polygons or run lengths) and panoptic PNGs."""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple, TypeVar, cast

import numpy as np
from jaxtyping import Int32

from pixelclip.errors import DataError
from pixelclip.images import Photo, load_photo
from pixelclip.masks.records import (
    Size,
    check_size,
    first_file,
    frame,
    masks_of,
    parse_json,
    quality,
    read_json,
    records,
)
from pixelclip.masks.runs import PhotoMasks, from_labels

MAX_COCO_BYTES = 2**29  # the largest of COCO, the instances of train2017, has 470 MB


class InstanceEntry(NamedTuple):
    """What an instances file says about a photo.

    Attributes:
        size: height and width, if it gives them.
        segmentations: as JSON: parsed numbers take several times the memory, in every worker.
        scores: quality of each mask.
    """

    size: Size | None
    segmentations: bytes
    scores: list[float]


@dataclass(frozen=True)
class CocoInstances:
    """Masks of photos by the file name that an instances file gives them.

    Attributes:
        path: of the annotation file.
        entries: per file name.
    """

    path: Path
    entries: dict[str, InstanceEntry]

    def __call__(self, photo: Photo, size: Size) -> PhotoMasks | None:
        """The masks of a photo of this height and width; None if the file does not name it."""
        entry = _of_photo(self.entries, photo)
        if entry is None:
            return None
        check_size(entry.size or size, size, self.path)
        segmentations = cast(list[object], parse_json(entry.segmentations, self.path))
        return masks_of(segmentations, entry.scores, size, self.path)


@dataclass(frozen=True)
class CocoPanoptic:
    """Masks of photos by the file name that a panoptic file gives them.

    Attributes:
        path: of the annotation file.
        entries: per file name the name of its PNG, which lies beside the file or in a folder
            named like the file.
    """

    path: Path
    entries: dict[str, str]

    def __call__(self, photo: Photo, size: Size) -> PhotoMasks | None:
        """The masks of a photo of this height and width; None if the file does not name it."""
        name = _of_photo(self.entries, photo)
        if name is None:
            return None
        path = self._find(name)
        segments = _read_segments(path)
        check_size(segments.shape, size, path)
        return from_labels(segments, ignore=(0,))

    def _find(self, name: str) -> Path:
        """The PNG of that name; a name that leads out of the folder is refused."""
        parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
        leads_out = ".." in parts or name.startswith(("/", "\\")) or PureWindowsPath(name).drive
        folders = (self.path.parent, self.path.with_suffix(""))
        path = None if leads_out else first_file(folder / name for folder in folders)
        if path is None:
            raise DataError(
                f"{self.path} names the PNG {name[:80]!r}, which is neither beside it nor in"
                f" {folders[1]}"
            )
        return path


def open_coco(path: Path) -> CocoInstances | CocoPanoptic:
    """The reader of a COCO annotation file.

    Raises:
        DataError: it is none.
    """
    document = read_json(path, max_bytes=MAX_COCO_BYTES)
    images = records(document, "images", path)
    annotations = records(document, "annotations", path)
    by_image: dict[object, list[dict[str, object]]] = defaultdict(list)
    for annotation in annotations:
        by_image[_key(annotation.get("image_id"))].append(annotation)
    named = {
        name: (image, by_image[key])
        for image in images
        if isinstance(name := image.get("file_name"), str)
        and (key := _key(image.get("id"))) is not None
    }
    if not named:
        raise DataError(f"{path} names no photo: its 'images' need an 'id' and a 'file_name'")
    if any("segments_info" in annotation for annotation in annotations):
        files = {
            name: file
            for name, (_, own) in named.items()
            if own and isinstance(file := own[0].get("file_name"), str)
        }
        return CocoPanoptic(path, _with_base_names(files))
    entries = {name: _entry(image, own, path) for name, (image, own) in named.items()}
    return CocoInstances(path, _with_base_names(entries))


def _key(identity: object) -> int | str | None:
    """An image's identity if it is one; a list, say, cannot be looked up."""
    return identity if isinstance(identity, int | str) else None


def _entry(
    image: dict[str, object], annotations: list[dict[str, object]], path: Path
) -> InstanceEntry:
    segmentations = [annotation.get("segmentation") for annotation in annotations]
    try:
        text = json.dumps(segmentations, separators=(",", ":")).encode()
    except RecursionError as error:  # the encoder may reach less deep than the parser did
        raise DataError(f"{path} is nested too deeply") from error
    return InstanceEntry(frame(image), text, [quality(annotation) for annotation in annotations])


Entry = TypeVar("Entry")


def _with_base_names(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The entries also under the last part of their names, where only one has it."""
    shared = Counter(PurePosixPath(name).name for name in entries)
    short = {PurePosixPath(name).name: entry for name, entry in entries.items()}
    return {name: entry for name, entry in short.items() if shared[name] == 1} | entries


def _of_photo(entries: dict[str, Entry], photo: Photo) -> Entry | None:
    """What is known under the name of a photo below its folder, or else under its file's."""
    stem = photo.stem.as_posix()
    names = (f"{stem}{photo.path.suffix}", stem, photo.path.name)
    return next((entries[name] for name in names if name in entries), None)


def _read_segments(path: Path) -> Int32[np.ndarray, "H W"]:
    """The segment of each pixel of a panoptic PNG: red + 256 green + 65536 blue."""
    image = load_photo(path)
    if image.mode != "RGB":
        raise DataError(f"{path} is no panoptic PNG: its pixels are not RGB")
    red, green, blue = np.moveaxis(np.asarray(image, dtype=np.int32), 2, 0)
    return red + 256 * green + 65536 * blue
