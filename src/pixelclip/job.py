"""Segment many photos and write the results; a broken photo does not stop the others."""

import io
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from PIL import Image

from pixelclip.backbones import load_backbone
from pixelclip.config import SegmentConfig
from pixelclip.errors import ConfigError, DataError
from pixelclip.files import printable
from pixelclip.images import (
    Photo,
    check_writable,
    find_photos,
    for_overlay,
    load_photo,
    png_bytes,
    write_bytes,
)
from pixelclip.plan import Plan
from pixelclip.progress import progress_bar
from pixelclip.samples import sample_photos
from pixelclip.segmentation import ClassArea, Segmentation
from pixelclip.segmenter import Prepared, Segmenter
from pixelclip.vocabulary import parse_classes


class Output(NamedTuple):
    """What is written and printed.

    Attributes:
        folder: for the results.
        masks: RLE and polygons in the JSON of each photo.
        scores: score maps as NPZ.
        overlay: overlay pictures.
        json: print a summary as JSON on stdout.
        quiet: print errors only.
    """

    folder: Path
    masks: bool = False
    scores: bool = False
    overlay: bool = True
    json: bool = False
    quiet: bool = False


def segment_photos(
    paths: list[Path],
    *,
    classes: str | None,
    model: str,
    checkpoint: Path | None,
    device: str,
    attention: str,
    config: SegmentConfig,
    output: Output,
) -> int:
    """Segment photos and folders; without any, the sample photos with words of their own.

    Returns:
        0: all done; 1: some photos failed, they are listed.

    Raises:
        PixelClipError: nothing could be done.
    """
    groups = _groups(paths, classes)
    backbone = load_backbone(model, checkpoint=checkpoint, device=device, attention=attention)
    check_writable(output.folder)
    done: dict[Photo, dict[str, object]] = {}
    failed: dict[Photo, str] = {}
    with progress_bar(quiet=output.quiet) as bar:
        task = bar.add_task("segmenting", total=sum(len(photos) for _, photos in groups))
        for names, photos in groups:
            segmenter = Segmenter(backbone, parse_classes(names), config=config)
            for item in _results(segmenter, photos, output):
                try:
                    if isinstance(item, _Failure):
                        raise item.error
                    done[item.photo] = _write(item, segmenter, output)
                except DataError as error:
                    failed[item.photo] = str(error)
                bar.advance(task)
    everything = [photo for _, photos in groups for photo in photos]
    records = [done[photo] for photo in everything if photo in done]
    failures = [(printable(p.path), failed[p]) for p in everything if p in failed]
    _print(records, failures, output)
    if not records:
        raise DataError(failures[0][1] if len(failures) == 1 else "no photo could be segmented")
    return 1 if failures else 0


def _groups(paths: list[Path], classes: str | None) -> list[tuple[str, list[Photo]]]:
    """Photos with the words they are segmented with."""
    if paths:
        if classes is None:
            raise ConfigError('no class names; give some, as in --classes "cat, sofa, window"')
        parse_classes(classes)
        return [(classes, find_photos(paths))]
    samples = sample_photos()
    if classes is not None:
        parse_classes(classes)
        return [(classes, [Photo(path, Path(path.stem)) for path, _ in samples])]
    return [(own, [Photo(path, Path(path.stem))]) for path, own in samples]


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
            image = load_photo(photo.path, segmenter.config.max_pixels)
            prepared = segmenter.prepare(image)
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


def _write(item: _Success, segmenter: Segmenter, output: Output) -> dict[str, object]:
    """Write the files of one photo; the JSON comes last, so that it stands for a whole set."""
    base, result = output.folder / item.photo.stem, item.result

    def beside(suffix: str) -> Path:
        return base.with_name(base.name + suffix)

    write_bytes(beside(".labels.png"), png_bytes(Image.fromarray(result.labels)))
    if item.picture is not None:
        write_bytes(beside(".overlay.png"), png_bytes(result.overlay(item.picture)))
    if output.scores and result.scores is not None:
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer, scores=result.scores.astype(np.float16), classes=np.array(result.classes)
        )
        write_bytes(beside(".scores.npz"), buffer.getvalue())
    record = describe(item.photo.path, result, segmenter, masks=output.masks)
    text = json.dumps(record, indent=2, ensure_ascii=False)
    write_bytes(beside(".json"), f"{text}\n".encode())
    return record


def describe(
    path: Path, result: Segmentation, segmenter: Segmenter, *, masks: bool = False
) -> dict[str, object]:
    """What the JSON beside a label map says; specified in docs/formats.md."""
    height, width = result.labels.shape
    areas = result.areas()
    record: dict[str, object] = {
        "photo": printable(path),
        "width": width,
        "height": height,
        "classes": list(result.classes),
        "areas": areas,
        "no_class_pixels": height * width - sum(area["pixels"] for area in areas),
        "no_class_label": result.none,
        "model": segmenter.backbone.card.name,
        "settings": segmenter.description(),
    }
    if masks:
        record["rle"] = result.rles()
        record["polygons"] = result.polygons()
    return record


def _print(done: list[dict[str, object]], failures: list[tuple[str, str]], output: Output) -> None:
    if output.json:
        failed = [{"photo": photo, "error": error} for photo, error in failures]
        print(
            json.dumps(
                {"output": printable(output.folder), "photos": done, "failed": failed}, indent=2
            )
        )
    elif done and not output.quiet:
        for record in done[:20]:
            areas = cast(list[ClassArea], record["areas"])
            shares = ", ".join(f"{area['name']} {100 * area['share']:.0f} %" for area in areas[:6])
            print(f"{record['photo']}: {shares or 'no class'}")
        if len(done) > 20:
            print(f"and {len(done) - 20} more")
        look = " (look at *.overlay.png)" if output.overlay else ""
        print(f"{len(done)} photo(s) -> {printable(output.folder)}/{look}")
    if done or len(failures) > 1:
        for _, error in failures:
            print(f"pixelclip: failed: {error}", file=sys.stderr)
