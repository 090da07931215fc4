"""Labels at pixel resolution from scores on a coarse grid, without making the score maps.

The label of a pixel is the class whose bilinearly upsampled score is highest. Inside a cell
between four grid points an interpolated score is a weighted mean of its four corners, so a class
can win there only if its largest corner reaches the largest of all classes' smallest corners
(speed.md v). On real maps two to five classes of a hundred are left per cell; only these are
interpolated. The result is that of upsampling every map and taking the argmax.
"""

from collections.abc import Iterator
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


class ScoreBlocks:
    """Scores of every grid point in blocks of classes; a single block is computed once.

    Args:
        features: per grid point.
        text: per class; scores are products of the two.
    """

    def __init__(self, features: Float[Tensor, "h w D"], text: Float[Tensor, "K D"]):
        """Compute the scores if one block holds them all."""
        self.features = features
        self.parts = text.split(CLASS_BLOCK)
        self.count = len(text)
        self.kept = features @ text.T if len(self.parts) == 1 else None

    def __iter__(self) -> Iterator[Float[Tensor, "h w k"]]:
        """Blocks in the order of the classes."""
        for part in self.parts:
            yield self.features @ part.T if self.kept is None else self.kept


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
    return _argmax(ScoreBlocks(features, text), rows, columns)


def upsampled_confidence(
    features: Float[Tensor, "h w D"],
    text: Float[Tensor, "K D"],
    rows: Axis,
    columns: Axis,
    *,
    temperature: float,
) -> tuple[Shaped[np.ndarray, "H W"], Float[np.ndarray, "H W"]]:
    """Best class of every pixel, as from `upsampled_argmax`, and its share in a softmax.

    The softmax's logarithmic sum over classes is upsampled from the grid.
    """
    scores = ScoreBlocks(features, text)
    labels, certain = _argmax(scores, rows, columns)
    norm = torch.stack([(temperature * block).logsumexp(-1) for block in scores]).logsumexp(0)
    certain *= temperature
    certain -= upsample_grid(norm, rows, columns)
    np.exp(certain, out=certain)
    np.minimum(certain, 1.0, out=certain)
    return labels, certain


def _argmax(
    scores: ScoreBlocks, rows: Axis, columns: Axis
) -> tuple[Shaped[np.ndarray, "H W"], Float[np.ndarray, "H W"]]:
    """Best class and its score for every pixel."""
    cells, classes, corners = _candidates(scores)
    height, width = scores.features.shape[:2]
    counts = np.bincount(cells, minlength=height * width)
    starts = np.cumsum(counts) - counts
    row_runs, column_runs = _runs(rows), _runs(columns)
    tiles = (row_runs.cells[:, None] * width + column_runs.cells).ravel()
    shape = (len(tiles), row_runs.longest, column_runs.longest)
    small = scores.count <= 255
    labels = torch.empty(shape, dtype=torch.uint8 if small else torch.int32)
    best = torch.empty(shape)
    names = torch.from_numpy(classes).to(labels.dtype)
    sizes = _padded_sizes(counts[tiles])
    for size in np.unique(sizes):
        group = np.flatnonzero(sizes == size)
        chunk = max(1, VALUES_PER_CHUNK // int(size * shape[1] * shape[2]))
        for begin in range(0, len(group), chunk):
            members = group[begin : begin + chunk]
            own = tiles[members]
            offsets = np.minimum(np.arange(size), counts[own][:, None] - 1)
            picks = torch.from_numpy(starts[own][:, None] + offsets)
            y, x = np.divmod(members, len(column_runs.cells))
            value, index = _interpolate(corners[picks], row_runs.weights[y], column_runs.weights[x])
            where = torch.from_numpy(members)
            best[where] = value
            labels[where] = names[picks].gather(1, index.flatten(1)).view(index.shape)
    image = _assemble(labels, row_runs, column_runs).numpy()
    scored = _assemble(best, row_runs, column_runs).numpy()
    return image if small else image.astype(np.uint16), scored


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
    return _candidates(ScoreBlocks(features, text))


def _candidates(scores: ScoreBlocks) -> tuple[np.ndarray, np.ndarray, Tensor]:
    floor = torch.stack([_corner_bounds(block)[0].amax(-1) for block in scores]).amax(0)  # [h, w]
    found = []
    for number, block in enumerate(scores):
        height, width = block.shape[:2]
        able = _corner_bounds(block)[1] >= floor[..., None]
        y, x, k = able.nonzero(as_tuple=True)
        y1, x1 = (y + 1).clamp(max=height - 1), (x + 1).clamp(max=width - 1)
        corners = torch.stack(
            [block[y, x, k], block[y, x1, k], block[y1, x, k], block[y1, x1, k]], 1
        )
        found.append((y * width + x, k + number * CLASS_BLOCK, corners))
    cells, classes, corners = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    if len(found) > 1:
        cells, order = cells.sort(stable=True)
        classes, corners = classes[order], corners[order]
    return cells.numpy(), classes.numpy(), corners.float()


def _corner_bounds(scores: Float[Tensor, "h w K"]) -> tuple[Tensor, Tensor]:
    """Smallest and largest of the four corners of every cell; edge cells repeat the edge."""
    right = torch.cat([scores[:, 1:], scores[:, -1:]], dim=1)
    low, high = torch.minimum(scores, right), torch.maximum(scores, right)
    low = torch.minimum(low, torch.cat([low[1:], low[-1:]]))
    high = torch.maximum(high, torch.cat([high[1:], high[-1:]]))
    return low, high


class _Runs(NamedTuple):
    """Stretches of pixels between the same two grid points, padded to the longest.

    Attributes:
        cells: grid point at or before each run.
        weights: (runs, longest) share of the next grid point.
        place: (P,) where each pixel lies among runs * longest.
        longest: pixels of a run, the padding included.
    """

    cells: np.ndarray
    weights: np.ndarray
    place: np.ndarray
    longest: int


def _runs(pixels: Axis) -> _Runs:
    """Runs of one axis.

    The pixels before the first grid point make a run of their own: with them the first cell
    would be 1.5 times as long as the others, and all are padded to the longest.
    """
    fresh = np.diff(pixels.lower, prepend=-1) != 0
    leading = int(np.argmax(pixels.weight > 0)) if pixels.weight.any() else 0
    if leading > 1 and not fresh[1 : leading + 1].any():
        fresh[leading] = True
    starts = np.flatnonzero(fresh)
    counts = np.diff(starts, append=len(pixels.lower))
    longest = int(counts.max())
    offsets = np.minimum(np.arange(longest), counts[:, None] - 1)
    run = np.cumsum(fresh) - 1
    place = run * longest + np.arange(len(run)) - starts[run]
    return _Runs(pixels.lower[starts], pixels.weight[starts[:, None] + offsets], place, longest)


def _padded_sizes(counts: np.ndarray) -> np.ndarray:
    """Candidate counts rounded up to 1, 2, 3, 4, 6, 8, 12, 16, ...: fewer groups, little waste."""
    power = 2 ** np.ceil(np.log2(counts)).astype(np.int64)
    return np.where((power >= 4) & (counts <= power * 3 // 4), power * 3 // 4, power)


def _interpolate(
    corners: Float[Tensor, "n C 4"], rows: np.ndarray, columns: np.ndarray
) -> tuple[Float[Tensor, "n p q"], Int[Tensor, "n p q"]]:
    """Highest interpolated score of tiles that have equally many candidates, and whose it is."""
    row_weights = torch.from_numpy(rows)[:, None, :, None]  # [n, 1, p, 1]
    column_weights = torch.from_numpy(columns)[:, None]  # [n, 1, q]
    left_top, right_top, left_bottom, right_bottom = corners[..., None].unbind(2)  # [n, C, 1]
    top = torch.lerp(left_top, right_top, column_weights)[:, :, None]  # [n, C, 1, q]
    bottom = torch.lerp(left_bottom, right_bottom, column_weights)[:, :, None]
    return torch.lerp(top, bottom, row_weights).max(dim=1)


def _assemble(tiles: Shaped[Tensor, "n p q"], rows: _Runs, columns: _Runs) -> Tensor:
    """Tiles side by side, their padding left out."""
    shape = (len(rows.cells), len(columns.cells), rows.longest, columns.longest)
    image = tiles.view(shape).transpose(1, 2).reshape(shape[0] * shape[2], -1)
    for dim, place in ((0, rows.place), (1, columns.place)):
        if len(place) < image.shape[dim]:
            image = image.index_select(dim, torch.from_numpy(place))
    return image
