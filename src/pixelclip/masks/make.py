"""The public door: masks for photos, from a source by name or from what others have made."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from pixelclip.errors import ConfigError, DataError
from pixelclip.images import MAX_PIXELS
from pixelclip.jobs.run import Summary, make_crew
from pixelclip.masks.annotations import count_known, open_masks
from pixelclip.masks.generate import FromAnnotations, FromPixels, MadeBy, generate
from pixelclip.masks.sources import described, find_source, source_settings
from pixelclip.masks.store import MANIFEST, read_manifest
from pixelclip.photos import Photo, find_photos

DEFAULT_SOURCE = "superpixels"
IMPORTED = "annotations"  # what a manifest calls masks of others


def make_masks(  # noqa: PLR0913 - the public door: each option is said once, by name
    photos: str | Path | Sequence[str | Path] | Sequence[Photo],
    output: str | Path,
    *,
    source: str | None = None,
    masks: str | Path | None = None,
    settings: Mapping[str, object] | None = None,
    device: str = "auto",
    workers: int | None = None,
    engine: str = "local",
    shard_size: int | None = None,
    retry: bool = False,
    max_pixels: int = MAX_PIXELS,
    quiet: bool = True,
) -> Summary:
    """Make class-agnostic masks of photos; the same call again finishes what was not done.

    Args:
        photos: a photo, a folder, a place for fsspec (`s3://bucket/photos`), or several; or what
            `find_photos` found.
        output: folder of the mask store (docs/formats.md).
        source: superpixels, mini, dino or sam; of a store that is there already its own.
        masks: take the masks in this file or folder instead (SA-1B, COCO, label maps, a store).
        settings: of the source, by name; `checkpoint` is a path.
        device: auto, cpu, cuda, cuda:N or mps.
        workers: processes; by default one, but with superpixels, mini and many photos one per core.
        engine: `local`, or `ray`.
        shard_size: photos per shard; what a killed worker loses at most.
        retry: try photos again that failed in an earlier run.
        max_pixels: photos with more pixels get no masks.
        quiet: show no progress.

    Returns:
        `new` and `kept`: photos with masks made now and earlier; `failed`: photos without masks,
        each with one line that says why.

    Raises:
        ConfigError: source, settings, workers or engine are wrong.
        DataError: there are no photos, or the folder holds masks of another job.
        ModelError: a model cannot be loaded.
    """
    found, output, values = _found(photos), Path(output), settings or {}
    if masks is None:
        name, chosen = _chosen(output, source, values)
        light = find_source(name).is_light
        gpu = (not light or device not in ("auto", "cpu")) and _is_gpu(device)
        made_by = MadeBy(FromPixels(name, chosen, device, max_pixels), name, described(chosen))
    elif source is None and not values:
        light = gpu = False
        made_by = _made_by_others(found, Path(masks), max_pixels)
    else:
        raise ConfigError("--masks takes masks of others; --source and its settings make some")
    crew = make_crew(len(found), workers, engine, is_light=light, gpu=gpu)
    return generate(
        found, output, made_by, crew=crew, shard_size=shard_size, retry=retry, quiet=quiet
    )


def _made_by_others(photos: Sequence[Photo], path: Path, max_pixels: int) -> MadeBy:
    reader = open_masks(path, photos, details=True)
    if not count_known(reader, photos):
        raise DataError(f"none of the photos has masks in {path}; names must match")
    return MadeBy(FromAnnotations(reader, max_pixels), IMPORTED, {"path": str(path.resolve())})


def _found(photos: str | Path | Sequence[str | Path] | Sequence[Photo]) -> list[Photo]:
    if isinstance(photos, str | Path):
        return find_photos([photos])
    known = [photo for photo in photos if isinstance(photo, Photo)]
    return known or find_photos([path for path in photos if isinstance(path, str | Path)])


def _chosen(
    output: Path, source: str | None, settings: Mapping[str, object]
) -> tuple[str, BaseModel]:
    """Source and settings: those given, else those of the store that is there."""
    if source is None and not settings and (output / MANIFEST).exists():
        name, stored = how_made(output)
        if name == IMPORTED:
            raise ConfigError(f"{output} holds masks of others: say --masks again, as then")
        if needs_files(stored):
            raise ConfigError(
                f"{output} was made with weights of yours: say --source and them again"
            )
        return name, source_settings(name, stored)
    name = source or DEFAULT_SOURCE
    return name, source_settings(name, settings)


def needs_files(settings: Mapping[str, object]) -> bool:
    """Whether a store was made with files that only their hashes are known of."""
    return any(name.endswith("_sha256") for name in settings)


def how_made(store: Path) -> tuple[str, dict[str, object]]:
    """Source and settings of a store.

    Raises:
        DataError: it is none, or does not say.
    """
    manifest = read_manifest(store)
    name, settings = manifest.get("source"), manifest.get("settings")
    if not isinstance(name, str) or not isinstance(settings, dict):
        raise DataError(f"{store} does not say how its masks were made; choose another folder")
    return name, settings


def _is_gpu(device: str) -> bool:
    """Whether the source computes on a GPU; a wrong device is told before anything is written."""
    from pixelclip.device import choose_device  # loads torch, which superpixels do without

    return choose_device(device).type == "cuda"
