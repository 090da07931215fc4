"""Counts of some photos with many vocabularies in a file, so that reports are resumed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pixelclip.evaluation.piece_files import (
    MISFITS,
    cells_of,
    counts_of,
    integers,
    read_arrays,
    write_arrays,
)
from pixelclip.evaluation.vocabularies import Counted, nothing_counted
from pixelclip.evaluation.wordings import Wording


def write_counted(path: Path, stamp: str, counted: Counted) -> None:
    """Write counts, whole or not at all; the same counts make the same bytes.

    Raises:
        DataError: the file cannot be written.
    """
    areas = counted.piece_areas
    arrays = {
        **cells_of(np.concatenate([matrix.ravel() for matrix in counted.matrices])),
        "owners": np.repeat(np.arange(len(areas)), [len(own) for own in areas]),
        "areas": np.array([area for own in areas for area in own], dtype=np.int64),
        "photos": counted.photos,
    }
    write_arrays(path, stamp, counted.errors, arrays)


def read_counted(
    path: Path, stamp: str, wordings: Sequence[Wording], num_classes: int, num_pairs: int
) -> Counted | None:
    """Counts in a file; None if it is not there, not whole, or not of these photos and words."""
    stored = read_arrays(path, stamp, num_pairs)
    if stored is None:
        return None
    arrays, errors = stored
    counted = nothing_counted(wordings, num_classes)
    ends = np.cumsum([matrix.size for matrix in counted.matrices])
    try:
        pixels = counts_of(arrays, int(ends[-1]))
        counted.photos += integers(arrays["photos"])
        owners, areas = integers(arrays["owners"]), integers(arrays["areas"])
        for owner, area in zip(owners.tolist(), areas.tolist(), strict=True):
            counted.piece_areas[owner].append(area)
    except MISFITS:
        return None
    counted.errors += errors
    for matrix, part in zip(counted.matrices, np.split(pixels, ends[:-1]), strict=True):
        matrix += part.reshape(matrix.shape)
    return counted
