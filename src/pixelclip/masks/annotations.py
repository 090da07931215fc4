"""Masks that lie beside photos; what kind they are is told by looking."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath, PureWindowsPath
from typing import Protocol, runtime_checkable

from pixelclip.errors import DataError
from pixelclip.heads import png_head
from pixelclip.images import read_indices
from pixelclip.masks.coco import open_coco
from pixelclip.masks.details import without_counts
from pixelclip.masks.names import SharedNames, shared_files, shared_names
from pixelclip.masks.records import (
    MAX_ANNOTATIONS,
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
from pixelclip.photos import Photo, evenly_spaced

MAX_PHOTO_BYTES = 2**24  # of the annotations of one photo; SA-1B's have about 0.5 MB
MAX_LOOKED_UP = 1000
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


@runtime_checkable
class KnowsPhotos(Protocol):
    """A reader that can tell quickly which photos it has something about; all of ours do."""

    def knows(self, photo: Photo) -> bool:
        """Whether the photo is annotated, be it with damage."""
        ...


@runtime_checkable
class KnowsDetails(Protocol):
    """A reader that can tell more of masks than their pixels."""

    def with_details(self, photo: Photo, size: Size) -> PhotoMasks | None:
        """The masks, as the reader gives them, with `details` and `document` where it has any."""
        ...


def open_masks(
    path: Path | None = None, photos: Sequence[Photo] = (), *, details: bool = False
) -> MaskReader:
    """The reader of masks in a file or folder; without one, of the JSON beside each photo.

    Args:
        path: of the file or folder.
        photos: all that masks will be asked for. A name that several of them share is then
            nobody's, and the kind of a folder is told by their names, whatever else lies there.
        details: keep those of a COCO instances file, for `with_details`; they take a quarter more
            memory. Other readers look them up.

    Raises:
        DataError: there is nothing, or nothing known, at that path.
    """
    if path is None:
        return PhotoJson(None, shared_files(photos))
    if path.is_file():
        return open_coco(path, photos, details=details)
    if not path.is_dir():
        raise DataError(f"no masks at {path}: no such file or folder; accepted: {KINDS}")
    if (path / MANIFEST).is_file():
        return MaskStore(path)
    return _photo_files(path, photos)


def _photo_files(folder: Path, photos: Sequence[Photo]) -> "PhotoJson | LabelMaps":
    """The reader of a folder with a file per photo: JSON, if there is any, or else PNGs.

    Raises:
        DataError: it holds neither.
    """
    shared = shared_names(photos)
    json_files, maps = PhotoJson(folder, shared), LabelMaps(folder, shared)
    some = evenly_spaced(photos, MAX_LOOKED_UP)
    if any(map(json_files.knows, some)):
        return json_files
    if any(map(maps.knows, some)):
        return maps
    has_maps = False
    for file in folder.rglob("*"):
        is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if is_hidden or not file.is_file():
            continue
        if file.suffix.lower() == ".json":
            return json_files
        has_maps = has_maps or file.suffix.lower() == ".png"
    if has_maps:
        return maps
    raise DataError(f"no masks in {folder}; accepted: {KINDS}")


def count_known(reader: MaskReader, photos: Sequence[Photo]) -> int:
    """How many photos are annotated of those looked up: all, or 1000 of them evenly spaced.

    Of a reader that is not ours, all are taken to be.
    """
    some = evenly_spaced(photos, MAX_LOOKED_UP)
    return sum(map(reader.knows, some)) if isinstance(reader, KnowsPhotos) else len(some)


@dataclass(frozen=True)
class PhotoFiles:
    """Files of which each belongs to a photo, by its name.

    Attributes:
        folder: with `STEM.suffix`, the stem with or without the photo's subfolders; None: the
            file lies beside the photo.
        shared: names that are no photo's own.
        suffix: of the files; all of it may be in capitals.
    """

    folder: Path | None
    shared: SharedNames
    suffix: str

    def find(self, photo: Photo) -> Path | None:
        """The file of a photo.

        Raises:
            DataError: what has its name is no file.
        """
        return first_file(self._candidates(photo))

    def _candidates(self, photo: Photo) -> Iterator[Path]:
        if self.folder is None:
            path = photo.path
            own = [path.name, path.stem]
            names = [n for n in own if path.with_name(n).as_posix() not in self.shared.paths]
            folder = path.parent
        else:
            names = self.shared.paths_of(photo) + self.shared.names_of(photo)
            folder = self.folder
        for name in dict.fromkeys(names):
            for suffix in (self.suffix, self.suffix.upper()):
                yield folder / f"{name}{suffix}"


@dataclass(frozen=True)
class PhotoJson:
    """Masks in one JSON file per photo, as SA-1B has them.

    Attributes:
        folder: see `PhotoFiles`.
        shared: likewise.
    """

    folder: Path | None
    shared: SharedNames = field(default_factory=SharedNames)

    def knows(self, photo: Photo) -> bool:
        """Whether the photo has a file."""
        return _is_there(PhotoFiles(self.folder, self.shared, ".json"), photo)

    def __call__(self, photo: Photo, size: Size) -> PhotoMasks | None:
        """The masks of a photo of this height and width; None without a file."""
        masks = self._read(photo, size)
        return None if masks is None else replace(masks, details=None, document=None)

    def with_details(self, photo: Photo, size: Size) -> PhotoMasks | None:
        """The same with all that the file says."""
        masks = self._read(photo, size)
        return None if masks is None else without_counts(masks)

    def _read(self, photo: Photo, size: Size) -> PhotoMasks | None:
        path = PhotoFiles(self.folder, self.shared, ".json").find(photo)
        if path is None:
            return None
        document = read_json(path, max_bytes=MAX_PHOTO_BYTES)
        annotations = records(document, "annotations", path, at_most=MAX_ANNOTATIONS)
        image = document.get("image")
        if isinstance(image, dict):
            _check_name(image.get("file_name"), photo, path)
            check_size(frame(image) or size, size, path)
        segmentations = [annotation.get("segmentation") for annotation in annotations]
        scores = [quality(annotation) for annotation in annotations]
        masks = masks_of(segmentations, scores, size, path, details=annotations)
        return replace(masks, document={**document, "annotations": None})


@dataclass(frozen=True)
class LabelMaps:
    """Masks in one PNG of 8 or 16 bits per photo: every value is a mask.

    255, or 65535 in a map with values above 255, is no mask, as in label maps of ours.

    Attributes:
        folder: see `PhotoFiles`.
        shared: likewise.
    """

    folder: Path
    shared: SharedNames = field(default_factory=SharedNames)

    def knows(self, photo: Photo) -> bool:
        """Whether the photo has a file."""
        return _is_there(PhotoFiles(self.folder, self.shared, ".png"), photo)

    def __call__(self, photo: Photo, size: Size) -> PhotoMasks | None:
        """The masks of a photo of this height and width; None without a file."""
        path = PhotoFiles(self.folder, self.shared, ".png").find(photo)
        if path is None:
            return None
        if photo.path.exists() and path.samefile(photo.path):
            raise DataError(f"{path} is the photo itself, not its label map")
        head = png_head(path)
        check_size((head.height, head.width), size, path)  # before a huge one is decoded
        labels = read_indices(path)
        return from_labels(labels, ignore=(255 if labels.max() <= 255 else 65535,))


def _is_there(files: PhotoFiles, photo: Photo) -> bool:
    """Whether a photo has a file, or something in its place: that is not told as no annotation."""
    try:
        return files.find(photo) is not None
    except DataError:
        return True


def _check_name(name: object, photo: Photo, path: Path) -> None:
    """Make sure that a file name in an annotation is the photo's; its format may have changed.

    Raises:
        DataError: it is not.
    """
    if isinstance(name, str) and PurePath(PureWindowsPath(name).name).stem != photo.path.stem:
        raise DataError(f"{path} has the masks of {name[:80]!r}, not of {photo.path.name}")
