"""JSON that others wrote: nothing in it is taken for granted."""

import errno
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from pixelclip.errors import DataError
from pixelclip.masks.runs import PhotoMasks, from_coco

QUALITIES = ("predicted_iou", "score")  # the fields of SA-1B, and of COCO's results
MAX_ANNOTATIONS = 2**16  # in the file of one photo; SA-1B's largest have some hundreds
Size = tuple[int, int]
_NOTHING = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL}


def read_json(path: Path, *, max_bytes: int) -> dict[str, object]:
    """The object in a JSON file.

    Raises:
        DataError: the file is missing, too large, no JSON, or not an object.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise DataError(
                f"{path} is too large: {size / 1e6:.0f} MB, the limit is {max_bytes / 1e6:.0f}"
            )
        document = parse_json(path.read_bytes(), path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not isinstance(document, dict):
        raise DataError(f"{path} is not a JSON object but a {type(document).__name__}")
    return document


def parse_json(text: bytes, path: Path) -> object:
    """The value of a JSON text of a file.

    Raises:
        DataError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} is not JSON that can be read: {reason}") from error


def records(
    document: dict[str, object], key: str, path: Path, *, at_most: int | None = None
) -> list[dict[str, object]]:
    """The list of objects under a key; what is no object becomes an empty one.

    Raises:
        DataError: there is no list under that key, or it is too long.
    """
    values = document.get(key)
    if not isinstance(values, list):
        raise DataError(f"{path} has no list {key!r}")
    if at_most is not None and len(values) > at_most:
        raise DataError(f"{path} has {len(values)} {key}; the limit is {at_most}")
    return [value if isinstance(value, dict) else {} for value in values]


def first_file(paths: Iterable[Path]) -> Path | None:
    """The first of the paths at which there is something.

    Raises:
        DataError: that is no file, a dead link say, or it cannot be told.
    """
    for path in paths:
        try:
            path.lstat()
        except ValueError:  # the name has a null byte or is no text
            continue
        except OSError as error:
            if error.errno in _NOTHING:
                continue
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        if not path.is_file():
            raise DataError(f"{path} is not a file")
        return path
    return None


def frame(record: dict[str, object]) -> Size | None:
    """The `height` and `width` of a record, if it has both."""
    height, width = record.get("height"), record.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def check_size(found: Size, size: Size, path: Path) -> None:
    """Make sure that masks are those of a photo of this size.

    Raises:
        DataError: they are not.
    """
    if found != size:
        raise DataError(
            f"{path} has masks of {found[1]} x {found[0]} pixels,"
            f" but the upright photo has {size[1]} x {size[0]}"
        )


def quality(record: dict[str, object]) -> float:
    """How good a mask is according to its record, in [0, 1]; 1 if it does not say."""
    for key in QUALITIES:
        value = record.get(key)
        if isinstance(value, int | float):
            return float(min(max(value, 0), 1))
    return 1.0


def masks_of(
    segmentations: Sequence[object],
    scores: Sequence[float],
    size: Size,
    path: Path,
    *,
    details: Sequence[dict[str, object]] | None = None,
) -> PhotoMasks:
    """The masks of COCO's segmentations of one photo.

    Raises:
        DataError: there are some, but all of them are damaged.
    """
    masks = from_coco(*size, segmentations, scores, details)
    if masks.broken and not masks.count:
        raise DataError(f"{path}: none of the {masks.broken} masks can be read")
    return masks
