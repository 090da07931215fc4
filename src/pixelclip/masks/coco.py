"""Masks of COCO's annotation files: instances (polygons or run lengths) and panoptic PNGs."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Generic, NamedTuple, TypeVar, cast

import numpy as np
from jaxtyping import Int32

from pixelclip.errors import DataError
from pixelclip.heads import png_head
from pixelclip.images import read_png
from pixelclip.masks.names import SharedNames, shared_names
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
from pixelclip.photos import Photo

MAX_COCO_BYTES = 2**29  # the largest of COCO, the instances of train2017, has 470 MB

ELSEWHERE = {"segmentation", "image_id"}  # fields that the masks and their photo say already


class InstanceEntry(NamedTuple):
    """What an instances file says about a photo.

    Attributes:
        size: height and width, if it gives them.
        segmentations: as JSON: parsed numbers take several times the memory, in every worker.
        scores: quality of each mask.
        details: the other fields of each annotation, likewise as JSON; none: they were not kept.
    """

    size: Size | None
    segmentations: bytes
    scores: list[float]
    details: bytes = b""


Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Named(Generic[Entry]):
    """What is known of photos, by their file names.

    Attributes:
        entries: per file name.
        by_last_part: the file name that ends like this, where only one does.
        shared: names that are no photo's own.
    """

    entries: dict[str, Entry]
    by_last_part: dict[str, str]
    shared: SharedNames

    def find(self, photo: Photo) -> Entry | None:
        """What is known under the path of a photo below its folder, or else under its last part."""
        for name in self.shared.paths_of(photo):
            if name in self.entries:
                return self.entries[name]
        ends = (self.by_last_part.get(name) for name in self.shared.names_of(photo))
        return next((self.entries[name] for name in ends if name is not None), None)


def _named(entries: dict[str, Entry], shared: SharedNames) -> Named[Entry]:
    last_parts = Counter(PurePosixPath(name).name for name in entries)
    ends = ((PurePosixPath(name).name, name) for name in entries)
    return Named(entries, {end: name for end, name in ends if last_parts[end] == 1}, shared)


@dataclass(frozen=True)
class CocoInstances:
    """Masks of photos by the file name that an instances file gives them.

    Attributes:
        path: of the annotation file.
        named: what it says of each photo.
    """

    path: Path
    named: Named[InstanceEntry]

    def knows(self, photo: Photo) -> bool:
        """Whether the file names the photo."""
        return self.named.find(photo) is not None

    def __call__(self, photo: Photo, size: Size) -> PhotoMasks | None:
        """The masks of a photo of this height and width; None if the file does not name it."""
        entry = self.named.find(photo)
        return None if entry is None else self._masks(entry._replace(details=b""), size)

    def with_details(self, photo: Photo, size: Size) -> PhotoMasks | None:
        """The same with the other fields of the annotations, if they were kept."""
        entry = self.named.find(photo)
        return None if entry is None else self._masks(entry, size)

    def _masks(self, entry: InstanceEntry, size: Size) -> PhotoMasks:
        check_size(entry.size or size, size, self.path)
        segmentations = cast(list[object], parse_json(entry.segmentations, self.path))
        details = cast(
            list[dict[str, object]] | None, parse_json(entry.details or b"null", self.path)
        )
        return masks_of(segmentations, entry.scores, size, self.path, details=details)


@dataclass(frozen=True)
class CocoPanoptic:
    """Masks of photos by the file name that a panoptic file gives them.

    Attributes:
        path: of the annotation file.
        named: per photo the name of its PNG, which lies beside the file or in a folder named
            like the file.
    """

    path: Path
    named: Named[str]

    def knows(self, photo: Photo) -> bool:
        """Whether the file names the photo."""
        return self.named.find(photo) is not None

    def __call__(self, photo: Photo, size: Size) -> PhotoMasks | None:
        """The masks of a photo of this height and width; None if the file does not name it."""
        name = self.named.find(photo)
        if name is None:
            return None
        path = self._find(name)
        return from_labels(_read_segments(path, size), ignore=(0,))

    def _find(self, name: str) -> Path:
        """The PNG of that name; a name that leads out of the folder is refused."""
        parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
        leads_out = ".." in parts or name.startswith(("/", "\\")) or PureWindowsPath(name).drive
        folders = (self.path.parent, self.path.with_suffix(""))
        is_none = leads_out or not PurePosixPath(name).name
        path = None if is_none else first_file(folder / name for folder in folders)
        if path is None:
            raise DataError(
                f"{self.path} names the PNG {name[:80]!r}, which is neither beside it nor in"
                f" {folders[1]}"
            )
        return path


def open_coco(
    path: Path, photos: Sequence[Photo] = (), *, details: bool = False
) -> CocoInstances | CocoPanoptic:
    """The reader of a COCO annotation file for these photos.

    Args:
        path: of the file.
        photos: all that masks will be asked for.
        details: keep the other fields of instances for `with_details`.

    Raises:
        DataError: it is none, or gives one identity to several photos.
    """
    document = read_json(path, max_bytes=MAX_COCO_BYTES)
    images = records(document, "images", path)
    annotations = records(document, "annotations", path)
    by_image: dict[object, list[dict[str, object]]] = defaultdict(list)
    for annotation in annotations:
        by_image[_key(annotation.get("image_id"))].append(annotation)
    named = _by_file_name(images, by_image, path)
    shared = shared_names(photos)
    if any("segments_info" in annotation for annotation in annotations):
        files = {
            name: file
            for name, (_, own) in named.items()
            if own and isinstance(file := own[0].get("file_name"), str)
        }
        return CocoPanoptic(path, _named(files, shared))
    entries = {name: _entry(image, own, path, details) for name, (image, own) in named.items()}
    return CocoInstances(path, _named(entries, shared))


def _by_file_name(
    images: Sequence[dict[str, object]],
    by_image: Mapping[object, list[dict[str, object]]],
    path: Path,
) -> dict[str, tuple[dict[str, object], list[dict[str, object]]]]:
    """Per file name the image and the annotations of all images of that name.

    Raises:
        DataError: none has a name, or several names have one identity.
    """
    names: dict[object, str] = {}
    named: dict[str, tuple[dict[str, object], list[dict[str, object]]]] = {}
    for image in images:
        name, key = image.get("file_name"), _key(image.get("id"))
        if not isinstance(name, str) or key is None or names.get(key) == name:
            continue
        if key in names:
            raise DataError(
                f"{path} gives the id {key!r} to two photos, {names[key][:80]!r} and {name[:80]!r}"
            )
        names[key] = name
        first, own = named.get(name, (image, []))
        named[name] = first, own + by_image.get(key, [])
    if not named:
        raise DataError(f"{path} names no photo: its 'images' need an 'id' and a 'file_name'")
    return named


def _key(identity: object) -> int | str | None:
    """An image's identity if it is one: a list, say, cannot be looked up. 7.0 is 7."""
    if isinstance(identity, float) and identity.is_integer():
        return int(identity)
    if isinstance(identity, bool):
        return None
    return identity if isinstance(identity, int | str) else None


def _entry(
    image: dict[str, object], annotations: list[dict[str, object]], path: Path, details: bool
) -> InstanceEntry:
    segmentations = [annotation.get("segmentation") for annotation in annotations]
    others = [
        {key: value for key, value in annotation.items() if key not in ELSEWHERE}
        for annotation in annotations
    ]
    return InstanceEntry(
        size=frame(image),
        segmentations=_json(segmentations, path),
        scores=[quality(annotation) for annotation in annotations],
        details=_json(others, path) if details else b"",
    )


def _json(values: object, path: Path) -> bytes:
    try:
        return json.dumps(values, separators=(",", ":")).encode()
    except RecursionError as error:  # the encoder may reach less deep than the parser did
        raise DataError(f"{path} is nested too deeply") from error


def _read_segments(path: Path, size: Size) -> Int32[np.ndarray, "H W"]:
    """The segment of each pixel of a panoptic PNG: red + 256 green + 65536 blue."""
    head = png_head(path)
    check_size((head.height, head.width), size, path)  # before a huge one is decoded
    no_colours = "is no panoptic PNG: its pixels are not RGB of 8 bits"
    if head.depth != 8:
        raise DataError(f"{path} {no_colours}")
    pixels = read_png(path, {"RGB"}, no_colours)
    segments = pixels[..., 2].astype(np.int32)
    for channel in (1, 0):
        segments *= 256
        segments += pixels[..., channel]
    return segments
