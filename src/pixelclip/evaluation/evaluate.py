"""Segment labelled photos and count how truth and prediction agree."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer

from pixelclip.errors import DataError
from pixelclip.evaluation.datasets import SegmentationDataset
from pixelclip.evaluation.metrics import Counts, count_photo, mean_iou, no_counts
from pixelclip.evaluation.report import Report, Scores, make_report
from pixelclip.plan import Plan
from pixelclip.segmenter import Prepared, Segmenter

PIECE = 16  # pairs that are done together: who does which never shows in the figures
AHEAD = 4  # pairs that are read while others are in the network

Pair = tuple[Path, Path]


class Compared(NamedTuple):
    """A photo's counts, or why there are none.

    Attributes:
        number: of the pair among those given, from 0.
        counts: None if the pair could not be used.
        error: one line; empty if it could.
        labels: of the photo, in its own pixels; None if the pair could not be used.
    """

    number: int
    counts: Counts | None
    error: str = ""
    labels: Integer[np.ndarray, "H W"] | None = None


class _Read(NamedTuple):
    number: int
    prepared: Prepared
    truth: Integer[np.ndarray, "H W"]


def compare(
    segmenter: Segmenter, dataset: SegmentationDataset, pairs: Sequence[Pair]
) -> Iterator[Compared]:
    """Segment photos and compare them with their labels, in any order.

    Photos and labels are read in a thread, ahead of the network. Photos of one shape share
    forward passes, always the same ones for the same pairs.

    Args:
        segmenter: its classes are the data set's.
        dataset: of the pairs.
        pairs: photos and label maps.
    """
    waiting: dict[Plan, list[_Read]] = defaultdict(list)
    for item in _read_ahead(segmenter, dataset, pairs):
        if isinstance(item, Compared):
            yield item
            continue
        same = waiting[item.prepared.plan]
        same.append(item)
        if len(same) == segmenter.config.batch_size:
            yield from _run(segmenter, dataset, waiting.pop(item.prepared.plan))
    for items in waiting.values():
        yield from _run(segmenter, dataset, items)


def _read_ahead(
    segmenter: Segmenter, dataset: SegmentationDataset, pairs: Sequence[Pair]
) -> Iterator[_Read | Compared]:
    """The pairs in their order, a few of them read before they are asked for."""
    queue: deque[Future[_Read | Compared]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for index, pair in enumerate(pairs):
            queue.append(pool.submit(_read, segmenter, dataset, index, pair))
            if len(queue) > AHEAD:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def _read(
    segmenter: Segmenter, dataset: SegmentationDataset, index: int, pair: Pair
) -> _Read | Compared:
    photo, label_path = pair
    try:
        truth = dataset.truth(label_path)
        prepared = segmenter.prepare(photo)
    except DataError as error:
        return Compared(index, None, str(error))
    if truth.shape != (prepared.height, prepared.width):
        return Compared(
            index,
            None,
            f"{label_path} is {truth.shape[1]} x {truth.shape[0]}, its photo"
            f" {prepared.width} x {prepared.height}",
        )
    # Truth may come as 8 bytes per pixel; what waits is kept small.
    return _Read(index, prepared, truth.astype(np.uint16, copy=False))


def _run(
    segmenter: Segmenter, dataset: SegmentationDataset, items: list[_Read]
) -> Iterator[Compared]:
    results = segmenter.run([item.prepared for item in items])
    for item, result in zip(items, results, strict=True):
        labels = with_background(result.labels, dataset)
        counts = count_photo(item.truth, labels, len(dataset.classes))
        yield Compared(item.number, counts, labels=labels)


def with_background(
    labels: Integer[np.ndarray, "H W"], dataset: SegmentationDataset
) -> Integer[np.ndarray, "H W"]:
    """Labels where "no class" is the data set's background, if it has one."""
    background = background_of(dataset)
    if background is None:
        return labels
    return np.where(labels < len(dataset.classes), labels, labels.dtype.type(background))


def background_of(dataset: SegmentationDataset) -> int | None:
    """Index of the class `background` (with any synonyms); None where there is none."""
    names = [name.split(",")[0].strip() for name in dataset.classes]
    return names.index("background") if "background" in names else None


def evaluate(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    on_photo: Callable[[], None] = lambda: None,
) -> Report:
    """Segment every photo and compare with its labels; broken pairs are listed, not fatal.

    The same figures as of `pixelclip eval`, in this process and with nothing kept on disk.

    Args:
        segmenter: its classes are the data set's.
        dataset: photos with labels.
        on_photo: called after each photo, for progress.

    Raises:
        DataError: no pair could be used.
    """
    total = no_counts(len(dataset.classes))
    mious = np.full(len(dataset.pairs), np.nan)
    errors: dict[int, str] = {}
    for first in range(0, len(dataset.pairs), PIECE):
        for item in compare(segmenter, dataset, dataset.pairs[first : first + PIECE]):
            if item.counts is None:
                errors[first + item.number] = item.error
            else:
                total += item.counts
                mious[first + item.number] = mean_iou(item.counts.confusion)
            on_photo()
    failed = [errors[index] for index in sorted(errors)]
    return make_report(segmenter, dataset, Scores(total, mious, failed))
