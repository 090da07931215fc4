"""How long do a crop's masks take from their run-length codes, here and by decoding each mask?

    python benchmarks/mask_sampling.py

100 made-up masks of a photo of 1500 x 2250 pixels, with SA-1B's number of runs (blobs with ragged
edges), sampled at 256 x 256 points of a crop of 640 x 640 and of the whole photo. "Decoded" is
hotcoco's `decode`, then rows and columns by index; "runs" is `from_rle`, then `PhotoMasks.sample`,
made contiguous. Both start at the compressed codes and must give the same bits. One core is
enough: neither uses more.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from hotcoco import mask as codec
from jaxtyping import Bool
from scipy import ndimage

from pixelclip.masks.runs import from_rle

HEIGHT, WIDTH = 1500, 2250
POINTS = 256


def make_codes(count: int, generator: np.random.Generator) -> list[bytes]:
    """COCO codes of ragged blobs, a tenth to half of the photo wide."""
    masks = np.zeros((count, HEIGHT, WIDTH), dtype=bool)
    for mask in masks:
        side = int(generator.integers(150, 750))
        noise = ndimage.gaussian_filter(generator.standard_normal((side, side)), sigma=6)
        y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
        top, left = generator.integers(HEIGHT - side), generator.integers(WIDTH - side)
        mask[top : top + side, left : left + side] = x**2 + y**2 + 2 * noise < 0.6
    encoded = [codec.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    return [bytes(code["counts"]) for code in encoded]


def by_decoding(
    codes: list[bytes], rows: np.ndarray, columns: np.ndarray
) -> Bool[np.ndarray, "M h w"]:
    """Each mask decoded and indexed."""
    size = [HEIGHT, WIDTH]
    decoded = (codec.decode({"size": size, "counts": code}) for code in codes)
    return np.array([mask[rows[:, None], columns] for mask in decoded]).astype(bool)


def by_runs(codes: list[bytes], rows: np.ndarray, columns: np.ndarray) -> Bool[np.ndarray, "M h w"]:
    """All masks sampled at once."""
    return np.ascontiguousarray(from_rle(HEIGHT, WIDTH, codes).sample(rows, columns))


def milliseconds(call: Callable[[], object], repeats: int) -> list[float]:
    """Time of each of some calls, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return times[1:]


def main() -> None:
    """Print the medians and the fastest and slowest of both ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--masks", type=int, default=100)
    options = parser.parse_args()
    codes = make_codes(options.masks, np.random.default_rng(0))
    runs = len(from_rle(HEIGHT, WIDTH, codes).starts)
    print(f"{options.masks} masks, {runs} runs; numpy {np.__version__}, {platform.machine()}")
    for name, top, left, height, width in [
        ("crop", 430, 800, 640, 640),
        ("whole photo", 0, 0, HEIGHT, WIDTH),
    ]:
        rows = top + np.arange(POINTS) * height // POINTS
        columns = left + np.arange(POINTS) * width // POINTS
        same = np.array_equal(by_decoding(codes, rows, columns), by_runs(codes, rows, columns))
        for way in (by_decoding, by_runs):
            times = milliseconds(partial(way, codes, rows, columns), options.repeats)
            spread = f"{min(times):.1f} to {max(times):.1f}"
            print(f"{name:12} {way.__name__:12} {statistics.median(times):7.1f} ms ({spread})")
        print(f"{name:12} equal: {same}")
        if not same:
            raise SystemExit("the masks differ")


if __name__ == "__main__":
    main()
