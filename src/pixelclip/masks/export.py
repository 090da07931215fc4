"""Masks written as others read them: SA-1B's JSON, COCO's instances, PNG label maps."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO
from urllib.parse import unquote_to_bytes

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image

from pixelclip.errors import DataError
from pixelclip.files import replacing
from pixelclip.images import MAX_PIXELS, png_bytes, read_size, write_bytes
from pixelclip.masks.annotations import KnowsDetails, MaskReader
from pixelclip.masks.details import annotations, sa1b_document
from pixelclip.masks.names import photo_name
from pixelclip.masks.runs import PhotoMasks
from pixelclip.masks.store import MaskStore
from pixelclip.photos import Photo, at_hand

CATEGORY = {"id": 1, "name": "object", "supercategory": "object"}
MAX_PART = 240  # bytes of a name; file systems take 255
COUNTED = 2**22  # pixels whose labels are counted at a time; each takes 8 bytes then


@dataclass
class Exported:
    """What came of an export.

    Attributes:
        photos: written.
        masks: written.
        covered: masks that lost pixels to others in label maps.
        left_out: photos that have not been written, each with one line that says why.
    """

    photos: int = 0
    masks: int = 0
    covered: int = 0
    left_out: list[tuple[Path, str]] = field(default_factory=list)

    def add(self, masks: PhotoMasks) -> None:
        """Count a photo that has been written."""
        self.photos += 1
        self.masks += masks.count

    @contextmanager
    def leaving_out(self, photo: Photo) -> Iterator[None]:
        """What goes wrong with a photo inside the block is noted."""
        try:
            yield
        except DataError as error:
            self.left_out.append((photo.path, str(error)))


def stored_photos(store: MaskStore) -> list[Photo]:
    """The photos of a store, to export their masks where the photos themselves are not at hand.

    Raises:
        DataError: a name in the store is no path below a folder.
    """
    paths = [_path_of(name) for name in store.photos()]
    stems = [path.with_suffix("") for path in paths]
    shared = Counter([*stems, *paths])
    return [
        Photo(path, stem if shared[stem] == 1 else path)
        for path, stem in zip(paths, stems, strict=True)
    ]


def export_sa1b(reader: MaskReader, photos: Iterable[Photo], out_dir: Path) -> Exported:
    """Write `STEM.json` for each photo, in SA-1B's layout.

    What was read from such files comes out as it was, byte by byte if it was written by Python's
    `json`; masks without details get those that follow from their pixels and scores.

    Args:
        reader: of the masks; with a store, the photos need not exist.
        photos: those to write.
        out_dir: photos from subfolders keep these.

    Raises:
        DataError: the folder cannot be written.
    """

    def render(masks: PhotoMasks, photo: Photo, done: Exported) -> bytes:
        image: dict[str, object] = {
            "image_id": done.photos + 1,
            "width": masks.width,
            "height": masks.height,
            "file_name": photo.path.name,
        }
        return _json(sa1b_document(masks, image, done.masks + 1))

    return _export_files(reader, photos, out_dir, ".json", render)


def export_coco(reader: MaskReader, photos: Iterable[Photo], path: Path) -> Exported:
    """Write one COCO instances file: compressed run lengths, one category, `object`.

    It is written as it grows: millions of photos need no more memory than one.

    Args:
        reader: of the masks; with a store, the photos need not exist.
        photos: those to write; photos without masks are among its `images` too.
        path: of the file.

    Raises:
        DataError: the file cannot be written.
    """
    done = Exported()
    try:
        with (
            replacing(path) as part,
            part.open("wb") as file,
            TemporaryFile(dir=path.parent) as images,
        ):
            file.write(b'{"info": {"description": "class-agnostic masks by pixelclip"},\n')
            file.write(b'"categories": [' + _json(CATEGORY) + b'],\n"annotations": [')
            for photo in photos:
                with done.leaving_out(photo):
                    _add_coco(_masks_of(reader, photo), photo, file, images, done)
            file.write(b'],\n"images": [')
            images.seek(0)
            shutil.copyfileobj(images, file)
            file.write(b"]}\n")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    return done


def export_labels(reader: MaskReader, photos: Iterable[Photo], out_dir: Path) -> Exported:
    """Write a label map `STEM.png` for each photo: small masks lie on large ones.

    The value of a pixel is the index of its mask. Up to 255 masks it has 8 bits and 255 means no
    mask; above, 16 bits and 65535, and indices from 255 on are one higher, so that 255 is unused.

    Args:
        reader: of the masks; with a store, the photos need not exist.
        photos: those to write.
        out_dir: photos from subfolders keep these.

    Raises:
        DataError: the folder cannot be written.
    """

    def render(masks: PhotoMasks, photo: Photo, done: Exported) -> bytes:
        labels, covered = label_map(masks)
        done.covered += covered
        return png_bytes(Image.fromarray(labels))

    return _export_files(reader, photos, out_dir, ".png", render)


def label_map(
    masks: PhotoMasks,
) -> tuple[UInt8[np.ndarray, "H W"] | UInt16[np.ndarray, "H W"], int]:
    """The label map of `export_labels`, and how many masks lost pixels in it.

    Raises:
        DataError: it would have over `MAX_PIXELS` pixels.
    """
    pixels = masks.height * masks.width
    if pixels > MAX_PIXELS:
        raise DataError(f"a label map of {masks.width} x {masks.height} pixels is too large")
    nothing, kind = (255, np.uint8) if masks.count <= 255 else (65535, np.uint16)
    values = np.arange(masks.count)
    values[255:] += 1  # else a map with 256 values would be read as one whose 255 is no mask
    labels = np.full(pixels, nothing, dtype=kind)
    bounds = list(pairwise(np.searchsorted(masks.owners, np.arange(masks.count + 1)).tolist()))
    areas = masks.areas()
    for index in np.argsort(-areas, kind="stable").tolist():
        runs = slice(*bounds[index])
        for start, end in zip(masks.starts[runs].tolist(), masks.ends[runs].tolist(), strict=True):
            labels[start:end] = values[index]
    seen = np.zeros(65536, dtype=np.int64)
    for at in range(0, pixels, COUNTED):
        seen += np.bincount(labels[at : at + COUNTED], minlength=len(seen))
    covered = np.count_nonzero(seen[values] < areas)
    return np.ascontiguousarray(labels.reshape(masks.width, masks.height).T), int(covered)


def _export_files(
    reader: MaskReader,
    photos: Iterable[Photo],
    out_dir: Path,
    suffix: str,
    render: Callable[[PhotoMasks, Photo, Exported], bytes],
) -> Exported:
    """Write a file per photo, named by its stem."""
    done = Exported()
    for photo in photos:
        content = None
        with done.leaving_out(photo):
            path = _path_for(photo, out_dir, suffix)
            masks = _masks_of(reader, photo)
            content = render(masks, photo, done)
        if content is not None:
            write_bytes(path, content)
            done.add(masks)
    return done


def _masks_of(reader: MaskReader, photo: Photo) -> PhotoMasks:
    """The masks of a photo with their details.

    Raises:
        DataError: there are none, or the photo or the masks cannot be read.
    """
    if isinstance(reader, MaskStore):
        masks = reader.with_details(photo)
    else:
        with at_hand(photo) as local:
            width, height = read_size(local.path)
        read = reader.with_details if isinstance(reader, KnowsDetails) else reader
        masks = read(photo, (height, width))
    if masks is None:
        raise DataError(f"{photo.shown} has no masks there")
    return masks


def _add_coco(
    masks: PhotoMasks, photo: Photo, file: IO[bytes], images: IO[bytes], done: Exported
) -> None:
    """Write a photo and its masks at the end of the lists."""
    image = {
        "id": done.photos + 1,
        "file_name": photo_name(photo),
        "height": masks.height,
        "width": masks.width,
    }
    texts = [text.decode() for text in masks.to_rle()]
    for index, fields in enumerate(annotations(masks, texts, done.masks + 1)):
        score = fields.pop("predicted_iou")
        is_crowd = masks.details is not None and masks.details[index].get("iscrowd") == 1
        fields |= {"iscrowd": int(is_crowd), "image_id": image["id"], "category_id": CATEGORY["id"]}
        file.write(_item(done.masks + index == 0, {**fields, "score": score}))
    images.write(_item(done.photos == 0, image))
    done.add(masks)


def _item(is_first: bool, fields: dict[str, object]) -> bytes:
    return (b"\n" if is_first else b",\n") + _json(fields)


def _json(document: object) -> bytes:
    """JSON as Python writes it unless told otherwise.

    Raises:
        DataError: it cannot be written.
    """
    try:
        return json.dumps(document, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"details that cannot be written as JSON: {error}") from error


def _path_of(name: str) -> Path:
    """The path of the photo that has this name in a store.

    Raises:
        DataError: it is no path below a folder.
    """
    path = Path(os.fsdecode(unquote_to_bytes(name[1:])) if name.startswith("/") else name)
    if not _is_below(path):
        raise DataError(f"the store has a photo {name[:80]!r}, which is no path below a folder")
    return path


def _path_for(photo: Photo, out_dir: Path, suffix: str) -> Path:
    """Where the file of a photo is written.

    Raises:
        DataError: it would not lie below the folder.
    """
    if not _is_below(photo.stem):
        raise DataError(f"{photo.shown} has a name that no file in {out_dir} can have")
    return out_dir / photo.stem.with_name(f"{photo.stem.name}{suffix}")


def _is_below(path: Path) -> bool:
    """Whether a file of that path, and a few letters, can lie below the folder it is joined to."""
    is_odd = any(part == ".." or len(os.fsencode(part)) > MAX_PART for part in path.parts)
    return bool(path.name) and not path.anchor and not is_odd and "\0" not in str(path)
