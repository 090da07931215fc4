"""Make masks, then look at them, score them, export them: what `pixelclip masks` does."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from pixelclip.errors import ConfigError, DataError
from pixelclip.files import printable
from pixelclip.images import check_writable, png_bytes, write_bytes
from pixelclip.jobs.run import Summary
from pixelclip.masks.annotations import open_masks
from pixelclip.masks.export import export_coco, export_labels, export_sa1b
from pixelclip.masks.make import IMPORTED, how_made, make_masks, needs_files
from pixelclip.masks.pictures import contact_sheet
from pixelclip.masks.score import RegionTruth, open_truth, score
from pixelclip.masks.store import MANIFEST, count_masks
from pixelclip.photos import Photo, find_photos

SCORES = {
    "recall_50": "recall at IoU 0.5",
    "recall_70": "recall at IoU 0.7",
    "mean_best_iou": "mean best IoU",
    "covering": "covering",
    "coverage": "photo under masks",
}
EXPORTS = {"sa1b": export_sa1b, "coco": export_coco, "labels": export_labels}


@dataclass(frozen=True)
class MaskJob:
    """What is asked for.

    Attributes:
        output: folder of the store; None: nothing is made, `masks` are used as they are.
        source: of the masks.
        masks: those of others.
        settings: of the source, by name.
        device: auto, cpu, cuda, cuda:N or mps.
        workers: processes.
        engine: local or ray.
        shard_size: photos per shard.
        retry: try photos again that failed.
        max_pixels: photos with more pixels get no masks.
        score: true regions to compare with.
        show: draw a contact sheet.
        clusters: model whose clusters the masks are shown by.
        export: where the masks go in another format.
        export_format: sa1b, coco or labels.
    """

    output: Path | None
    source: str | None
    masks: Path | None
    settings: Mapping[str, object]
    device: str
    workers: int | None
    engine: str
    shard_size: int | None
    retry: bool
    max_pixels: int
    score: Path | None
    show: bool
    clusters: str | None
    export: Path | None
    export_format: str

    @property
    def pictures(self) -> Path:
        """Where pictures go."""
        return (self.output or Path("pixelclip-masks")) / "pictures"

    @property
    def wants_more(self) -> bool:
        """Whether masks are asked for to do something with them."""
        return self.show or any(it is not None for it in (self.score, self.clusters, self.export))


def run_mask_job(paths: Sequence[str], job: MaskJob, *, as_json: bool, quiet: bool) -> int:
    """Do what is asked for, and say what came of it.

    Returns:
        0: all done; 1: some photos failed, they are listed.

    Raises:
        PixelClipError: nothing could be done.
    """
    _check(job)
    photos = find_photos(list(paths))
    report: dict[str, object] = {"photos": len(photos)}
    failed: dict[str, str] = {}
    truth = None if job.score is None else open_truth(job.score, photos)
    if job.output is not None and not _is_to_be_used_as_it_is(job.output, job):
        made = _make(photos, job, quiet=quiet)
        report |= {"output": printable(job.output), "new": made.new, "kept": made.kept}
        report["masks"] = count_masks(job.output)
        failed = {photo.shown: error for photo, error in made.failed}
        without = {photo for photo, _ in made.failed}
        photos = [photo for photo in photos if photo not in without]
    if photos and job.wants_more:
        report |= _more(photos, truth, job, failed, quiet=quiet)
    report["failed"] = [{"photo": photo, "error": error} for photo, error in failed.items()]
    if as_json:
        print(json.dumps(report))
    elif photos and not quiet:
        _print(report)
    if not photos:
        raise DataError(f"no photo got masks; first: {next(iter(failed.values()))}")
    for error in failed.values():
        print(f"pixelclip: failed: {error}", file=sys.stderr)
    return 1 if failed else 0


def _check(job: MaskJob) -> None:
    """Make sure that the job makes sense, before the work and not after it."""
    if job.export_format not in EXPORTS:
        raise ConfigError(
            f"unknown --format {job.export_format!r}; available: {', '.join(EXPORTS)}"
        )
    if job.output is None and not job.wants_more:
        raise ConfigError("nothing to do with --masks: add -o to import them, --show or --score")
    if job.export is not None:
        is_file = job.export_format == "coco"
        if is_file and job.export.is_dir():
            raise ConfigError(f"--export {job.export} is a folder; COCO's format is one file")
        check_writable(job.export.parent if is_file else job.export)
    if job.show or job.clusters is not None:
        check_writable(job.pictures)


def _is_to_be_used_as_it_is(output: Path, job: MaskJob) -> bool:
    """Whether a store is only looked at that could not be finished without saying more."""
    says_more = job.source is not None or job.settings or job.masks is not None
    if says_more or not job.wants_more or not (output / MANIFEST).exists():
        return False
    name, settings = how_made(output)
    return name == IMPORTED or needs_files(settings)


def _make(photos: Sequence[Photo], job: MaskJob, *, quiet: bool) -> Summary:
    return make_masks(
        photos,
        cast(Path, job.output),
        source=job.source,
        masks=job.masks,
        settings=job.settings,
        device=job.device,
        workers=job.workers,
        engine=job.engine,
        shard_size=job.shard_size,
        retry=job.retry,
        max_pixels=job.max_pixels,
        quiet=quiet,
    )


def _more(
    photos: Sequence[Photo],
    truth: RegionTruth | None,
    job: MaskJob,
    failed: dict[str, str],
    *,
    quiet: bool,
) -> dict[str, object]:
    """Score, pictures and export; photos that fail in one of them are added to `failed`."""
    reader = open_masks(job.output or job.masks, photos)
    report: dict[str, object] = {}
    if truth is not None:
        scored = score(reader, photos, truth, quiet=quiet, max_pixels=job.max_pixels)
        report["score"] = asdict(scored)
        failed |= {line: line for line in scored.failed}
    sheets = {}
    if job.show:
        sheets["sheet"] = contact_sheet(photos, reader, max_pixels=job.max_pixels)
    if job.clusters is not None:
        from pixelclip.training.clustered import clustered_sheet  # loads torch

        sheets["clusters"] = clustered_sheet(
            photos, reader, job.clusters, device=job.device, max_pixels=job.max_pixels
        )
    for name, sheet in sheets.items():
        path = job.pictures / f"{name}.masks.png"
        write_bytes(path, png_bytes(sheet.image))
        report[name] = printable(path)
        failed |= {photo.shown: error for photo, error in sheet.failures}
    if job.export is not None:
        exported = EXPORTS[job.export_format](reader, photos, job.export)
        report["export"] = {
            "path": printable(job.export),
            "format": job.export_format,
            "photos": exported.photos,
            "masks": exported.masks,
            "covered": exported.covered,
        }
        failed |= {printable(path): error for path, error in exported.left_out}
    return report


def _print(report: Mapping[str, Any]) -> None:
    if "output" in report:
        kept = f", {report['kept']} of them were there already" if report["kept"] else ""
        photos = report["new"] + report["kept"]
        print(f"{report['masks']} masks of {photos} photo(s) -> {report['output']}/{kept}")
        if not report["masks"]:
            print("the source found nothing at all: docs/masks.md says which settings it has")
    if "score" in report:
        score = report["score"]
        print(f"score over {score['regions']} regions of {score['photos']} photos, in percent")
        for name, text in SCORES.items():
            print(f"  {text:<28}{100 * score[name]:6.1f}")
        print(f"  {'masks per photo':<28}{score['masks_per_photo']:6.1f}")
    for name in ("sheet", "clusters"):
        if name in report:
            print(f"picture -> {report[name]}")
    if "export" in report:
        export = report["export"]
        print(f"{export['masks']} masks of {export['photos']} photo(s) -> {export['path']}")
        if export["covered"]:
            print(f"{export['covered']} masks lost pixels to smaller ones: a map holds one each")
