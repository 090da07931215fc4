"""COCO's run-length code and polygons; the only place that knows the codec.

Nothing given is taken for granted: what is damaged is told apart, in time and memory that grow
with the size of the photo and of the text only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from hotcoco import mask as codec
from jaxtyping import Bool, Float64, Int64

MAX_GROUPS = 7  # of 5 bits; a difference of two counts has 33


class Runs(NamedTuple):
    """The runs of foreground of some texts.

    Attributes:
        starts: first position of each run.
        ends: first position after each run.
        owners: index of the text of each run among the good ones.
        is_good: whether each text fills the photo.
    """

    starts: Int64[np.ndarray, " R"]
    ends: Int64[np.ndarray, " R"]
    owners: Int64[np.ndarray, " R"]
    is_good: Bool[np.ndarray, " T"]


def encode(edges: Int64[np.ndarray, " E"], height: int, width: int) -> bytes:
    """The text of a mask whose runs start and end, in turns, at these positions."""
    counts = np.diff(edges, prepend=0, append=height * width)
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    return _text(counts.tolist(), height, width)


def _text(counts: list[int], height: int, width: int) -> bytes:
    return codec.rle_to_string({"size": [height, width], "counts": counts}).encode()


def compressed(segmentation: object, height: int, width: int) -> bytes:
    """The compressed counts of a segmentation of a photo of this size; none if it has no such."""
    counts = segmentation
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [height, width]:
            return b""
        counts = segmentation.get("counts")
    pixels = height * width
    if not isinstance(counts, str | bytes | list) or len(counts) > 2 * pixels + 8:
        return b""  # no mask of that many pixels needs more characters
    if isinstance(counts, str):
        return counts.encode("ascii", "replace")  # a question mark is no character of the code
    if isinstance(counts, bytes):
        return counts
    if all(type(n) is int and 0 <= n <= pixels for n in counts) and sum(counts) == pixels:
        return _text(counts, height, width)
    return b""


def decode(texts: list[bytes], pixels: int) -> Runs:
    """The runs of those texts that fill a photo of so many pixels."""
    numbers, sizes = _numbers(texts)
    background, foreground, pairs = _lengths(numbers, sizes)
    owners = np.repeat(np.arange(len(texts)), pairs)
    is_length = (np.minimum(background, foreground) >= 0) & (
        np.maximum(background, foreground) <= pixels
    )
    ends = _sums(np.where(is_length, background + foreground, 0), pairs)
    is_good = ends[np.cumsum(pairs) - 1] == pixels
    is_good[owners[~is_length]] = False
    kept = is_good[owners] & (foreground > 0)
    ends, owners = ends[kept], (np.cumsum(is_good) - 1)[owners[kept]]
    starts = ends - foreground[kept]
    gaps = np.flatnonzero((starts[1:] != ends[:-1]) | (owners[1:] != owners[:-1]))
    if len(gaps) + 1 < len(starts):  # an empty background is allowed: the runs beside it are one
        lasts = np.append(gaps, len(ends) - 1)
        starts, ends, owners = starts[np.append(0, gaps + 1)], ends[lasts], owners[lasts]
    return Runs(starts, ends, owners, is_good)


def _numbers(texts: list[bytes]) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " T"]]:
    """The numbers of all texts, one after the other, and how many each text has.

    A number is written in groups of 5 bits, the lowest first, in characters from "0"; bit 5 says
    that another group follows, bit 4 of the last group is the sign. The first number of a damaged
    text is -1, which no good text begins with.
    """
    groups = np.frombuffer(b"".join(texts), dtype=np.uint8) - np.uint8(48)  # below "0": wraps
    text_stops = np.cumsum([len(text) for text in texts], dtype=np.int64)
    is_last = groups & 0x20 == 0
    is_damaged = groups >= 64
    is_damaged[text_stops - 1] |= ~is_last[text_stops - 1]
    is_last[text_stops - 1] = True  # so that no number reaches into the next text
    stops = np.flatnonzero(is_last) + 1
    sizes = np.diff(stops, prepend=0)
    starts = stops - sizes
    is_damaged[starts[sizes > MAX_GROUPS]] = True
    numbers = (groups[starts] & 0x1F).astype(np.int64)
    for place in range(1, MAX_GROUPS):
        longer = np.flatnonzero(sizes > place)  # few: most numbers have one or two groups
        numbers[longer] |= (groups[starts[longer] + place] & 0x1F).astype(np.int64) << 5 * place
    unused = 64 - 5 * np.minimum(sizes, MAX_GROUPS)
    numbers = numbers << unused >> unused  # carries the sign into the upper bits
    text_starts = np.searchsorted(starts, text_stops - [len(text) for text in texts])
    damaged = np.searchsorted(text_stops, np.flatnonzero(is_damaged), side="right")
    numbers[text_starts[damaged]] = -1
    return numbers, np.diff(text_starts, append=len(numbers))


def _lengths(
    numbers: Int64[np.ndarray, " N"], sizes: Int64[np.ndarray, " T"]
) -> tuple[Int64[np.ndarray, " P"], Int64[np.ndarray, " P"], Int64[np.ndarray, " T"]]:
    """Lengths of background and foreground in turns, and how many such pairs each text has.

    From the fourth number of a text on, numbers are differences to the number before the last,
    that is, to the last length of the same kind.
    """
    pairs = (sizes + 1) // 2
    stops = np.cumsum(pairs)
    firsts = stops - pairs
    shifts = 2 * firsts - (np.cumsum(sizes) - sizes)  # texts of odd size get a number more
    table = np.zeros((int(pairs.sum()), 2), dtype=np.int64)
    table.reshape(-1)[np.arange(len(numbers)) + np.repeat(shifts, sizes)] = numbers
    first_background = table[firsts, 0]
    table[firsts, 0] = 0  # no later number refers to it
    background, foreground = _sums(table[:, 0], pairs), _sums(table[:, 1], pairs)
    background[firsts] = first_background
    foreground[stops[sizes % 2 == 1] - 1] = 0
    return background, foreground, pairs


def _sums(
    values: Int64[np.ndarray, " N"], sizes: Int64[np.ndarray, " T"]
) -> Int64[np.ndarray, " N"]:
    """Cumulative sums that start anew with each text of that many values."""
    sums = np.cumsum(values)
    stops = np.cumsum(sizes)
    before = np.concatenate([[0], sums[stops[:-1] - 1]]) if len(stops) else stops
    return sums - np.repeat(before, sizes)


def rings_of(polygon: list[object], side: int) -> list[list[float]]:
    """The rings of a polygon; none if one of them is damaged or lies far outside the photo."""
    rings: list[list[float]] = []
    for ring in polygon:
        if not isinstance(ring, list) or len(ring) < 6 or len(ring) % 2:
            return []
        if not all(type(x) in {int, float} and -side <= x <= 2 * side for x in ring):
            return []
        rings.append([float(x) for x in ring])
    return rings


def drawing_cost(ring: list[float]) -> float:
    """Pixels and corners of a ring."""
    corners = np.array(ring).reshape(-1, 2)
    steps = np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1)
    return len(corners) + float(steps.sum())


def draw(rings: list[list[float]], height: int, width: int) -> bytes:
    """The text of the union of rings."""
    return codec.merge(codec.frPyObjects(rings, height, width))["counts"]


def overlaps(
    masks: Sequence[bytes], others: Sequence[bytes], height: int, width: int
) -> Float64[np.ndarray, "M N"]:
    """Intersection over union of every mask with every other, whole pixels counted."""
    if not masks or not others:
        return np.zeros((len(masks), len(others)))
    size = [height, width]
    left = [{"size": size, "counts": text} for text in masks]
    right = [{"size": size, "counts": text} for text in others]
    return np.asarray(codec.iou(left, right, [False] * len(right)))
