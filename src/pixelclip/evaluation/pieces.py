"""Counts of some photos in a file, so that evaluations are shared out, killed and resumed."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from pixelclip.evaluation.metrics import Boundary, Counts
from pixelclip.evaluation.piece_files import (
    MISFITS,
    cells_of,
    counts_of,
    integers,
    read_arrays,
    write_arrays,
)

WORST = 8  # photos listed and drawn


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
    arrays = {
        **cells_of(piece.counts.confusion),
        "boundary": np.stack(piece.counts.boundary),
        "mious": piece.mious,
        **{f"drawn-{number}": labels for number, labels in piece.drawn.items()},
    }
    write_arrays(path, stamp, piece.errors, arrays)


def read_piece(path: Path, stamp: str, num_classes: int, num_pairs: int) -> PieceCounts | None:
    """A piece; None if it is not there, not whole, or of other photos, models or settings."""
    stored = read_arrays(path, stamp, num_pairs)
    if stored is None:
        return None
    arrays, errors = stored
    try:
        confused = counts_of(arrays, num_classes * (num_classes + 1))
        bands = integers(arrays["boundary"])
        mious = np.asarray(arrays["mious"], dtype=np.float64)
        drawn = {number: arrays[f"drawn-{number}"] for number in worst_of(mious)}
    except MISFITS:
        return None
    is_whole = (
        bands.shape == (2, num_classes)
        and mious.shape == (num_pairs,)
        and all(labels.ndim == 2 and labels.dtype.kind in "iu" for labels in drawn.values())
    )
    if not is_whole:
        return None
    counts = Counts(confused.reshape(num_classes, num_classes + 1), Boundary(*bands))
    return PieceCounts(counts, mious, errors, drawn)


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
