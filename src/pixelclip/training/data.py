"""Photos with masks to batches, in worker processes; the same batches for any number of them."""

import multiprocessing
import os
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pixelclip.errors import ConfigError, DataError
from pixelclip.images import load_photo, read_size, reading, to_rgb
from pixelclip.masks.annotations import MaskReader
from pixelclip.masks.runs import PhotoMasks
from pixelclip.photos import Photo
from pixelclip.training.batch import Batch
from pixelclip.training.colour import distort, vary_colour
from pixelclip.training.order import global_batches, local_slice
from pixelclip.training.views import (
    MAX_MASK_BYTES,
    Geometry,
    ViewSettings,
    crop_photo,
    draw_geometry,
    draw_rectangle,
    sample_masks,
    to_frame,
)
from pixelclip.workers import check_not_importing, end_with_parent

MAX_TRIES = 1000
Key = tuple[int, int]


class Problem(NamedTuple):
    """A photo that could not be used, and why."""

    path: Path
    message: str


@dataclass(frozen=True, eq=False)
class Sample:
    """One photo's part of a batch.

    Attributes:
        weak: the teacher's view, in the upper left corner of a square of the crop's size.
        strong: the student's view; None: there is none.
        size: height and width of the views.
        masks: on the grid over the square.
        problems: photos tried in vain before this one.
        broken_masks: annotations of the photo that could not be used, or are too many.
    """

    weak: UInt8[Tensor, "3 H H"]
    strong: UInt8[Tensor, "3 H H"] | None
    size: tuple[int, int]
    masks: Bool[Tensor, "M m m"]
    problems: tuple[Problem, ...]
    broken_masks: int


class LoadedBatch(NamedTuple):
    """A batch and what went wrong on the way: photos replaced, annotations left out."""

    batch: Batch
    problems: list[Problem]
    broken_masks: int


class TrainPhotos(Dataset[Sample]):
    """Random views of photos with their masks.

    The key of a sample is its position in the endless sequence of the run and the index of the
    photo. Everything random comes from a generator seeded with the settings' seed and the
    position, so processes and workers play no part.

    Views are padded to a square of the crop's size, whatever photos they share a batch with. The
    authors pad to the largest view of the batch; that is the same wherever one of them fills the
    crop, as nearly always.

    A photo that cannot be read, or whose annotation is unusable, is replaced by a random one, and
    not tried again by this process. Its views would be drawn from a generator of their own, so
    what is remembered changes nothing. A photo without annotation is one without masks.
    """

    def __init__(self, photos: Sequence[Photo], reader: MaskReader, settings: ViewSettings):
        # One text, as each worker gets a copy: a million objects take 15 s and 1 GB.
        names = [os.fsencode(path) for photo in photos for path in (photo.path, photo.stem)]
        self._names = b"\0".join(names)
        self._starts = np.cumsum([0, *(len(name) + 1 for name in names)])
        self.reader = reader
        self.settings = settings
        self._failed: dict[int, str] = {}

    def __len__(self) -> int:
        """Number of photos."""
        return len(self._starts) // 2

    def photo(self, index: int) -> Photo:
        """The photo of an index."""
        first, last = self._starts[[2 * index, 2 * index + 2]]
        path, stem = self._names[first : last - 1].split(b"\0")
        return Photo(Path(os.fsdecode(path)), Path(os.fsdecode(stem)))

    def __getitem__(self, key: Key) -> Sample:
        """The sample of a key.

        Raises:
            DataError: neither its photo nor any of the others tried can be used.
        """
        position, first = key
        problems: list[Problem] = []
        for index in self._candidates(position, first):
            photo, attempt = self.photo(index), [len(problems)] if problems else []
            random = np.random.default_rng([self.settings.seed, 1, position, *attempt])
            try:
                if index not in self._failed:
                    return self._sample(photo, random, problems)
            except DataError as error:
                self._failed[index] = str(error)
            problems.append(Problem(photo.path, self._failed[index]))
        raise DataError(
            f"{len(problems)} photos in a row cannot be used for training; the first:"
            f" {problems[0].message}"
        )

    def _candidates(self, position: int, index: int) -> Iterator[int]:
        """A photo and those to replace it: random ones, none of them twice."""
        random = np.random.default_rng([self.settings.seed, 2, position])
        tried = {index}
        yield index
        while len(tried) < min(MAX_TRIES, len(self)):
            index = int(random.integers(len(self)))
            if index not in tried:
                tried.add(index)
                yield index

    def _sample(self, photo: Photo, random: np.random.Generator, problems: list[Problem]) -> Sample:
        settings = self.settings
        view, geometry, masks = load_view(
            photo, self.reader, settings, lambda size: draw_geometry(random, size, settings)
        )
        if settings.colour:
            view = vary_colour(view, random)
        strong, rectangle = None, None
        if settings.strong_view:
            strong = to_frame(distort(view, random), settings.crop_size)
            rectangle = draw_rectangle(random, view.width, view.height)
            strong[:, rectangle.top : rectangle.bottom, rectangle.left : rectangle.right] = 0
        grid = torch.empty(0, settings.mask_size, settings.mask_size, dtype=torch.bool)
        return Sample(
            weak=to_frame(view, settings.crop_size),
            strong=strong,
            size=(view.height, view.width),
            masks=grid if masks is None else sample_masks(masks, geometry, settings, rectangle),
            problems=tuple(problems),
            broken_masks=0 if masks is None else masks.broken,
        )


def load_view(
    photo: Photo,
    reader: MaskReader,
    settings: ViewSettings,
    place: Callable[[tuple[int, int]], Geometry],
) -> tuple[Image.Image, Geometry, PhotoMasks | None]:
    """A view of a photo, where it lies, and the masks of the photo: the largest, if too many.

    Args:
        photo: of which a view is wanted.
        reader: of its masks.
        settings: of the view.
        place: where the view lies in a photo of this width and height.

    Raises:
        DataError: the photo or its annotation cannot be used.
    """
    width, height = read_size(photo.path, settings.max_pixels)
    geometry = place((width, height))
    masks = reader(photo, (height, width))
    if masks is not None:
        masks = masks.largest(max(1, MAX_MASK_BYTES // settings.mask_size**2))
    with reading(photo.path):
        pixels = load_photo(photo.path, settings.max_pixels, at_least=geometry.resized)
        view = crop_photo(to_rgb(pixels), geometry)
    return view, geometry, masks


def collate(samples: Sequence[Sample]) -> LoadedBatch:
    """The samples as one batch."""
    strong = [sample.strong for sample in samples if sample.strong is not None]
    batch = Batch(
        weak=torch.stack([sample.weak for sample in samples]),
        strong=torch.stack(strong) if strong else None,
        sizes=torch.tensor([sample.size for sample in samples]),
        masks=tuple(sample.masks for sample in samples),
    )
    problems = [problem for sample in samples for problem in sample.problems]
    return LoadedBatch(batch, problems, sum(sample.broken_masks for sample in samples))


def make_loader(
    photos: TrainPhotos,
    wide: Bool[np.ndarray, " N"],
    *,
    batch_size: int,
    start: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Generator[LoadedBatch, None, None]:
    """This process's share of batch `start`, `start` + 1, ... of an endless sequence.

    Workers start with the first batch that is asked for, and end when the iterator is closed or
    this process dies, however it does.

    Args:
        photos: the samples.
        wide: whether each photo is wider than high, to group them by that; or all the same.
        batch_size: photos per batch, over all processes.
        start: number of the first batch.
        rank: of this process.
        num_ranks: processes.
        num_workers: worker processes of this process; 0: it reads by itself.
        pin_memory: for copies to a GPU in the background.

    Raises:
        ConfigError: there are no photos, or fewer in a batch than processes.
        ConfigError: or a worker process of the caller has got here as it was started.
        DataError: too many photos in a row cannot be used, or a worker died.
    """
    check_not_importing()
    if batch_size < num_ranks:
        raise ConfigError(f"a batch of {batch_size} photos cannot feed {num_ranks} processes")
    if len(wide) == 0:
        raise ConfigError("there are no photos to train on")
    keys = _keys(wide, batch_size, photos.settings.seed, start, slice_of=(rank, num_ranks))
    with warnings.catch_warnings():
        # Of more workers than processors: the user's choice.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loader = DataLoader(
            _Outcomes(photos),
            batch_sampler=keys,
            num_workers=num_workers,
            collate_fn=_collate_or_error,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            multiprocessing_context=_context() if num_workers else None,
            generator=torch.Generator(),  # the loader draws a seed, which must not move torch's own
        )
    return _batches(loader)


class _Outcomes(Dataset[Sample | DataError]):
    """Samples, or errors as values: one raised in a worker comes back as a traceback in a text."""

    def __init__(self, photos: TrainPhotos) -> None:
        self.photos = photos

    def __getitem__(self, key: Key) -> Sample | DataError:
        try:
            return self.photos[key]
        except DataError as error:
            return error


def _collate_or_error(outcomes: Sequence[Sample | DataError]) -> LoadedBatch | DataError:
    for outcome in outcomes:
        if isinstance(outcome, DataError):
            return outcome
    return collate([outcome for outcome in outcomes if isinstance(outcome, Sample)])


def _batches(loader: DataLoader[Sample | DataError]) -> Generator[LoadedBatch, None, None]:
    try:
        for loaded in loader:
            if isinstance(loaded, DataError):
                raise loaded
            yield loaded
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(
            "a process that reads photos died, as a rule for want of memory; start fewer"
            " (num_workers), or give shared memory more room (Docker: --shm-size)"
        ) from error


def _keys(
    wide: Bool[np.ndarray, " N"],
    batch_size: int,
    seed: int,
    start: int,
    *,
    slice_of: tuple[int, int],
) -> Iterator[list[Key]]:
    """The keys of each batch of this process."""
    share = local_slice(batch_size, *slice_of)
    batches = global_batches(wide, batch_size=batch_size, seed=seed, start=start)
    for number, batch in enumerate(batches, start):
        positions = range(number * batch_size, (number + 1) * batch_size)
        yield list(zip(positions[share], batch[share].tolist(), strict=True))


def _context() -> multiprocessing.context.BaseContext:
    """How workers start: never by forking this process, whose threads may hold locks."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports torch once, not once per worker
    return context


def _start_worker(number: int) -> None:
    """In a worker: one thread for work, and one that ends it with the main process.

    PyTorch watches for the death of a worker's parent, but that is the fork server, which in turn
    lives as long as its workers.
    """
    torch.set_num_threads(1)
    end_with_parent()
