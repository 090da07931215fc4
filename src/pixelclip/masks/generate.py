"""Make the masks of many photos; a killed run goes on where it stopped."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from pydantic import BaseModel

from pixelclip.errors import ConfigError, DataError
from pixelclip.images import MAX_PIXELS, check_writable, read_photo, read_size
from pixelclip.jobs.run import Crew, Summary, run
from pixelclip.jobs.work import Do, Outcome, Piece
from pixelclip.masks.annotations import MaskReader
from pixelclip.masks.names import photo_name
from pixelclip.masks.rounds import claim
from pixelclip.masks.runs import PhotoMasks
from pixelclip.masks.sources import MASK_SOURCES, MaskSource
from pixelclip.masks.store import (
    Row,
    make_row,
    read_rows,
    shard_failures,
    shard_path,
    shard_photos,
    write_shard,
)
from pixelclip.photos import Photo, at_hand

Made = Row | str  # the masks of a photo, or why there are none


@runtime_checkable
class Maker(Protocol):
    """How masks are come by; goes to worker processes as it is and is started once in each."""

    def start(self) -> Callable[[Sequence[Photo]], Iterator[Made]]:
        """A function from photos to their rows, in their order."""
        ...


@dataclass(frozen=True)
class FromPixels:
    """Masks that a source makes of the photo itself.

    Attributes:
        source: its name in `MASK_SOURCES`.
        settings: of the source.
        device: auto, cpu, cuda, cuda:N or mps.
        max_pixels: photos with more pixels get no masks.
    """

    source: str
    settings: BaseModel
    device: str = "auto"
    max_pixels: int = MAX_PIXELS

    def start(self) -> Callable[[Sequence[Photo]], Iterator[Made]]:
        """Set the source up."""
        source = MASK_SOURCES[self.source]().make(self.settings, self.device)

        def make(photos: Sequence[Photo]) -> Iterator[Made]:
            for at in range(0, len(photos), source.batch_size):
                yield from _make(source, photos[at : at + source.batch_size], self.max_pixels)

        return make


@dataclass(frozen=True)
class FromAnnotations:
    """Masks that others have made.

    Attributes:
        reader: of the annotations.
        max_pixels: photos with more pixels get no masks.
    """

    reader: MaskReader
    max_pixels: int = MAX_PIXELS

    def start(self) -> Callable[[Sequence[Photo]], Iterator[Made]]:
        """Nothing is set up."""
        return lambda photos: map(self._read, photos)

    def _read(self, photo: Photo) -> Made:
        try:
            with at_hand(photo) as local:
                width, height = read_size(local.path, self.max_pixels)
            read = getattr(self.reader, "with_details", self.reader)
            masks = read(photo, (height, width))
            if masks is None:
                return f"{photo.shown} has no masks there"
            return make_row(photo_name(photo), masks)
        except DataError as error:
            return str(error)


@dataclass(frozen=True)
class MadeBy:
    """What makes masks, and what a manifest says of it.

    Attributes:
        maker: of the masks.
        source: its name.
        settings: all that decides what it makes.
    """

    maker: Maker
    source: str
    settings: Mapping[str, object]


def generate(
    photos: Sequence[Photo],
    out: Path,
    made_by: MadeBy,
    *,
    crew: Crew = Crew(),  # noqa: B008 - it cannot be changed
    shard_size: int | None = None,
    retry: bool = False,
    quiet: bool = False,
) -> Summary:
    """Write a mask store; masks that are there already are kept.

    Photos that were not there when the store was begun are a further round, whose shards follow;
    the masks of photos that are gone stay.

    Args:
        photos: their order does not matter.
        out: folder of the store.
        made_by: what makes the masks.
        crew: who does it; the store is the same whoever does.
        shard_size: photos per shard, what a killed worker loses at most; by the number of photos
            if it is not given.
        retry: try photos again that failed in an earlier run.
        quiet: show no progress.

    Returns:
        How many photos got masks, and those that have none, each with one line that says why.

    Raises:
        ConfigError: the shard size is wrong, or a worker process of the caller has got here as it
            was started.
        DataError: the folder cannot be written, or holds a store of other settings or a damaged
            one.
        MissingExtra: Ray is not installed.
    """
    if shard_size is not None and shard_size < 1:
        raise ConfigError(f"shards of {shard_size} photos; at least 1 is needed")
    photos = sorted(photos, key=photo_name)
    check_writable(out)
    source, settings = made_by.source, made_by.settings
    pieces = claim(out, photos, source=source, settings=settings, shard_size=shard_size)
    work = MaskWork(out, made_by.maker, retry)
    return run(work, pieces, crew, what="making masks", quiet=quiet)


@dataclass(frozen=True)
class MaskWork:
    """Pieces become shards.

    Attributes:
        out: folder of the store.
        maker: of the masks.
        retry: try photos again that failed.
    """

    out: Path
    maker: Maker
    retry: bool = False

    def start(self) -> Do:
        """A function that writes the shard of a piece; the maker is started when it is needed."""
        make: Callable[[Sequence[Photo]], Iterator[Made]] | None = None

        def do(piece: Piece) -> Iterator[Outcome]:
            nonlocal make
            done = _done(shard_path(self.out, piece.number), retry=self.retry)
            todo = []
            for photo in piece.photos:
                if photo_name(photo) in done:
                    yield Outcome(photo, done[photo_name(photo)], is_new=False)
                else:
                    todo.append(photo)
            if not todo:
                return
            make = make or self.maker.start()
            made: dict[str, Made] = {}
            for photo, one in zip(todo, make(todo), strict=True):
                made[photo_name(photo)] = one
                yield Outcome(photo, one if isinstance(one, str) else "")
            self._write(piece.number, made)

        return do

    def _write(self, number: int, made: Mapping[str, Made]) -> None:
        """Write a shard: what is new, and what was there."""
        path = shard_path(self.out, number)
        known: dict[str, Made] = {}
        if path.exists():
            known |= shard_failures(path)
            known |= {row.photo: row for row in read_rows(path)}
        known.update(made)
        ordered = sorted(known.items())
        rows = [one for _, one in ordered if isinstance(one, Row)]
        failures = [(name, one) for name, one in ordered if isinstance(one, str)]
        write_shard(self.out, number, rows, failures)


def _done(path: Path, *, retry: bool) -> dict[str, str]:
    """The photos that need not be tried again, and why one has no masks."""
    if not path.exists():
        return {}
    failed = {} if retry else dict(shard_failures(path))
    return failed | dict.fromkeys(shard_photos(path), "")


def _make(source: MaskSource, photos: Sequence[Photo], max_pixels: int) -> list[Made]:
    """The rows of photos that are given to a source at once."""
    made: dict[int, Made] = {}
    images = {}
    for index, photo in enumerate(photos):
        try:
            with at_hand(photo) as local:
                images[index] = np.asarray(read_photo(local.path, max_pixels))
        except DataError as error:
            made[index] = str(error)
    for index, masks in zip(images, _masks(source, list(images.values())), strict=True):
        made[index] = (
            f"{photos[index].shown}: {masks}"
            if isinstance(masks, str)
            else make_row(photo_name(photos[index]), masks)
        )
    return [made[index] for index in range(len(photos))]


def _masks(source: MaskSource, images: list[np.ndarray]) -> list[PhotoMasks | str]:
    """The masks of each image; if there are none of one, that does not touch the others."""
    try:
        return list(source(images)) if images else []
    except DataError as error:
        if len(images) == 1:
            return [str(error)]
        return [masks for image in images for masks in _masks(source, [image])]
