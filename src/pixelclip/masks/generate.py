"""Make the masks of many photos; a killed run goes on where it stopped."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from pixelclip.errors import DataError
from pixelclip.images import MAX_PIXELS, Photo, check_writable, read_photo, read_size
from pixelclip.masks.names import photo_name
from pixelclip.masks.runs import PhotoMasks
from pixelclip.masks.store import (
    MANIFEST,
    Row,
    make_row,
    read_manifest,
    shard_path,
    shard_photos,
    write_manifest,
    write_shard,
)
from pixelclip.progress import progress_bar
from pixelclip.workers import check_not_importing, end_with_parent

PACKAGES = ("pixelclip", "numpy", "pillow", "scikit-image", "pyarrow")

MaskSource = Callable[[UInt8[np.ndarray, "H W 3"]], PhotoMasks]
Failure = tuple[Path, str]


def generate(  # noqa: PLR0913 - a job and its limits; each is said once, by name
    photos: Sequence[Photo],
    out: Path,
    *,
    source: MaskSource,
    name: str,
    settings: dict[str, object],
    workers: int = 1,
    quiet: bool = False,
    shard_size: int = 256,
    max_pixels: int = MAX_PIXELS,
) -> list[Failure]:
    """Write a mask store; shards that are there already are kept.

    Args:
        photos: their order does not matter.
        out: folder of the store.
        source: makes the masks of an upright photo; goes to the worker processes.
        name: of the source, for the manifest.
        settings: of the source, for the manifest: all that decides what it makes.
        workers: processes; the store is the same whatever their number.
        quiet: show no progress.
        shard_size: photos per shard; what a killed run loses at most.
        max_pixels: photos with more pixels get no masks.

    Returns:
        The photos that have no masks, each with one line that says why.

    Raises:
        ConfigError: a worker process of the caller has got here as it was started.
        DataError: the folder cannot be written, or holds a store of other photos or settings.
    """
    check_not_importing()
    photos = sorted(photos, key=photo_name)
    check_writable(out)
    _claim(out, _job(photos, name, settings, shard_size))
    shards = [photos[at : at + shard_size] for at in range(0, len(photos), shard_size)]
    failures = []
    with progress_bar(quiet=quiet) as bar, _mapper(workers) as run:
        task = bar.add_task("making masks", total=len(photos))
        for index, shard in enumerate(shards):
            if shard_path(out, index).exists():
                failures += _left_out(shard_path(out, index), shard)
                bar.advance(task, len(shard))
                continue
            rows = []
            results = run(partial(_row, source, max_pixels), shard)
            for photo, made in zip(shard, results, strict=True):
                if isinstance(made, Row):
                    rows.append(made)
                else:
                    failures.append((photo.path, made))
                bar.advance(task)
            write_shard(out, index, rows)
    return failures


def _job(
    photos: Sequence[Photo], name: str, settings: dict[str, object], shard_size: int
) -> dict[str, object]:
    """What decides the content of every shard."""
    names = json.dumps([photo_name(photo) for photo in photos])
    return {
        "source": name,
        "settings": settings,
        "photos": len(photos),
        "photos_sha256": hashlib.sha256(names.encode()).hexdigest(),
        "shard_size": shard_size,
    }


def _claim(out: Path, job: dict[str, object]) -> None:
    """Write the manifest, or make sure that the one there is of the same job."""
    if not (out / MANIFEST).exists():
        versions = {package: version(package) for package in PACKAGES}
        write_manifest(out, {**job, "versions": versions})
        return
    there = read_manifest(out)
    for key, value in json.loads(json.dumps(job)).items():  # as it is read: no tuples
        if there.get(key) != value:
            raise DataError(
                f"{out} holds masks with other {key} ({there.get(key)!r}, now {value!r});"
                " choose another folder"
            )


def _left_out(path: Path, shard: Sequence[Photo]) -> list[Failure]:
    """The photos that a finished shard should have and has not."""
    done = set(shard_photos(path))
    missing = (photo for photo in shard if photo_name(photo) not in done)
    return [(photo.path, "failed in an earlier run") for photo in missing]


def _row(source: MaskSource, max_pixels: int, photo: Photo) -> Row | str:
    """The masks of a photo, or why there are none."""
    try:
        read_size(photo.path, max_pixels)
        pixels = np.asarray(read_photo(photo.path, max_pixels))
        return make_row(photo_name(photo), source(pixels))
    except DataError as error:
        return str(error)


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterator[Row | str]]]:
    """`map`, in this process or over several; results come in order."""
    if workers == 1:
        yield map
        return
    try:
        # Spawned: a fork would inherit the locks of threads that a caller has started.
        with ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent) as pool:
            try:
                yield pool.map
            except BrokenProcessPool:
                for process in list(pool._processes.values()):
                    process.kill()  # the pool asks them to end, and they do not listen
                raise
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died, perhaps for want of memory; start again with fewer workers,"
            " finished shards are kept"
        ) from error
