"""Named masks of one photo or many, kept in files, so that runs are shared and resumed."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from pixelclip.evaluation.piece_files import (
    MISFITS,
    cells_of,
    counts_of,
    integers,
    read_arrays,
    write_arrays,
)


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
    arrays = {
        "truth": named.truth,
        "scores": named.scores,
        "found": named.found,
        **cells_of(named.matrix),
    }
    write_arrays(path, stamp, piece.errors, arrays)


def read_named(path: Path, stamp: str, num_classes: int, num_photos: int) -> NamedPiece | None:
    """A piece; None if it is not there, not whole, or of other photos, masks or settings."""
    stored = read_arrays(path, stamp, num_photos)
    if stored is None:
        return None
    arrays, errors = stored
    try:
        matrix = counts_of(arrays, num_classes * (num_classes + 1))
        truth, found = integers(arrays["truth"]), integers(arrays["found"])
        scores = arrays["scores"]
    except MISFITS:
        return None
    is_whole = (
        truth.ndim == 1
        and found.shape == truth.shape
        and scores.shape == (len(truth), num_classes)
        and scores.dtype == np.float32
        and ((truth >= 0) & (truth <= num_classes)).all()
    )
    if not is_whole:
        return None
    named = NamedMasks(truth, scores, found, matrix.reshape(num_classes, num_classes + 1))
    return NamedPiece(named, errors)
