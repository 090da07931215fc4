"""Counts of some photos with many vocabularies in a file, so that reports are resumed."""

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from pixelclip.evaluation.vocabularies import Counted, nothing_counted
from pixelclip.evaluation.wordings import Wording
from pixelclip.images import write_bytes

MAX_BYTES = 2**30
_DAMAGED = (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, MemoryError)


def write_counted(path: Path, stamp: str, counted: Counted) -> None:
    """Write counts, whole or not at all; the same counts make the same bytes.

    Raises:
        DataError: the file cannot be written.
    """
    pixels = np.concatenate([matrix.ravel() for matrix in counted.matrices])
    cells = np.flatnonzero(pixels)  # a few photos fill few of them
    areas = counted.piece_areas
    buffer = io.BytesIO()
    np.savez(
        buffer,
        stamp=np.array(stamp),
        cells=cells,
        pixels=pixels[cells],
        owners=np.repeat(np.arange(len(areas)), [len(own) for own in areas]),
        areas=np.array([area for own in areas for area in own], dtype=np.int64),
        photos=counted.photos,
        errors=np.frombuffer(json.dumps(counted.errors).encode(), dtype=np.uint8),
    )
    write_bytes(path, buffer.getvalue())


def read_counted(
    path: Path, stamp: str, wordings: Sequence[Wording], num_classes: int, num_pairs: int
) -> Counted | None:
    """Counts in a file; None if it is not there, not whole, or not of these photos and words."""
    counted = nothing_counted(wordings, num_classes)
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["stamp"]) != stamp:
                return None
            pixels = np.zeros(sum(matrix.size for matrix in counted.matrices), dtype=np.int64)
            pixels[_integers(stored["cells"])] = _integers(stored["pixels"])
            owners, areas = _integers(stored["owners"]), _integers(stored["areas"])
            counted.photos += _integers(stored["photos"])
            errors = json.loads(stored["errors"].tobytes())
            for owner, area in zip(owners.tolist(), areas.tolist(), strict=True):
                counted.piece_areas[owner].append(area)
    except _DAMAGED:
        return None
    if not isinstance(errors, list) or len(errors) != num_pairs:
        return None
    counted.errors += map(str, errors)
    ends = np.cumsum([matrix.size for matrix in counted.matrices])
    for matrix, part in zip(counted.matrices, np.split(pixels, ends[:-1]), strict=True):
        matrix += part.reshape(matrix.shape)
    return counted


def _integers(values: np.ndarray) -> Int64[np.ndarray, "..."]:
    if values.dtype.kind not in "iu":
        raise ValueError("not integers")
    return values.astype(np.int64)
