"""Masks to look at: drawn over their photo, and photos with masks on one sheet."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Integer, UInt8
from PIL import Image

from pixelclip.errors import ConfigError, DataError
from pixelclip.files import printable
from pixelclip.images import MAX_PIXELS, load_photo, read_size, reading, resized
from pixelclip.masks.annotations import MaskReader
from pixelclip.masks.layout import GAP, captioned, grid, note
from pixelclip.masks.runs import PhotoMasks
from pixelclip.overlay import palette
from pixelclip.photos import Photo, at_hand, evenly_spaced

OPACITY = 0.6
MAX_SAMPLED = 2**26  # bytes of masks held at once
MAX_SHEET_PIXELS = 2**27
FINE = 2  # tiles are drawn so many times as large, then reduced: smooth outlines


class Sheet(NamedTuple):
    """Photos with their masks on one picture.

    Attributes:
        image: to be saved as PNG.
        failures: photos that could not be shown, each with one line that says why.
    """

    image: Image.Image
    failures: list[tuple[Photo, str]]


class Layers(NamedTuple):
    """Which mask is seen at each pixel; -1 is none.

    Attributes:
        top: the last mask there.
        outlines: the last mask that has its outline there.
    """

    top: Int64[np.ndarray, "h w"]
    outlines: Int64[np.ndarray, "h w"]


def draw_masks(image: Image.Image, masks: PhotoMasks) -> Image.Image:
    """The photo with every mask in its own colour, smaller ones above larger ones, and outlines.

    What is under no mask stays as it is. An outline is white where its mask lies on a larger one
    or on the bare photo, and is drawn on the mask's own pixels; where smaller masks hide it, it
    shows through in the mask's colour, so that overlapping and nested masks can be told apart. Of
    equally large masks the later one is above.

    Args:
        image: upright RGB: the photo, or a smaller or larger form of it.
        masks: of the photo.
    """
    order = large_to_small(masks)
    colours = palette(max(1, masks.count))[order]
    layers = stack(masks.select(order), image.size)
    drawn = painted(image, layers.top, colours)
    is_hidden = (layers.outlines >= 0) & (layers.outlines < layers.top)
    drawn[is_hidden] = colours[layers.outlines[is_hidden]]
    return Image.fromarray(drawn)


def large_to_small(masks: PhotoMasks) -> Int64[np.ndarray, " M"]:
    """Indices of the masks by area; equally large ones keep their order."""
    return np.argsort(-masks.areas(), kind="stable")


def stack(masks: PhotoMasks, size: tuple[int, int]) -> Layers:
    """The masks of a photo laid on each other in their order, at this width and height.

    Each pixel takes the nearest one of the photo. A few masks are sampled at a time.
    """
    layers = Layers(*(np.full((size[1], size[0]), -1) for _ in range(2)))
    for index, mask in enumerate(_sampled(masks, size)):
        layers.top[mask] = index
        layers.outlines[mask & _is_beside(~mask)] = index
    return layers


def _sampled(masks: PhotoMasks, size: tuple[int, int]) -> Iterator[Bool[np.ndarray, "h w"]]:
    """The masks one by one."""
    columns, rows = (
        (2 * np.arange(side) + 1) * original // (2 * side)
        for side, original in zip(size, (masks.width, masks.height), strict=True)
    )
    at_once = max(1, MAX_SAMPLED // (size[0] * size[1]))
    for first in range(0, masks.count, at_once):
        part = np.arange(first, min(first + at_once, masks.count))
        yield from masks.select(part).sample(rows, columns)


def _is_beside(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Pixels with one of the mask above, below, left or right of them."""
    result = np.zeros_like(mask)
    result[1:] |= mask[:-1]
    result[:-1] |= mask[1:]
    result[:, 1:] |= mask[:, :-1]
    result[:, :-1] |= mask[:, 1:]
    return result


def edges(labels: Integer[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Pixels with a lower label above, below, left or right of them: lines of one pixel."""
    result = np.zeros(labels.shape, dtype=bool)
    result[1:] |= labels[:-1] < labels[1:]
    result[:-1] |= labels[1:] < labels[:-1]
    result[:, 1:] |= labels[:, :-1] < labels[:, 1:]
    result[:, :-1] |= labels[:, 1:] < labels[:, :-1]
    return result


def painted(
    image: Image.Image, labels: Integer[np.ndarray, "h w"], colours: UInt8[np.ndarray, "K 3"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The photo with labels in their colours and white outlines; at label -1 it stays."""
    photo = np.array(image)
    known = labels >= 0
    mixed = photo[known] * (1 - OPACITY) + colours[labels[known]] * OPACITY
    photo[known] = mixed.round().astype(np.uint8)
    photo[edges(labels)] = 255
    return photo


def contact_sheet(
    photos: Sequence[Photo],
    reader: MaskReader,
    *,
    count: int = 24,
    columns: int = 3,
    tile: int = 256,
    max_pixels: int = MAX_PIXELS,
) -> Sheet:
    """Photos, each beside itself with its masks.

    Below each stand the file's name, the number of masks and the share of the photo under them. A
    photo that cannot be shown, or has no masks, has its place too, which says so.

    Args:
        photos: to choose from.
        reader: of their masks.
        count: photos shown, evenly spaced among all; fewer if there are no more.
        columns: photos side by side.
        tile: longer side of each picture, in pixels.
        max_pixels: photos with more pixels are not shown.

    Raises:
        ConfigError: the sheet would be too large.
        DataError: there is no photo.
    """
    cells, failures = [], []
    for photo in shown_photos(photos, count, tile):
        try:
            cells.append(_pair(photo, reader, tile, max_pixels))
        except DataError as error:
            failures.append((photo, str(error)))
            reason = note(str(error), (2 * tile + GAP, tile // 2))
            lines = [shown_name(photo), "cannot be shown"]
            cells.append(captioned(reason, lines, least_width=tile))
    return Sheet(grid([cells[at : at + columns] for at in range(0, len(cells), columns)]), failures)


def _pair(photo: Photo, reader: MaskReader, tile: int, max_pixels: int) -> Image.Image:
    """The photo beside itself with its masks.

    Raises:
        DataError: photo or masks cannot be read.
    """
    image, masks = load_small(photo, reader, FINE * tile, max_pixels)
    fine = enlarged(image, tile)
    small = fine.reduce(FINE)
    if masks is None:
        drawn, line = note("no masks", small.size), "no masks"
    else:
        drawn, line = draw_masks(fine, masks).reduce(FINE), _summary(masks, small.size)
    pair = Image.new("RGB", (2 * small.width + GAP, small.height), "white")
    pair.paste(small, (0, 0))
    pair.paste(drawn, (small.width + GAP, 0))
    return captioned(pair, [shown_name(photo), line], least_width=tile)


def _summary(masks: PhotoMasks, size: tuple[int, int]) -> str:
    """How many masks a photo has, and how much of it they cover, as seen at this size."""
    covered = float((stack(masks, size).top >= 0).mean())
    return f"{number(masks.count, 'mask')}, {covered:.0%} covered"


def number(count: int, what: str) -> str:
    """The count with its noun, in the plural where it must be."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def shown_name(photo: Photo) -> str:
    """The name of the photo's file."""
    return printable(Path(photo.path.name))


def load_small(
    photo: Photo, reader: MaskReader, side: int, max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, PhotoMasks | None]:
    """The photo upright, its longer side at most so many pixels, and its masks, if it has any.

    A large JPEG is decoded small.

    Raises:
        DataError: photo or masks cannot be read.
    """
    with at_hand(photo) as local:
        size = read_size(local.path, max_pixels)
        masks = reader(photo, (size[1], size[0]))
        small = fitted(size, min(side, max(size)))
        with reading(local.path):
            return resized(load_photo(local.path, max_pixels, at_least=small), small), masks


def enlarged(image: Image.Image, tile: int) -> Image.Image:
    """The image such that `reduce(FINE)` has a longer side of `tile` pixels."""
    width, height = fitted(image.size, tile)
    return resized(image, (FINE * width, FINE * height))


def fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height in the same proportion, the longer one being `side`; at least 1 each."""
    width, height = (max(1, round(length * side / max(size))) for length in size)
    return width, height


def shown_photos(photos: Sequence[Photo], count: int, tile: int) -> list[Photo]:
    """So many photos from the first to the last, for a sheet; all, if there are no more.

    Raises:
        ConfigError: with two pictures of `tile` pixels each, they would be too many.
        DataError: there is none.
    """
    if not photos:
        raise DataError("there are no photos to show")
    count = min(count, len(photos))
    if count * 2 * tile * tile > MAX_SHEET_PIXELS:
        raise ConfigError(f"a sheet of {count} photos, {tile} pixels each, is too large; show less")
    return evenly_spaced(photos, count)
