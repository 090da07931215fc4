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

    The softmax is over the upsampled scores of all classes. Those that can win in the cell count
    exactly; the sum of all others is interpolated in the logarithm.
    """
    scores = ScoreBlocks(features, text)
    norm = torch.stack([(temperature * block).logsumexp(-1) for block in scores]).logsumexp(0)
    return _argmax(scores, rows, columns, Softmax(temperature, norm.float().cpu(), len(text)))


class Softmax(NamedTuple):
    """What a confidence needs beside scores.

    Attributes:
        temperature: factor on the scores.
        norm: (h, w) logarithm of the sum over classes at every grid point.
        num_classes: K.
    """

    temperature: float
    norm: Tensor
    num_classes: int


def _argmax(
    scores: ScoreBlocks, rows: Axis, columns: Axis, softmax: Softmax | None = None
) -> tuple[Shaped[np.ndarray, "H W"], Float[np.ndarray, "H W"]]:
    """Best class of every pixel and its score, or with `softmax` its confidence."""
    cells, classes, corners = candidates(scores)
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
            weights = _TileWeights.of(row_runs.weights[y], column_runs.weights[x])
            value, index, all_values = _best(corners[picks], weights)
            if softmax is not None:
                real = torch.from_numpy(np.arange(size) < counts[own][:, None])
                rest = _log_rest(corners[picks], real, softmax, own)
                value = _confidence(all_values, value, real, weights.interpolate(rest), softmax)
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
    scores: ScoreBlocks,
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"], Float[Tensor, "N 4"]]:
    """Cell, class and corner scores of every class that can win somewhere in a cell.

    Ordered by cell, then by class. A cell is named by its top left grid point.
    """
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


class _TileWeights(NamedTuple):
    """Shares of the lower and right grid points for the pixels of n tiles."""

    rows: Tensor  # [n, 1, p, 1]
    columns: Tensor  # [n, 1, q]

    @classmethod
    def of(cls, rows: np.ndarray, columns: np.ndarray) -> "_TileWeights":
        return cls(torch.from_numpy(rows)[:, None, :, None], torch.from_numpy(columns)[:, None])

    def interpolate(self, corners: Float[Tensor, "n C 4"]) -> Float[Tensor, "n C p q"]:
        """Values inside the tiles from those at their four corners."""
        left_top, right_top, left_bottom, right_bottom = corners[..., None].unbind(2)  # [n, C, 1]
        top = torch.lerp(left_top, right_top, self.columns)[:, :, None]  # [n, C, 1, q]
        bottom = torch.lerp(left_bottom, right_bottom, self.columns)[:, :, None]
        return torch.lerp(top, bottom, self.rows)


def _best(
    corners: Float[Tensor, "n C 4"], weights: _TileWeights
) -> tuple[Float[Tensor, "n p q"], Int[Tensor, "n p q"], Float[Tensor, "n C p q"]]:
    """Highest interpolated score in tiles of equally many candidates, whose it is, and all."""
    values = weights.interpolate(corners)
    best, index = values.max(dim=1)
    return best, index, values


def _log_rest(
    corners: Float[Tensor, "n C 4"], real: Tensor, softmax: Softmax, cells: np.ndarray
) -> Float[Tensor, "n 1 4"]:
    """Logarithm of the sum over classes that are no candidates, at the corners of cells."""
    height, width = softmax.norm.shape
    y, x = (torch.from_numpy(part) for part in np.divmod(cells, width))
    y1, x1 = (y + 1).clamp(max=height - 1), (x + 1).clamp(max=width - 1)
    norm = torch.stack([softmax.norm[i, j] for i, j in ((y, x), (y, x1), (y1, x), (y1, x1))], 1)
    shares = torch.exp(softmax.temperature * corners - norm[:, None]) * real[..., None]
    return (norm + torch.log((1 - shares.sum(1)).clamp(min=1e-9)))[:, None]


def _confidence(
    values: Float[Tensor, "n C p q"],
    best: Float[Tensor, "n p q"],
    real: Tensor,
    log_rest: Float[Tensor, "n 1 p q"],
    softmax: Softmax,
) -> Float[Tensor, "n p q"]:
    """Share of the best class in the sum over candidates and all others."""
    others = (softmax.temperature * (values - best[:, None])).exp_() * real[..., None, None]
    rest = torch.exp(log_rest[:, 0] - softmax.temperature * best)
    # None of the others exceeds the best, so each counts 1 at most.
    rest = torch.minimum(rest, (softmax.num_classes - real.sum(1))[:, None, None])
    return 1 / (others.sum(1) + rest)


def _assemble(tiles: Shaped[Tensor, "n p q"], rows: _Runs, columns: _Runs) -> Tensor:
    """Tiles side by side, their padding left out."""
    shape = (len(rows.cells), len(columns.cells), rows.longest, columns.longest)
    image = tiles.view(shape).transpose(1, 2).reshape(shape[0] * shape[2], -1)
    for dim, place in ((0, rows.place), (1, columns.place)):
        if len(place) < image.shape[dim]:
            image = image.index_select(dim, torch.from_numpy(place))
    return image
