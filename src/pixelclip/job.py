"""Segment many photos and write the results; a broken photo does not stop the others."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from PIL import Image
from rich.console import Console

import pixelclip
from pixelclip.backbones import load_backbone
from pixelclip.config import SegmentConfig
from pixelclip.errors import ConfigError, DataError
from pixelclip.images import Photo, find_photos, for_overlay, png_bytes, read_photo, write_bytes
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
    _check_writable(output.folder)
    backbone = load_backbone(model, checkpoint=checkpoint, device=device, attention=attention)
    done: list[dict[str, object]] = []
    failed: list[dict[str, str]] = []
    with progress_bar(quiet=output.quiet) as bar:
        task = bar.add_task("segmenting", total=sum(len(photos) for _, photos in groups))
        for names, photos in groups:
            segmenter = Segmenter(backbone, parse_classes(names), config=config)
            for photo, result, picture in _results(segmenter, photos, scores=output.scores):
                if isinstance(result, Segmentation) and picture is not None:
                    done.append(_write(photo, result, picture, segmenter, output))
                else:
                    failed.append({"photo": str(photo.path), "error": str(result)})
                bar.advance(task)
    if not done:
        more = f" (and {len(failed) - 1} more photos failed)" if len(failed) > 1 else ""
        raise DataError(failed[0]["error"] + more)
    _print(done, failed, output)
    return 1 if failed else 0


def _groups(paths: list[Path], classes: str | None) -> list[tuple[str, list[Photo]]]:
    """Photos with the words they are segmented with."""
    if paths:
        if classes is None:
            raise ConfigError('no class names; give some, as in --classes "cat, sofa, window"')
        parse_classes(classes)
        return [(classes, find_photos(paths))]
    return [(classes or own, [Photo(path, Path(path.stem))]) for path, own in sample_photos()]


def _check_writable(folder: Path) -> None:
    """Fail before the work, not after it."""
    probe = folder / ".pixelclip-probe"
    write_bytes(probe, b"")
    probe.unlink()


class _Waiting(NamedTuple):
    """A photo that was read: what the network gets, and what the overlay is drawn on."""

    photo: Photo
    prepared: Prepared
    picture: Image.Image


def _results(
    segmenter: Segmenter, photos: list[Photo], *, scores: bool
) -> Iterator[tuple[Photo, Segmentation | DataError, Image.Image | None]]:
    """Each photo with its segmentation, or with the reason why there is none, and its picture.

    A photo is let go as soon as it is resized, so a batch of large ones stays small in memory.
    """
    waiting: list[_Waiting] = []
    for photo in photos:
        try:
            image = read_photo(photo.path, segmenter.config.max_pixels)
        except DataError as error:
            yield photo, error, None
            continue
        waiting.append(_Waiting(photo, segmenter.prepare(image), for_overlay(image)))
        del image
        if len(waiting) == segmenter.config.batch_size:
            yield from _run(segmenter, waiting, scores=scores)
            waiting = []
    yield from _run(segmenter, waiting, scores=scores)


def _run(
    segmenter: Segmenter, waiting: list[_Waiting], *, scores: bool
) -> Iterator[tuple[Photo, Segmentation, Image.Image]]:
    results = segmenter.run([item.prepared for item in waiting], scores=scores)
    for item, result in zip(waiting, results, strict=True):
        yield item.photo, result, item.picture


def _write(
    photo: Photo,
    result: Segmentation,
    picture: Image.Image,
    segmenter: Segmenter,
    output: Output,
) -> dict[str, object]:
    """Write the files of one photo; the JSON comes last, so that it stands for a whole set."""
    base = output.folder / photo.stem

    def beside(suffix: str) -> Path:
        return base.with_name(base.name + suffix)

    write_bytes(beside(".labels.png"), png_bytes(Image.fromarray(result.labels)))
    if output.overlay:
        write_bytes(beside(".overlay.png"), png_bytes(result.overlay(picture)))
    if output.scores and result.scores is not None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, scores=result.scores.astype(np.float16),
                            classes=np.array(result.classes))  # fmt: skip
        write_bytes(beside(".scores.npz"), buffer.getvalue())
    record = describe(photo.path, result, segmenter, masks=output.masks)
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
        "photo": str(path),
        "width": width,
        "height": height,
        "classes": list(result.classes),
        "areas": areas,
        "no_class_pixels": height * width - sum(area["pixels"] for area in areas),
        "no_class_label": result.none,
        "model": segmenter.backbone.card.name,
        "templates": list(segmenter.templates),
        "settings": segmenter.config.model_dump(),
        "version": pixelclip.__version__,
    }
    if masks:
        record["rle"] = result.rles()
        record["polygons"] = result.polygons()
    return record


def _print(done: list[dict[str, object]], failed: list[dict[str, str]], output: Output) -> None:
    if output.json:
        summary = {"output": str(output.folder), "photos": done, "failed": failed}
        print(json.dumps(summary, indent=2, ensure_ascii=False))
    elif not output.quiet:
        console = Console(highlight=False, markup=False)
        for record in done[:20]:
            areas = cast(list[ClassArea], record["areas"])
            shares = ", ".join(f"{area['name']} {100 * area['share']:.0f} %" for area in areas[:6])
            console.print(f"{record['photo']}: {shares or 'no class'}", soft_wrap=True)
        if len(done) > 20:
            console.print(f"and {len(done) - 20} more")
        console.print(f"{len(done)} photo(s) -> {output.folder}/ (look at *.overlay.png)")
    for failure in failed:
        print(f"pixelclip: failed: {failure['error']}", file=sys.stderr)
