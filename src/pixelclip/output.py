"""What is written for a segmented photo, and whether it is there already."""

import hashlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pixelclip.backbones.means import all_that_tells, identity_of
from pixelclip.errors import DataError
from pixelclip.images import png_bytes, write_bytes
from pixelclip.photos import Photo
from pixelclip.segmentation import Segmentation
from pixelclip.segmenter import Segmenter

MAX_RECORD_BYTES = 2**28


class Output(NamedTuple):
    """What is written and printed.

    Attributes:
        folder: for the results.
        masks: RLE and polygons in the JSON of each photo.
        scores: score maps as NPZ.
        overlay: overlay pictures.
        json: print a summary as JSON on stdout.
        quiet: print errors only.
    """

    folder: Path
    masks: bool = False
    scores: bool = False
    overlay: bool = True
    json: bool = False
    quiet: bool = False


def output_identity(segmenter: Segmenter, output: Output) -> str:
    """A hash of all that decides what is written for a photo, but for a feature's last bits."""
    return identity_of(
        all_that_tells(segmenter.backbone),
        segmenter.description(),
        device=None,
        batch_size=None,
        classes=segmenter.classes,
        files=[output.masks, output.scores, output.overlay],
    )


def stamp_of(photo: Photo, identity: str) -> str:
    """A hash of the photo's file, told by size and date, and of all else that decides.

    Of a photo elsewhere the address alone counts: to ask for more would take a request for each.

    Raises:
        DataError: the photo is not there.
    """
    state = ""
    if not photo.url:
        try:
            stat = photo.path.stat()
        except OSError as error:
            raise DataError(f"cannot read {photo.path}: {error.strerror or error}") from error
        state = f"{stat.st_size} {stat.st_mtime_ns}"
    return hashlib.sha256(f"{photo.shown}\n{state}\n{identity}".encode()).hexdigest()[:32]


def files_of(photo: Photo, output: Output) -> list[Path]:
    """What is written for a photo, the JSON last."""
    wanted = {
        ".labels.png": True,
        ".overlay.png": output.overlay,
        ".scores.npz": output.scores,
        ".json": True,
    }
    base = output.folder / photo.stem
    return [base.with_name(base.name + suffix) for suffix, is_wanted in wanted.items() if is_wanted]


def is_done(photo: Photo, output: Output, stamp: str) -> bool:
    """Whether the results of a photo are there, whole, with that stamp."""
    files = files_of(photo, output)
    try:
        if not all(file.stat().st_size for file in files):  # empty after a loss of power
            return False
        return read_record(files[-1]).get("stamp") == stamp
    except (OSError, DataError):
        return False


def read_record(path: Path) -> dict[str, object]:
    """The JSON of a photo.

    Raises:
        DataError: it cannot be read.
    """
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise DataError(f"{path} is too large to be a result")
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return record if isinstance(record, dict) else {}


def write_result(
    photo: Photo,
    result: Segmentation,
    picture: Image.Image | None,
    *,
    segmenter: Segmenter,
    output: Output,
    stamp: str,
) -> None:
    """Write the files of one photo; the JSON comes last, so that it stands for a whole set.

    Args:
        photo: what was segmented.
        result: its labels.
        picture: what the overlay is drawn on; None if there is to be none.
        segmenter: what it was segmented with.
        output: what is wanted.
        stamp: of `stamp_of`, from before the photo was read: it may change meanwhile.

    Raises:
        DataError: a file cannot be written.
    """
    record = describe(photo, result, segmenter, masks=output.masks)
    record["stamp"] = stamp
    text = json.dumps(record, indent=2, ensure_ascii=False)
    for path in files_of(photo, output):
        if path.name.endswith(".labels.png"):
            content = png_bytes(Image.fromarray(result.labels))
        elif path.name.endswith(".overlay.png") and picture is not None:
            content = png_bytes(result.overlay(picture))
        elif path.name.endswith(".scores.npz") and result.scores is not None:
            buffer = io.BytesIO()
            scores = result.scores.astype(np.float16)
            np.savez_compressed(buffer, scores=scores, classes=np.array(result.classes))
            content = buffer.getvalue()
        else:
            content = f"{text}\n".encode()
        write_bytes(path, content)


def describe(
    photo: Photo, result: Segmentation, segmenter: Segmenter, *, masks: bool = False
) -> dict[str, object]:
    """What the JSON beside a label map says; specified in docs/formats.md."""
    height, width = result.labels.shape
    areas = result.areas()
    record: dict[str, object] = {
        "photo": photo.shown,
        "width": width,
        "height": height,
        "classes": list(result.classes),
        "areas": areas,
        "no_class_pixels": height * width - sum(area["pixels"] for area in areas),
        "no_class_label": result.none,
        "model": segmenter.backbone.card.name,
        "settings": segmenter.description(),
    }
    if masks:
        record["rle"] = result.rles()
        record["polygons"] = result.polygons()
    return record
