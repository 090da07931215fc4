"""Counts of some photos in a file, so that evaluations are shared out, killed and resumed."""

import io
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64, Integer

from pixelclip.evaluation.metrics import Boundary, Counts
from pixelclip.images import write_bytes

WORST = 8  # photos listed and drawn
MAX_BYTES = 2**28
_DAMAGED = (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, MemoryError)


class PieceCounts(NamedTuple):
    """What is known of the pairs of a piece.

    Attributes:
        counts: of all its photos.
        mious: of each pair in [0, 1]; NaN where there is none.
        errors: one line for each pair; empty where it could be used.
        drawn: label maps of the pairs of lowest mIoU, by their number, as small as they are drawn.
    """

    counts: Counts
    mious: Float[np.ndarray, " N"]
    errors: list[str]
    drawn: Mapping[int, Integer[np.ndarray, "_ _"]]


def worst_of(mious: Float[np.ndarray, " N"]) -> list[int]:
    """Indices of the pairs of lowest mIoU, the worst first; equal ones in their order."""
    order = np.argsort(mious, kind="stable")
    return [int(index) for index in order[:WORST] if not np.isnan(mious[index])]


def write_piece(path: Path, stamp: str, piece: PieceCounts) -> None:
    """Write a piece, whole or not at all; the same counts make the same bytes.

    Raises:
        DataError: the file cannot be written.
    """
    matrix = piece.counts.confusion
    cells = np.flatnonzero(matrix)  # 16 photos fill few of the 718,000 cells of 847 classes
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        stamp=np.array(stamp),
        cells=cells,
        pixels=matrix.ravel()[cells],
        boundary=np.stack(piece.counts.boundary),
        mious=piece.mious,
        errors=np.frombuffer(json.dumps(piece.errors).encode(), dtype=np.uint8),
        **{f"drawn-{number}": labels for number, labels in piece.drawn.items()},  # type: ignore[arg-type]  # no switch
    )
    write_bytes(path, buffer.getvalue())


def read_piece(path: Path, stamp: str, num_classes: int, num_pairs: int) -> PieceCounts | None:
    """A piece; None if it is not there, not whole, or of other photos, models or settings."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        with zipfile.ZipFile(path) as archive:  # what is said here is all that is unpacked
            if sum(part.file_size for part in archive.infolist()) > MAX_BYTES:
                return None
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["stamp"]) != stamp:
                return None
            confused = np.zeros(num_classes * (num_classes + 1), dtype=np.int64)
            confused[_integers(stored["cells"])] = _integers(stored["pixels"])
            bands = _integers(stored["boundary"])
            mious = np.asarray(stored["mious"], dtype=np.float64)
            errors = json.loads(stored["errors"].tobytes())
            worst = worst_of(mious)
            drawn = {number: stored[f"drawn-{number}"] for number in worst}
    except _DAMAGED:
        return None
    is_whole = (
        bands.shape == (2, num_classes)
        and mious.shape == (num_pairs,)
        and isinstance(errors, list)
        and len(errors) == num_pairs
        and all(labels.ndim == 2 and labels.dtype.kind in "iu" for labels in drawn.values())
    )
    if not is_whole:
        return None
    counts = Counts(confused.reshape(num_classes, num_classes + 1), Boundary(*bands))
    return PieceCounts(counts, mious, [str(error) for error in errors], drawn)


def _integers(values: np.ndarray) -> Int64[np.ndarray, "..."]:
    if values.dtype.kind not in "iu":
        raise ValueError("not integers")
    return values.astype(np.int64)


def sum_pieces(pieces: Iterable[PieceCounts]) -> PieceCounts:
    """All pieces as one, in their order; of label maps, those of the worst of all."""
    total: Counts | None = None
    mious: list[float] = []
    errors: list[str] = []
    drawn: dict[int, Integer[np.ndarray, "_ _"]] = {}
    for piece in pieces:  # one at a time: the counts of 847 classes take 6 MB
        total = piece.counts if total is None else total + piece.counts
        drawn |= {len(mious) + number: labels for number, labels in piece.drawn.items()}
        mious += piece.mious.tolist()
        errors += piece.errors
        drawn = {number: drawn[number] for number in worst_of(np.array(mious))}
    assert total is not None
    return PieceCounts(total, np.array(mious), errors, drawn)
