"""Named masks of one photo or many, kept in files, so that runs are shared and resumed."""

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from pixelclip.images import write_bytes

MAX_BYTES = 2**30
_DAMAGED = (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, MemoryError)


class NamedMasks(NamedTuple):
    """Masks of some photos, and what they are taken for.

    Attributes:
        truth: class per mask; the number of classes for a mask that does not count.
        scores: probability of each class.
        found: class with the highest; above all classes for a name of background.
        matrix: confusion of the pixels, when each mask is painted with its class.
    """

    truth: Int64[np.ndarray, " M"]
    scores: Float32[np.ndarray, "M K"]
    found: Int64[np.ndarray, " M"]
    matrix: Int64[np.ndarray, "K K1"]


class NamedPiece(NamedTuple):
    """What is known of the photos of a piece.

    Attributes:
        named: masks of those that could be used.
        errors: one line for each photo; empty where it could be used.
    """

    named: NamedMasks
    errors: list[str]


def joined(parts: Sequence[NamedMasks], num_classes: int) -> NamedMasks:
    """The masks of all parts, in their order."""
    nothing = NamedMasks(
        truth=np.zeros(0, dtype=np.int64),
        scores=np.zeros((0, num_classes), dtype=np.float32),
        found=np.zeros(0, dtype=np.int64),
        matrix=np.zeros((num_classes, num_classes + 1), dtype=np.int64),
    )
    every = [nothing, *parts]
    matrix = nothing.matrix
    for part in parts:
        matrix = matrix + part.matrix
    return NamedMasks(
        truth=np.concatenate([part.truth for part in every]),
        scores=np.concatenate([part.scores for part in every]),
        found=np.concatenate([part.found for part in every]),
        matrix=matrix,
    )


def write_named(path: Path, stamp: str, piece: NamedPiece) -> None:
    """Write a piece, whole or not at all; the same masks make the same bytes.

    Raises:
        DataError: the file cannot be written.
    """
    named = piece.named
    cells = np.flatnonzero(named.matrix)  # a few photos fill few of the cells of 847 classes
    buffer = io.BytesIO()
    np.savez(
        buffer,
        stamp=np.array(stamp),
        truth=named.truth,
        scores=named.scores,
        found=named.found,
        cells=cells,
        pixels=named.matrix.ravel()[cells],
        errors=np.frombuffer(json.dumps(piece.errors).encode(), dtype=np.uint8),
    )
    write_bytes(path, buffer.getvalue())


def read_named(path: Path, stamp: str, num_classes: int, num_photos: int) -> NamedPiece | None:
    """A piece; None if it is not there, not whole, or of other photos, masks or settings."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["stamp"]) != stamp:
                return None
            matrix = np.zeros(num_classes * (num_classes + 1), dtype=np.int64)
            matrix[_integers(stored["cells"])] = _integers(stored["pixels"])
            truth, found = _integers(stored["truth"]), _integers(stored["found"])
            scores = stored["scores"]
            errors = json.loads(stored["errors"].tobytes())
    except _DAMAGED:
        return None
    is_whole = (
        truth.ndim == 1
        and found.shape == truth.shape
        and scores.shape == (len(truth), num_classes)
        and scores.dtype == np.float32
        and ((truth >= 0) & (truth <= num_classes)).all()
        and isinstance(errors, list)
        and len(errors) == num_photos
    )
    if not is_whole:
        return None
    named = NamedMasks(truth, scores, found, matrix.reshape(num_classes, num_classes + 1))
    return NamedPiece(named, [str(error) for error in errors])


def _integers(values: np.ndarray) -> Int64[np.ndarray, "..."]:
    if values.dtype.kind not in "iu":
        raise ValueError("not integers")
    return values.astype(np.int64)
