"""Counts of some photos in a file, so that evaluations are shared out, killed and resumed."""

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from pixelclip.evaluation.metrics import Boundary, Counts
from pixelclip.images import write_bytes

MAX_BYTES = 2**28
_DAMAGED = (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, MemoryError)


class PieceCounts(NamedTuple):
    """What is known of the pairs of a piece.

    Attributes:
        counts: of all its photos.
        mious: of each pair in [0, 1]; NaN where there is none.
        errors: one line for each pair; empty where it could be used.
    """

    counts: Counts
    mious: Float[np.ndarray, " N"]
    errors: list[str]


def write_piece(path: Path, stamp: str, piece: PieceCounts) -> None:
    """Write a piece, whole or not at all; the same counts make the same bytes.

    Raises:
        DataError: the file cannot be written.
    """
    matrix = piece.counts.confusion
    cells = np.flatnonzero(matrix)  # 16 photos fill few of the 718,000 cells of 847 classes
    buffer = io.BytesIO()
    np.savez(
        buffer,
        stamp=np.array(stamp),
        cells=cells,
        pixels=matrix.ravel()[cells],
        boundary=np.stack(piece.counts.boundary),
        mious=piece.mious,
        errors=np.frombuffer(json.dumps(piece.errors).encode(), dtype=np.uint8),
    )
    write_bytes(path, buffer.getvalue())


def read_piece(path: Path, stamp: str, num_classes: int, num_pairs: int) -> PieceCounts | None:
    """A piece; None if it is not there, not whole, or of other photos, models or settings."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["stamp"]) != stamp:
                return None
            confused = np.zeros(num_classes * (num_classes + 1), dtype=np.int64)
            confused[_integers(stored["cells"])] = _integers(stored["pixels"])
            bands = _integers(stored["boundary"])
            mious = np.asarray(stored["mious"], dtype=np.float64)
            errors = json.loads(stored["errors"].tobytes())
    except _DAMAGED:
        return None
    is_whole = (
        bands.shape == (2, num_classes)
        and mious.shape == (num_pairs,)
        and isinstance(errors, list)
        and len(errors) == num_pairs
    )
    if not is_whole:
        return None
    counts = Counts(confused.reshape(num_classes, num_classes + 1), Boundary(*bands))
    return PieceCounts(counts, mious, [str(error) for error in errors])


def _integers(values: np.ndarray) -> Int64[np.ndarray, "..."]:
    if values.dtype.kind not in "iu":
        raise ValueError("not integers")
    return values.astype(np.int64)


def sum_pieces(pieces: Sequence[PieceCounts]) -> PieceCounts:
    """All pieces as one, in their order."""
    total = pieces[0].counts
    for piece in pieces[1:]:
        total += piece.counts
    mious = np.concatenate([piece.mious for piece in pieces])
    return PieceCounts(total, mious, [error for piece in pieces for error in piece.errors])
