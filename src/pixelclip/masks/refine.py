"""Means under masks of features on a coarse grid, exact in pixels; values painted on masks.

Bilinear up-sampling is linear, so the mean over a mask of up-sampled cosines is a weighted mean of
those on the grid, and the weights are the mask brought to the grid by the transposed up-sampling
(speed.md i). They are summed up from the mask's runs: neither masks nor scores are ever decoded.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor

from pixelclip.masks.runs import PhotoMasks
from pixelclip.upsample import Axis

VALUES_PER_BLOCK = 8_000_000
LONG_RUN, RUNS_PER_BLOCK = 1024, 4096  # of a mask that is painted


def mask_means(
    features: Float[Tensor, "h w D"], masks: PhotoMasks, rows: Axis, columns: Axis
) -> Float[Tensor, "M D"]:
    """Mean under each mask of the features up-sampled to the photo; zeros for an empty mask.

    Args:
        features: per grid point.
        masks: of the photo, in its own pixels.
        rows: where the photo's rows lie on the grid.
        columns: where its columns lie.
    """
    height, width = features.shape[:2]
    cells = features.flatten(0, 1).float()
    means = cells.new_zeros(masks.count, cells.shape[1])
    step = max(1, VALUES_PER_BLOCK // (height * width))
    for first in range(0, masks.count, step):
        part = masks.select(np.arange(first, min(first + step, masks.count)))
        areas = torch.from_numpy(part.areas()).clamp(min=1)
        weights = grid_weights(part, rows, columns, (height, width)) / areas[:, None, None]
        means[first : first + step] = weights.flatten(1).to(cells) @ cells
    return means


def grid_weights(
    masks: PhotoMasks, rows: Axis, columns: Axis, grid: tuple[int, int]
) -> Float64[Tensor, "M h w"]:
    """How much each grid point counts in the sum over a mask: transposed bilinear up-sampling.

    Args:
        masks: of the photo, in its own pixels.
        rows: where the photo's rows lie on the grid.
        columns: where its columns lie.
        grid: h and w.
    """
    height, width = grid
    below = _sums_below(rows, height)
    lower = columns.lower
    upper = np.minimum(lower + 1, width - 1)
    share = columns.weight.astype(np.float64)
    total = torch.zeros(masks.count * width, height, dtype=torch.float64)
    for owner, column, top, bottom in _pieces(masks, VALUES_PER_BLOCK // height):
        down = torch.from_numpy(below[bottom] - below[top])  # [p, h]
        for places, weights in ((lower, 1 - share), (upper, share)):
            keys = torch.from_numpy(owner * width + places[column])
            total.index_add_(0, keys, down * torch.from_numpy(weights[column])[:, None])
    return total.view(masks.count, width, height).mT


def _sums_below(rows: Axis, points: int) -> Float64[np.ndarray, "P1 h"]:
    """What the first 0, 1, ... P rows add up to on the grid points of that axis."""
    count = np.arange(len(rows.lower))
    matrix = np.zeros((len(count) + 1, points))
    np.add.at(matrix, (count + 1, rows.lower), 1 - rows.weight.astype(np.float64))
    upper = np.minimum(rows.lower + 1, points - 1)
    np.add.at(matrix, (count + 1, upper), rows.weight.astype(np.float64))
    return matrix.cumsum(axis=0)


def _pieces(masks: PhotoMasks, limit: int) -> Iterator[tuple[Int64[np.ndarray, " p"], ...]]:
    """Owner, column, first row and row after the last of the runs, cut at the columns' ends."""
    height = masks.height
    first, last = masks.starts // height, (masks.ends - 1) // height
    counts = last - first + 1
    runs = np.repeat(np.arange(len(counts)), counts)
    for start in range(0, len(runs), max(1, limit)):
        run = runs[start : start + max(1, limit)]
        number = np.arange(start, start + len(run)) - (np.cumsum(counts) - counts)[run]
        column = first[run] + number
        top = np.where(number == 0, masks.starts[run] % height, 0)
        bottom = np.where(column == last[run], masks.ends[run] - column * height, height)
        yield masks.owners[run], column, top, bottom


def paint(
    values: Shaped[np.ndarray, "H W"], masks: PhotoMasks, new: Shaped[np.ndarray, " M"]
) -> Shaped[np.ndarray, "H W"]:
    """Values with each mask's own on its pixels, larger masks first, so that small ones show.

    Args:
        values: of the photo's pixels before; those under no mask keep theirs.
        masks: of the photo.
        new: per mask.
    """
    flat = values.ravel(order="F").copy()
    bounds = np.searchsorted(masks.owners, np.arange(masks.count + 1))
    for index in np.argsort(-masks.areas(), kind="stable").tolist():
        own = slice(bounds[index], bounds[index + 1])
        starts, ends = masks.starts[own], masks.ends[own]
        is_long = ends - starts > LONG_RUN  # places of pixels take 24 bytes each
        for start, end in zip(starts[is_long].tolist(), ends[is_long].tolist(), strict=True):
            flat[start:end] = new[index]
        starts, ends = starts[~is_long], ends[~is_long]
        for first in range(0, len(starts), RUNS_PER_BLOCK):
            some = starts[first : first + RUNS_PER_BLOCK]
            lengths = ends[first : first + RUNS_PER_BLOCK] - some
            shift = some - np.cumsum(lengths) + lengths
            flat[np.arange(lengths.sum()) + np.repeat(shift, lengths)] = new[index]
    return np.ascontiguousarray(flat.reshape(values.shape, order="F"))
