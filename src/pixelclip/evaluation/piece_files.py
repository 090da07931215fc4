"""Arrays in a file under a stamp: what pieces of evaluations keep on disk."""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from pixelclip.errors import DataError
from pixelclip.images import write_bytes

MAX_BYTES = 2**30  # of a file, and of all that is unpacked from it
# What whole arrays raise that are not those of a piece.
MISFITS = (ValueError, KeyError, IndexError)


def write_arrays(
    path: Path, stamp: str, errors: Sequence[str], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write arrays, whole or not at all; the same ones make the same bytes.

    Args:
        path: of the file.
        stamp: of all that decides them.
        errors: one line for each photo of the piece; empty where it could be used.
        arrays: by name.

    Raises:
        DataError: the file cannot be written.
    """
    buffer = io.BytesIO()
    own = {
        "stamp": np.array(stamp),
        "errors": np.frombuffer(json.dumps([*errors]).encode(), dtype=np.uint8),
    }
    np.savez_compressed(buffer, **own, **arrays)  # type: ignore[arg-type]  # no switch
    write_bytes(path, buffer.getvalue())


def read_arrays(
    path: Path, stamp: str, num_photos: int
) -> tuple[dict[str, np.ndarray], list[str]] | None:
    """Arrays and errors; None if they are not there, not whole, or under another stamp."""
    try:
        with zipfile.ZipFile(path) as archive:  # what is said here is all that is unpacked
            if sum(part.file_size for part in archive.infolist()) > MAX_BYTES:
                return None
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["stamp"]) != stamp:
                return None
            arrays = dict(stored)
            errors = json.loads(arrays.pop("errors").tobytes())
    except Exception:  # parsers of zip files and arrays raise anything on damaged ones
        return None
    if not isinstance(errors, list) or len(errors) != num_photos:
        return None
    return arrays, [str(error) for error in errors]


def cells_of(counts: Int64[np.ndarray, "..."]) -> dict[str, np.ndarray]:
    """Places and values of the counts that are not zero.

    A few photos fill few of the 718,000 cells of 847 classes.
    """
    cells = np.flatnonzero(counts)
    return {"cells": cells, "pixels": counts.ravel()[cells]}


def counts_of(arrays: Mapping[str, np.ndarray], size: int) -> Int64[np.ndarray, " N"]:
    """So many counts from `cells_of`.

    Raises:
        MISFITS: they are not of that form.
    """
    counts = np.zeros(size, dtype=np.int64)
    counts[integers(arrays["cells"])] = integers(arrays["pixels"])
    return counts


def integers(values: np.ndarray) -> Int64[np.ndarray, "..."]:
    """The values.

    Raises:
        ValueError: they are no integers.
    """
    if values.dtype.kind not in "iu":
        raise ValueError("not integers")
    return values.astype(np.int64)


def gone(path: Path) -> DataError:
    """What is wrong where a piece that was just made cannot be read."""
    return DataError(f"{path} has gone, or its photos changed meanwhile; run it again")
