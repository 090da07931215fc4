"""Where a view lies in its photo, its pixels, and its masks on a grid (behaviour.md 8)."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from PIL import Image
from torch import Tensor

from pixelclip.errors import DataError
from pixelclip.images import MAX_PIXELS
from pixelclip.masks.runs import PhotoMasks

_FILTER = Image.Resampling.BILINEAR
_CROP_PIXELS = 2**24
MAX_MASK_BYTES = 2**26  # of the masks of a view, one byte per cell of the grid


@dataclass(frozen=True)
class ViewSettings:
    """What views look like; the defaults are the authors'.

    Attributes:
        short_side: photos are resized to this shorter side, in pixels,
        long_side: unless the longer one would pass this,
        crop_size: and cropped to a square of at most this.
        mask_size: rows and columns of the grid that masks are sampled on.
        strong_view: a second, distorted view, with a rectangle cut out.
        colour: random brightness, contrast, saturation and hue for both views.
        max_pixels: photos with more pixels are refused.
        seed: of everything that is drawn.
        pad_masks: a mask keeps its place in a padded frame; False: it is stretched over the frame,
            as the authors do (behaviour.md 11d).
    """

    short_side: int = 1024
    long_side: int = 1333
    crop_size: int = 640
    mask_size: int = 256
    strong_view: bool = True
    colour: bool = True
    max_pixels: int = MAX_PIXELS
    seed: int = 0
    pad_masks: bool = True


@dataclass(frozen=True)
class Geometry:
    """Where a view lies in its photo.

    Attributes:
        photo: width and height of the upright photo.
        resized: width and height it is brought to.
        left: first column of the crop in the resized photo.
        top: first row of it.
        width: of the crop.
        height: of the crop.
        is_flipped: the crop is mirrored, left to right.
    """

    photo: tuple[int, int]
    resized: tuple[int, int]
    left: int
    top: int
    width: int
    height: int
    is_flipped: bool


class Rectangle(NamedTuple):
    """Columns left to right - 1 and rows top to bottom - 1 of a view."""

    left: int
    top: int
    right: int
    bottom: int


def resized_size(photo: tuple[int, int], short_side: int, long_side: int) -> tuple[int, int]:
    """Width and height of the resized photo, as detectron2's ResizeShortestEdge has them.

    At least 1 each, which theirs are not for a photo far longer than wide.
    """
    scale = short_side / min(photo)
    width, height = (short_side if side == min(photo) else scale * side for side in photo)
    if max(width, height) > long_side:
        scale = long_side / max(width, height)
        width, height = width * scale, height * scale
    return max(1, int(width + 0.5)), max(1, int(height + 0.5))


def draw_geometry(
    random: np.random.Generator, photo: tuple[int, int], settings: ViewSettings
) -> Geometry:
    """A crop anywhere in the resized photo, mirrored or not."""
    size = resized_size(photo, settings.short_side, settings.long_side)
    width, height = (min(side, settings.crop_size) for side in size)
    return Geometry(
        photo=photo,
        resized=size,
        left=int(random.integers(size[0] - width + 1)),
        top=int(random.integers(size[1] - height + 1)),
        width=width,
        height=height,
        is_flipped=bool(random.random() < 0.5),
    )


def crop_photo(photo: Image.Image, geometry: Geometry) -> Image.Image:
    """The view before any change of colour, bit for bit as if resized whole, cropped and flipped.

    Pillow could resize a box of the photo, but keeps the box in single precision, which changes
    one value in a thousand. So its two passes are made one by one, over a whole side each, as
    then nothing is rounded, and only over what the crop needs of the other side. The horizontal
    one is first, as in the authors' Pillow; Pillow 13 changes the sequence for some shapes.

    Args:
        photo: upright RGB, or what a JPEG decoder makes of it at a half, a quarter or an eighth.
        geometry: of the view.

    Raises:
        DataError: the photo is not of the size that its file's head gives.
    """
    columns, rows = geometry.resized
    width, height = _extent(photo, geometry.photo)
    bottom = geometry.top + geometry.height
    scale = height / rows
    reach = max(scale, 1.0) + 1  # of the filter, and a row in hand
    first = max(0, math.floor(geometry.top * scale - reach))
    last = min(photo.height, math.ceil(bottom * scale + reach))
    band = _rows(photo, first, last)
    band = band.resize((columns, band.height), _FILTER, box=(0, 0, width, band.height))
    band = band.crop((geometry.left, 0, geometry.left + geometry.width, band.height))
    strip = Image.new("RGB", (geometry.width, photo.height))
    strip.paste(band, (0, first))
    strip = strip.resize((geometry.width, rows), _FILTER, box=(0, 0, geometry.width, height))
    view = strip.crop((0, geometry.top, geometry.width, bottom))
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if geometry.is_flipped else view


def _rows(photo: Image.Image, first: int, last: int) -> Image.Image:
    """Rows `first` to `last` - 1, in parts, as Pillow's limit of pixels holds for a crop too."""
    rows = Image.new("RGB", (photo.width, last - first))
    step = max(1, _CROP_PIXELS // photo.width)
    for top in range(first, last, step):
        part = photo.crop((0, top, photo.width, min(top + step, last)))
        rows.paste(part, (0, top - first))
    return rows


def _extent(photo: Image.Image, original: tuple[int, int]) -> tuple[float, float]:
    """Width and height that the original has in a photo that may have been decoded small.

    The decoder makes whole pixels of a rest at the right and the bottom: 1203 / 8 is 151 columns,
    of which the original fills 150.375. (Where EXIF turned that rest to the left or the top, the
    view is shifted by it, less than a pixel.)

    Raises:
        DataError: the photo is not of the size that its file's head gives.
    """
    width, height = original
    for small in (1, 2, 4, 8):
        if photo.size == (-(-width // small), -(-height // small)):
            return width / small, height / small
    raise DataError(
        f"the photo has {photo.width} x {photo.height} pixels where its head says"
        f" {width} x {height}"
    )


def draw_rectangle(random: np.random.Generator, width: int, height: int) -> Rectangle:
    """The part to cut out of a view of this size: 10-50 % of its sides, anywhere in it.

    As the authors draw it (behaviour.md 8f): its width is a share of the view's height and its
    height of the width, and it may begin one pixel too far and lose its last row or column.
    """
    across = int(height * random.uniform(0.1, 0.5))
    down = int(width * random.uniform(0.1, 0.5))
    left, right = _place(random, across, width)
    top, bottom = _place(random, down, height)
    return Rectangle(left, top, right, bottom)


def _place(random: np.random.Generator, length: int, side: int) -> tuple[int, int]:
    """First and last + 1 pixel of a stretch of a side; it may be longer than the side."""
    furthest = side + 1 - length
    first = int(random.integers(min(0, furthest), max(0, furthest), endpoint=True))
    return min(max(0, first), side), min(side, first + length)


def to_frame(view: Image.Image, size: int) -> UInt8[Tensor, "3 size size"]:
    """The view in the upper left corner of a black square."""
    make = torch.empty if view.size == (size, size) else torch.zeros
    frame = make(3, size, size, dtype=torch.uint8)
    pixels = torch.from_numpy(np.array(view))  # [height, width, 3]
    frame[:, : view.height, : view.width] = pixels.permute(2, 0, 1)
    return frame


def sample_masks(
    masks: PhotoMasks,
    geometry: Geometry,
    settings: ViewSettings,
    rectangle: Rectangle | None = None,
) -> Bool[Tensor, "M m m"]:
    """The masks of a view on the grid over its frame; those left without a pixel are dropped.

    Resizing to nearest pixels, crop, flip, frame and grid are together a choice of rows and
    columns of the photo; only those are looked up. Where a centre falls between two rows exactly,
    the lower one is taken; Pillow, which adds up in floating point, takes the other at times.

    Args:
        masks: of the photo.
        geometry: of the view.
        settings: for the frame, a square of `crop_size`, and the grid on it, of `mask_size`; and
            for `pad_masks`.
        rectangle: part of the view that belongs to no mask.
    """
    crop = (geometry.height, geometry.width)
    frame = (settings.crop_size, settings.crop_size) if settings.pad_masks else crop
    # Row and column of the crop under each of the grid.
    down, across = (np.arange(settings.mask_size) * side // settings.mask_size for side in frame)
    columns = geometry.width - 1 - across if geometry.is_flipped else across
    grid = masks.sample(
        _source(down, geometry.top, geometry.height, geometry.resized[1], geometry.photo[1]),
        _source(columns, geometry.left, geometry.width, geometry.resized[0], geometry.photo[0]),
    )
    if rectangle is not None:
        left, right = np.searchsorted(across, (rectangle.left, rectangle.right))
        top, bottom = np.searchsorted(down, (rectangle.top, rectangle.bottom))
        grid[:, top:bottom, left:right] = False
    return torch.from_numpy(np.ascontiguousarray(grid[grid.any(axis=(1, 2))]))


def _source(
    places: Int64[np.ndarray, " m"], start: int, length: int, resized: int, original: int
) -> Int64[np.ndarray, " m"]:
    """Row or column of the photo at places of the crop; -1 beside the crop."""
    nearest = (2 * (start + places) + 1) * original // (2 * resized)
    return np.where((places >= 0) & (places < length), nearest, -1)
