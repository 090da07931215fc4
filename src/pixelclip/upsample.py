"""Labels at pixel resolution from scores on a coarse grid, without making the score maps.

The label of a pixel is the class whose bilinearly upsampled score is highest. Inside a cell
between four grid points an interpolated score is a weighted mean of its four corners, so a class
can win there only if its largest corner reaches the largest of all classes' smallest corners
(speed.md v). On real maps two to five classes of a hundred are left per cell; only these are
interpolated. The result is that of upsampling every map and taking the argmax.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

CLASS_BLOCK = 2048
VALUES_PER_CHUNK = 4_000_000


class Axis(NamedTuple):
    """Where the pixels of one axis lie between grid points.

    Attributes:
        lower: (P,) index of the grid point at or before each pixel.
        weight: (P,) share of the next grid point, in [0, 1].
    """

    lower: Int[np.ndarray, " P"]
    weight: Float[np.ndarray, " P"]


def axis(pixels: int, points: int, scale: float) -> Axis:
    """Half-pixel centres, as `F.interpolate(mode="bilinear", align_corners=False)` has them.

    Args:
        pixels: number of output pixels.
        points: number of grid points.
        scale: grid points per output pixel.
    """
    place = np.maximum((np.arange(pixels, dtype=np.float64) + 0.5) * scale - 0.5, 0.0)
    lower = np.minimum(place.astype(np.int64), points - 1)
    weight = np.where(lower >= points - 1, 0.0, place - lower)
    return Axis(lower, weight.astype(np.float32))


def upsampled_argmax(
    features: Float[Tensor, "h w D"], text: Float[Tensor, "K D"], rows: Axis, columns: Axis
) -> tuple[Shaped[np.ndarray, "H W"], Float[np.ndarray, "H W"]]:
    """Best class and its score for every pixel.

    Memory is bounded by the grid times `CLASS_BLOCK`, whatever the number of classes.

    Args:
        features: per grid point; scores are products with `text`.
        text: per class.
        rows: where output rows lie on the grid.
        columns: where output columns lie.
    """
    cells, classes, corners = candidates(features, text)
    height, width = len(rows.lower), len(columns.lower)
    labels = np.zeros((height, width), dtype=np.uint8 if len(text) <= 255 else np.uint16)
    scores = np.zeros((height, width), dtype=np.float32)
    grid_width = features.shape[1]
    row_runs, column_runs = _runs(rows, features.shape[0]), _runs(columns, grid_width)
    counts = np.bincount(cells, minlength=features.shape[0] * grid_width)
    starts = np.cumsum(counts) - counts
    visible = np.flatnonzero(
        (row_runs.counts[:, None] > 0).repeat(grid_width, 1).ravel()
        & np.tile(column_runs.counts > 0, features.shape[0])
    )
    for size in np.unique(counts[visible]):
        group = visible[counts[visible] == size]
        chunk = max(1, VALUES_PER_CHUNK // int(size * row_runs.longest * column_runs.longest))
        for begin in range(0, len(group), chunk):
            members = group[begin : begin + chunk]
            picks = starts[members][:, None] + np.arange(size)
            _fill_cells(members, classes[picks], corners[torch.from_numpy(picks)],
                        row_runs, column_runs, labels, scores)  # fmt: skip
    return labels, scores


def upsample_grid(
    grid: Float[Tensor, "h w"], rows: Axis, columns: Axis
) -> Float[np.ndarray, "H W"]:
    """One map upsampled bilinearly."""
    grid = grid.float().cpu()
    for dim, pixels in ((0, rows), (1, columns)):
        lower = torch.from_numpy(pixels.lower)
        upper = (lower + 1).clamp(max=grid.shape[dim] - 1)
        weight = torch.from_numpy(pixels.weight)
        weight = weight[:, None] if dim == 0 else weight
        grid = torch.lerp(grid.index_select(dim, lower), grid.index_select(dim, upper), weight)
    return grid.numpy()


def candidates(
    features: Float[Tensor, "h w D"], text: Float[Tensor, "K D"]
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"], Float[Tensor, "N 4"]]:
    """Cell, class and corner scores of every class that can win somewhere in a cell.

    Ordered by cell, then by class. A cell is named by its top left grid point.
    """
    blocks = text.split(CLASS_BLOCK)
    floor = torch.stack([_corner_bounds(features @ block.T)[0].amax(-1) for block in blocks])
    floor = floor.amax(0)  # [h, w]
    found = []
    for number, block in enumerate(blocks):
        scores = features @ block.T
        able = _corner_bounds(scores)[1] >= floor[..., None]
        y, x, k = able.nonzero(as_tuple=True)
        y1, x1 = (y + 1).clamp(max=scores.shape[0] - 1), (x + 1).clamp(max=scores.shape[1] - 1)
        corners = torch.stack(
            [scores[y, x, k], scores[y, x1, k], scores[y1, x, k], scores[y1, x1, k]], 1
        )
        found.append((y * scores.shape[1] + x, k + number * CLASS_BLOCK, corners))
    cells, classes, corners = (torch.cat(parts) for parts in zip(*found, strict=True))
    cells, order = cells.cpu().sort(stable=True)
    return cells.numpy(), classes.cpu()[order].numpy(), corners.float().cpu()[order]


def _corner_bounds(scores: Float[Tensor, "h w K"]) -> tuple[Tensor, Tensor]:
    """Smallest and largest of the four corners of every cell; edge cells repeat the edge."""
    right = torch.cat([scores[:, 1:], scores[:, -1:]], dim=1)
    low, high = torch.minimum(scores, right), torch.maximum(scores, right)
    low = torch.minimum(low, torch.cat([low[1:], low[-1:]]))
    high = torch.maximum(high, torch.cat([high[1:], high[-1:]]))
    return low, high


class _Runs(NamedTuple):
    """The pixels of each cell along one axis: padded to the longest by repeating the last."""

    counts: np.ndarray
    pixels: np.ndarray
    weights: np.ndarray
    longest: int


def _runs(pixels: Axis, points: int) -> _Runs:
    counts = np.bincount(pixels.lower, minlength=points)
    starts = np.cumsum(counts) - counts
    longest = int(counts.max())
    offsets = np.minimum(np.arange(longest)[None], np.maximum(counts - 1, 0)[:, None])
    index = np.minimum(starts[:, None] + offsets, len(pixels.lower) - 1)
    return _Runs(counts, index, pixels.weight[index], longest)


def _fill_cells(
    cells: np.ndarray,
    classes: np.ndarray,
    corners: Tensor,
    rows: _Runs,
    columns: _Runs,
    labels: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Interpolate the candidates of cells that have equally many, and write the winners."""
    y, x = np.divmod(cells, len(columns.counts))
    row_weights = torch.from_numpy(rows.weights[y])[:, None, :, None]  # [n, 1, p, 1]
    column_weights = torch.from_numpy(columns.weights[x])[:, None]  # [n, 1, q]
    left_top, right_top, left_bottom, right_bottom = corners[..., None].unbind(2)  # [n, C, 1]
    top = torch.lerp(left_top, right_top, column_weights)[:, :, None]  # [n, C, 1, q]
    bottom = torch.lerp(left_bottom, right_bottom, column_weights)[:, :, None]
    best, index = torch.lerp(top, bottom, row_weights).max(dim=1)  # [n, p, q]
    winners = np.take_along_axis(classes, index.flatten(1).numpy(), axis=1).reshape(index.shape)
    where = (rows.pixels[y][:, :, None], columns.pixels[x][:, None, :])
    labels[where] = winners
    scores[where] = best.numpy()
