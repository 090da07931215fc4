"""Which photos form which batch, as a function of the seed; the number of processes is no part."""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Bool, Int64

from pixelclip.errors import DataError
from pixelclip.images import MAX_PIXELS, read_size
from pixelclip.photos import Photo

_THREADS = 8  # reading headers is waiting for the disk


def wider(photos: Sequence[Photo], max_pixels: int = MAX_PIXELS) -> Bool[np.ndarray, " N"]:
    """Whether each photo is wider than high; true as well where it is too large or unreadable."""

    def is_wide(photo: Photo) -> bool:
        try:
            width, height = read_size(photo.path, max_pixels)
        except DataError:  # met again, and reported, when the photo is loaded
            return True
        return width > height

    with ThreadPoolExecutor(_THREADS) as pool:
        return np.fromiter(pool.map(is_wide, photos), dtype=bool, count=len(photos))


def global_batches(
    wide: Bool[np.ndarray, " N"], *, batch_size: int, seed: int, start: int = 0
) -> Iterator[Int64[np.ndarray, " B"]]:
    """Photo indices of batch `start`, `start` + 1, ... of an endless sequence.

    Each epoch runs through all photos in an order of its own. They are laid in two piles, wide
    photos and others, and a pile that is full is a batch (detectron2's grouping by aspect ratio,
    behaviour.md 8j, here over all processes). A pile begun in one epoch is filled in the next.

    Args:
        wide: the pile of each photo; all the same where photos need no grouping.
        batch_size: photos in a batch, all processes together. May exceed the number of photos,
            which then come more than once.
        seed: of the orders.
        start: number of the first batch.
    """
    piles = [pile for pile in (wide, ~wide) if pile.any()]
    sizes = [int(pile.sum()) for pile in piles]

    def batches_before(epoch: int) -> int:
        return sum(epoch * size // batch_size for size in sizes)

    epoch = start * batch_size // len(wide)  # at this point no less than `start` - 1 are full
    while batches_before(epoch) > start:
        epoch -= 1
    while batches_before(epoch + 1) <= start:
        epoch += 1
    skip = start - batches_before(epoch)
    begun = [
        _last_of_pile(pile, epoch, epoch * size % batch_size, seed)
        for pile, size in zip(piles, sizes, strict=True)
    ]
    for now in itertools.count(epoch):
        batches, begun = _one_epoch(_permutation(len(wide), seed, now), piles, begun, batch_size)
        yield from batches[skip:]
        skip = 0


def _permutation(count: int, seed: int, epoch: int) -> Int64[np.ndarray, " N"]:
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


def _last_of_pile(
    pile: Bool[np.ndarray, " N"], epoch: int, count: int, seed: int
) -> Int64[np.ndarray, " _"]:
    """The last `count` photos that came to a pile before an epoch."""
    last = np.empty(0, dtype=np.int64)
    while len(last) < count:
        epoch -= 1
        order = _permutation(len(pile), seed, epoch)
        last = np.concatenate([order[pile[order]], last])
    return last[len(last) - count :]


def _one_epoch(
    order: Int64[np.ndarray, " N"],
    piles: list[Bool[np.ndarray, " N"]],
    begun: list[Int64[np.ndarray, " _"]],
    batch_size: int,
) -> tuple[list[Int64[np.ndarray, " B"]], list[Int64[np.ndarray, " _"]]]:
    """The batches that become full in an epoch, in this sequence, and the piles it leaves."""
    full: list[tuple[int, Int64[np.ndarray, " B"]]] = []
    left = []
    for pile, before in zip(piles, begun, strict=True):
        places = np.flatnonzero(pile[order])
        photos = np.concatenate([before, order[places]])
        end = len(photos) - len(photos) % batch_size
        last_places = places[batch_size - 1 - len(before) :: batch_size]
        full += zip(last_places.tolist(), photos[:end].reshape(-1, batch_size), strict=True)
        left.append(photos[end:])
    return [batch for _, batch in sorted(full, key=lambda entry: entry[0])], left


def local_slice(count: int, rank: int, num_ranks: int) -> slice:
    """The part of a batch of `count` photos that is this process's: neighbouring photos.

    Processes get the same number of photos, or some one more.
    """
    return slice(count * rank // num_ranks, count * (rank + 1) // num_ranks)
