"""Segment many photos and write the results; a broken photo does not stop the others."""

import errno
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, cast

from PIL import Image

from pixelclip.backbones import Backbone
from pixelclip.backbones.means import Means
from pixelclip.config import SegmentConfig
from pixelclip.errors import ConfigError, DataError
from pixelclip.files import printable
from pixelclip.images import check_writable, for_overlay, load_photo, write_json
from pixelclip.jobs.run import Summary, make_crew, run
from pixelclip.jobs.work import Do, Outcome, Piece, cut
from pixelclip.masks.refiner import MadeBefore, Refiner, check_apart, find_masks
from pixelclip.masks.refiner import is_light as has_light_masks
from pixelclip.output import (
    Output,
    files_of,
    is_done,
    output_identity,
    read_record,
    stamp_of,
    write_result,
)
from pixelclip.photos import Photo, at_hand, find_photos
from pixelclip.plan import Plan
from pixelclip.samples import sample_photos
from pixelclip.segmentation import ClassArea, Segmentation
from pixelclip.segmenter import Prepared, Segmenter
from pixelclip.vocabulary import parse_classes
from pixelclip.workers import threads

MANIFEST = "pixelclip.manifest.json"
FORMAT, VERSION = "pixelclip-segment", 1
PIECE = 32  # photos that are read together, so that those of one shape share forward passes
SHOWN = 20
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # then no other photo can be written either


def segment_photos(
    paths: Sequence[Path | str],
    *,
    classes: str | None,
    means: Means,
    config: SegmentConfig,
    output: Output,
    refine: str | None = None,
    workers: int | None = None,
    engine: str = "local",
) -> int:
    """Segment photos and folders; without any, the sample photos with words of their own.

    What is there already, of the same photo, model, words and settings, is kept.

    Args:
        paths: photos, folders, and places for fsspec (`s3://bucket/photos`).
        classes: for `parse_classes`.
        means: the model.
        config: settings of the segmenter.
        output: what is written and printed.
        refine: masks of which each gets one class: the name of a source, a file or a folder.
        workers: processes; by default one, or with mini and many photos one per core.
        engine: `local`, or `ray`.

    Returns:
        0: all done; 1: some photos failed, they are listed.

    Raises:
        PixelClipError: nothing could be done.
    """
    photos, words = _photos(paths, classes)
    check_apart(refine, output.folder)
    masks = None if refine is None else find_masks(refine, photos)
    backbone = means.load()
    is_mini = backbone.card.family == "mini" and backbone.device.type == "cpu"
    is_light = is_mini and has_light_masks(refine)
    gpu = backbone.device.type == "cuda"
    crew = make_crew(len(photos), workers, engine, is_light=is_light, gpu=gpu)
    with threads(crew.threads):  # as in worker processes: features of words depend on it
        segmenters = _segmenters(words, backbone, config, masks)
    if output.scores:
        segmenters[words[0]].check_scores()
    check_writable(output.folder)
    settings = segmenters[words[0]].description()
    manifest = {"model": backbone.card.name, "classes": words, "settings": settings}
    _write_manifest(output.folder, manifest, photos, None)
    is_here = crew.engine == "local" and crew.workers == 1
    work = SegmentWork(means, config, tuple(words), output, masks, segmenters if is_here else None)
    if not is_here:
        del backbone, segmenters  # the workers have their own
    pieces = cut(photos, _piece_size(len(photos), len(words), crew.workers))
    summary = run(work, pieces, crew, what="segmenting", quiet=output.quiet)
    _write_manifest(output.folder, manifest, photos, summary)
    _print(photos, summary, output)
    if not summary.new + summary.kept:
        failed = summary.failed
        raise DataError(failed[0][1] if len(failed) == 1 else "no photo could be segmented")
    return 1 if summary.failed else 0


def _photos(
    paths: Sequence[Path | str], classes: str | None
) -> tuple[list[Photo], tuple[str, ...]]:
    """Photos, and the words for all of them or for each."""
    if paths:
        if classes is None:
            raise ConfigError('no class names; give some, as in --classes "cat, sofa, window"')
        parse_classes(classes)
        return find_photos(paths), (classes,)
    samples = sample_photos()
    photos = [Photo(path, Path(path.stem)) for path, _ in samples]
    return photos, tuple(own for _, own in samples) if classes is None else (classes,)


def _segmenters(
    words: Sequence[str], backbone: Backbone, config: SegmentConfig, masks: str | MadeBefore | None
) -> dict[str, Segmenter]:
    """A segmenter for each text of class names; they share the model, and that of the masks."""
    refiner = None if masks is None else Refiner(masks, str(backbone.device))
    return {
        names: Segmenter(backbone, parse_classes(names), config=config, refine=refiner)
        for names in words
    }


def _piece_size(photos: int, texts: int, workers: int) -> int:
    """Photos per piece: small enough to keep all workers busy to the end."""
    return 1 if texts > 1 else min(PIECE, max(1, photos // (4 * workers)))


@dataclass(frozen=True)
class SegmentWork:
    """Photos become label maps, overlays and JSON.

    Attributes:
        means: the model.
        config: settings of the segmenter.
        classes: words of all pieces, or of each.
        output: what is written.
        masks: of which each gets one class: the name of a source, or those made before.
        segmenters: of these words, where they are loaded already.
    """

    means: Means
    config: SegmentConfig
    classes: tuple[str, ...]
    output: Output
    masks: str | MadeBefore | None = None
    segmenters: dict[str, Segmenter] | None = None

    def start(self) -> Do:
        """A function that segments the photos of a piece; the model is loaded but once."""
        segmenters = self.segmenters or _segmenters(
            self.classes, self.means.load(), self.config, self.masks
        )

        @cache
        def identity_for(names: str) -> str:
            return output_identity(segmenters[names], self.output)

        def do(piece: Piece) -> Iterator[Outcome]:
            names = self.classes[piece.number % len(self.classes)]
            segmenter, identity = segmenters[names], identity_for(names)
            stamps = {}
            for photo in piece.photos:
                try:
                    stamp = stamp_of(photo, identity)
                except DataError as error:
                    yield Outcome(photo, str(error))
                    continue
                if is_done(photo, self.output, stamp):
                    yield Outcome(photo, is_new=False)
                else:
                    stamps[photo] = stamp
            for item in _results(segmenter, list(stamps), self.output):
                if isinstance(item, _Failure):
                    yield Outcome(item.photo, str(item.error))
                else:
                    yield self._written(item, segmenter, stamps[item.photo])

        return do

    def _written(self, item: "_Success", segmenter: Segmenter, stamp: str) -> Outcome:
        """Write the results of a photo.

        Raises:
            DataError: there is no room for any more.
        """
        try:
            write_result(*item, segmenter=segmenter, output=self.output, stamp=stamp)
        except DataError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL:
                raise
            return Outcome(item.photo, str(error))
        return Outcome(item.photo)


class _Waiting(NamedTuple):
    """A photo that was read: what the network gets, and what the overlay is drawn on."""

    photo: Photo
    prepared: Prepared
    picture: Image.Image | None


class _Success(NamedTuple):
    photo: Photo
    result: Segmentation
    picture: Image.Image | None


class _Failure(NamedTuple):
    photo: Photo
    error: DataError


def _results(
    segmenter: Segmenter, photos: list[Photo], output: Output
) -> Iterator[_Success | _Failure]:
    """Each photo with its segmentation, or with the reason why there is none.

    Photos of one shape share forward passes, so the order is not kept. A photo is let go as soon
    as it is resized, so large ones stay small in memory.
    """
    waiting: dict[Plan, list[_Waiting]] = defaultdict(list)
    size = segmenter.config.batch_size
    for photo in photos:
        try:
            with at_hand(photo) as local:
                image = load_photo(local.path, segmenter.config.max_pixels)
            prepared = segmenter.prepare(image, photo)
            if output.scores:
                segmenter.check_score_size(prepared.height, prepared.width)
        except DataError as error:
            yield _Failure(photo, error)
            continue
        picture = for_overlay(image) if output.overlay else None
        waiting[prepared.plan].append(_Waiting(photo, prepared, picture))
        del image
        if len(waiting[prepared.plan]) == size:
            yield from _run(segmenter, waiting.pop(prepared.plan), output)
        elif sum(map(len, waiting.values())) >= 4 * size:
            fullest = max(waiting, key=lambda plan: len(waiting[plan]))
            yield from _run(segmenter, waiting.pop(fullest), output)
    for items in waiting.values():
        yield from _run(segmenter, items, output)


def _run(segmenter: Segmenter, items: list[_Waiting], output: Output) -> Iterator[_Success]:
    results = segmenter.run([item.prepared for item in items], scores=output.scores)
    for item, result in zip(items, results, strict=True):
        yield _Success(item.photo, result, item.picture)


def _write_manifest(
    folder: Path, what: Mapping[str, object], photos: Sequence[Photo], summary: Summary | None
) -> None:
    """Say what the folder holds; without a summary, what it is going to hold."""
    document: dict[str, object] = {
        "format": FORMAT,
        "version": VERSION,
        **what,
        "photos": len(photos),
        "finished": summary is not None,
    }
    if summary is not None:
        document |= {"new": summary.new, "kept": summary.kept, "failed": _failures(summary)}
    write_json(folder / MANIFEST, document)


def _failures(summary: Summary) -> list[dict[str, str]]:
    return [{"photo": photo.shown, "error": error} for photo, error in summary.failed]


def _print(photos: Sequence[Photo], summary: Summary, output: Output) -> None:
    failed = {photo for photo, _ in summary.failed}
    done = [photo for photo in photos if photo not in failed]
    if output.json:
        _print_json(done, summary, output)
    elif done and not output.quiet:
        for photo in done[:SHOWN]:
            record = read_record(files_of(photo, output)[-1])
            areas = cast(list[ClassArea], record["areas"])
            shares = ", ".join(f"{area['name']} {100 * area['share']:.0f} %" for area in areas[:6])
            print(f"{record['photo']}: {shares or 'no class'}")
        if len(done) > SHOWN:
            print(f"and {len(done) - SHOWN} more")
        kept = f", {summary.kept} of them were there already" if summary.kept else ""
        look = " (look at *.overlay.png)" if output.overlay else ""
        print(f"{len(done)} photo(s) -> {printable(output.folder)}/{look}{kept}")
    if done or len(summary.failed) > 1:
        for _, error in summary.failed:
            print(f"pixelclip: failed: {error}", file=sys.stderr)


def _print_json(done: Sequence[Photo], summary: Summary, output: Output) -> None:
    """One document, written record by record: a million of them need no memory."""
    head = json.dumps({"output": printable(output.folder), "new": summary.new})
    print(f'{head[:-1]}, "photos": [', end="")
    for index, photo in enumerate(done):
        record = read_record(files_of(photo, output)[-1])
        print("," if index else "", json.dumps(record), sep="\n", end="")
    print(f'],\n"failed": {json.dumps(_failures(summary))}}}')
