"""How a photo goes through the network: its input size, its windows, its grid."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pixelclip.checkpoint import ModelCard
from pixelclip.config import SegmentConfig
from pixelclip.upsample import Axis, axis

AUTHORS_SHORT_SIDE, AUTHORS_LONG_SIDE = 640, 2560
AUTHORS_GRID = 64
MAX_ENLARGED_ASPECT = 4
SLIDING_LONG_SIDE = 2048  # of mmsegmentation's configurations, whatever the short side


class Plan(NamedTuple):
    """How one photo goes through the network.

    Attributes:
        height: of the network input, in pixels.
        width: of the network input.
        rows: first grid row of every window.
        columns: first grid column of every window. With `join` by pixels a cell is a pixel.
        window: grid cells of a window, down and across.
    """

    height: int
    width: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    window: tuple[int, int]


def make_plan(config: SegmentConfig, card: ModelCard, stride: int, width: int, height: int) -> Plan:
    """Network input and windows for a photo of that size.

    The default keeps the photo's shape, with at least one network pixel per `max_downscale`
    photo pixels. An explicit `short_side` is taken as it is, but a strip is not enlarged until
    it is more than four times as long as `short_side`.
    """
    if config.preset == "authors":
        side = config.short_side or card.square
        return Plan(side, side, (0,), (0,), (AUTHORS_GRID, AUTHORS_GRID))
    short_side = config.short_side or card.short_side
    if config.join == "pixels":
        return _pixel_plan(config, short_side, width, height)
    scale = short_side / min(width, height)
    if scale > 1:  # a strip of 10 x 20,000 pixels is not enlarged to 320 x 640,000
        scale = min(scale, max(1.0, MAX_ENLARGED_ASPECT * short_side / max(width, height)))
    if config.short_side is None:
        scale = max(scale, 1 / config.max_downscale)
    net_height, net_width = max(1, round(height * scale)), max(1, round(width * scale))
    rows, window_height = window_starts(-(-net_height // stride), config, stride)
    columns, window_width = window_starts(-(-net_width // stride), config, stride)
    return Plan(net_height, net_width, rows, columns, (window_height, window_width))


def _pixel_plan(config: SegmentConfig, short_side: int, width: int, height: int) -> Plan:
    """Network input and windows as in mmsegmentation 1.2: `Resize`, `slide_inference`.

    The first window is in the corner, others follow at equal steps; the last ones are moved back
    inside.
    """
    scale = min(short_side / min(width, height), SLIDING_LONG_SIDE / max(width, height))
    net_height, net_width = (max(1, int(side * scale + 0.5)) for side in (height, width))
    rows, columns = pixel_starts(net_height, config), pixel_starts(net_width, config)
    window = (min(config.window, net_height), min(config.window, net_width))
    return Plan(net_height, net_width, rows, columns, window)


def pixel_starts(side: int, config: SegmentConfig) -> tuple[int, ...]:
    """First pixels of the windows along one axis of the network input."""
    step = max(1, round(config.window * (1 - config.overlap)))
    last = max(side - config.window, 0)
    return tuple(min(i * step, last) for i in range(-(-last // step) + 1))


def cell_size(config: SegmentConfig, stride: int) -> int:
    """Network pixels per cell of the grid on which windows are joined."""
    return 1 if config.join == "pixels" and config.preset != "authors" else stride


def is_in_windows(plan: Plan, config: SegmentConfig) -> bool:
    """Whether windows are to be joined; of a single one too, if its grid is not the features'."""
    by_pixels = config.join == "pixels" and config.preset != "authors"
    return by_pixels or len(plan.rows) * len(plan.columns) > 1


def make_axes(
    plan: Plan, config: SegmentConfig, stride: int, width: int, height: int
) -> tuple[Axis, Axis]:
    """Where the rows and columns of a photo of that size lie on the grid."""
    if config.preset == "authors":
        grid = AUTHORS_GRID
        return axis(height, grid, grid / height), axis(width, grid, grid / width)
    cell = cell_size(config, stride)
    return (
        axis(height, -(-plan.height // cell), plan.height / (height * cell)),
        axis(width, -(-plan.width // cell), plan.width / (width * cell)),
    )


def window_starts(cells: int, config: SegmentConfig, stride: int) -> tuple[tuple[int, ...], int]:
    """First cells of the windows along one axis, and their length in cells.

    The windows are equally long and evenly spread; neighbours share about `overlap` or more.
    """
    length = max(2, config.window // stride)
    if cells <= length:
        return (0,), cells
    step = max(1, round(length * (1 - config.overlap)))
    count = -(-(cells - length) // step) + 1
    return tuple(round(i * (cells - length) / (count - 1)) for i in range(count)), length


def window_weights(
    height: int, width: int, config: SegmentConfig
) -> Float[Tensor, "height width 1"]:
    """Weights of a window's cells where it overlaps others."""
    if config.join == "pixels":
        return torch.ones(height, width, 1)
    return torch.outer(taper(height), taper(width))[..., None]


def taper(length: int) -> Float[Tensor, " n"]:
    """Weights that rise from both ends to the middle, never zero."""
    ramp = torch.arange(1, length + 1, dtype=torch.float32)
    return torch.minimum(ramp, ramp.flip(0))


def authors_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of the authors' first resize: short side 640 (behaviour.md 18a)."""
    scale = AUTHORS_SHORT_SIDE / min(width, height)
    scale = min(scale, AUTHORS_LONG_SIDE / max(width, height))
    return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))
