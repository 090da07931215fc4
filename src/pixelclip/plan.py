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


class Plan(NamedTuple):
    """How one photo goes through the network.

    Attributes:
        height: of the network input, in pixels.
        width: of the network input.
        rows: first grid row of every window.
        columns: first grid column of every window.
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
    scale = short_side / min(width, height)
    if scale > 1:  # a strip of 10 x 20,000 pixels is not enlarged to 320 x 640,000
        scale = min(scale, max(1.0, MAX_ENLARGED_ASPECT * short_side / max(width, height)))
    if config.short_side is None:
        scale = max(scale, 1 / config.max_downscale)
    net_height, net_width = max(1, round(height * scale)), max(1, round(width * scale))
    rows, window_height = window_starts(-(-net_height // stride), config, stride)
    columns, window_width = window_starts(-(-net_width // stride), config, stride)
    return Plan(net_height, net_width, rows, columns, (window_height, window_width))


def make_axes(
    plan: Plan, config: SegmentConfig, stride: int, width: int, height: int
) -> tuple[Axis, Axis]:
    """Where the rows and columns of a photo of that size lie on the grid."""
    if config.preset == "authors":
        grid = AUTHORS_GRID
        return axis(height, grid, grid / height), axis(width, grid, grid / width)
    return (
        axis(height, -(-plan.height // stride), plan.height / (height * stride)),
        axis(width, -(-plan.width // stride), plan.width / (width * stride)),
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


def taper(length: int) -> Float[Tensor, " n"]:
    """Weights that rise from both ends to the middle, never zero."""
    ramp = torch.arange(1, length + 1, dtype=torch.float32)
    return torch.minimum(ramp, ramp.flip(0))


def authors_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of the authors' first resize: short side 640 (behaviour.md 18a)."""
    scale = AUTHORS_SHORT_SIDE / min(width, height)
    scale = min(scale, AUTHORS_LONG_SIDE / max(width, height))
    return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))
