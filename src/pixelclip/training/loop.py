"""From photos and masks to a run directory, read from top to bottom."""

import hashlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import Tensor

from pixelclip.backbones import Backbone, load_backbone, save_backbone
from pixelclip.backbones.means import fingerprint
from pixelclip.backbones.sources import text_base
from pixelclip.checkpoint import ModelCard
from pixelclip.config import TrainConfig
from pixelclip.device import choose_device, wants_bfloat16
from pixelclip.errors import DataError
from pixelclip.jobs.run import Crew
from pixelclip.masks.annotations import MaskReader, count_known, open_masks
from pixelclip.masks.generate import FromPixels, MadeBy, generate
from pixelclip.masks.sources import described, source_settings
from pixelclip.photos import Photo, find_photos
from pixelclip.progress import Shown
from pixelclip.training.batch import Batch
from pixelclip.training.data import LoadedBatch, TrainPhotos, make_loader
from pixelclip.training.live import LiveMasks, WholePhotos
from pixelclip.training.model import PixelClip
from pixelclip.training.order import local_slice, wider
from pixelclip.training.parameters import make_optimizer
from pixelclip.training.pictures import ClusterPictures
from pixelclip.training.report import Report, TrainSummary
from pixelclip.training.run import RunDir
from pixelclip.training.state import collect, restore
from pixelclip.training.step import train_step
from pixelclip.training.views import ViewSettings
from pixelclip.workers import check_not_importing

log = logging.getLogger("pixelclip")

MODEL = "model.safetensors"
DEVICE_VARIABLE = "ACCELERATE_TORCH_DEVICE"
PACKAGES = ("pixelclip", "torch", "open_clip_torch", "timm", "accelerate", "pillow", "numpy")


@dataclass(frozen=True)
class TrainJob:
    """What is trained, on what, and where the result goes.

    Attributes:
        images: photos and folders of photos.
        masks: mask store, folder or file of annotations; None: superpixels are made first.
        live: `dino` or `mini`, which makes masks of each view while it is trained on.
        output: run directory; an unfinished run there is resumed.
        model: name, weight file or run directory to start from.
        checkpoint: weights that replace the model's.
        device: auto, cpu, cuda, cuda:N or mps.
    """

    images: tuple[Path, ...]
    masks: Path | None
    output: Path
    model: str = "mini"
    checkpoint: Path | None = None
    device: str = "auto"
    live: str | None = None


def run_job(job: TrainJob, config: TrainConfig, *, quiet: bool = False) -> TrainSummary:
    """Train, or go on with an unfinished run, and leave a model in the run directory.

    Raises:
        ConfigError: settings do not fit the model, or the run directory holds another run.
        DataError: photos, masks or the run directory cannot be used, or training diverges.
        ModelError: the model cannot be loaded.
    """
    check_not_importing()
    accelerator = make_accelerator(job.device, config)
    device, ranks = accelerator.device, accelerator.num_processes
    is_main, quiet = accelerator.is_main_process, quiet or not accelerator.is_main_process
    photos = own_photos(job)
    with torch.random.fork_rng(devices=[]):  # layers draw weights that are then replaced
        backbone = load_backbone(job.model, checkpoint=job.checkpoint, device=str(device))
        live = _live_masks(job, config, backbone)
        run = RunDir(job.output, _record(job, config, backbone, photos, live))
        card = _card(job, config, backbone, len(photos))
        model = PixelClip(backbone, config).to(device)
    optimizer = make_optimizer(model, config)
    reader = open_data(job, config, photos, run, accelerator, quiet=quiet)

    state = run.load()
    step = 0 if state is None else state["step"]
    recent = None if state is None else restore(state, model, optimizer, is_main=is_main)
    wrapped = accelerator.prepare_model(model)
    report = Report(job.output, config, step, recent, process=accelerator.process_index)
    batches = _batches(photos, reader, config, accelerator, step)
    pictures = ClusterPictures(photos, reader, view_settings(config), job.output / "pictures", live)

    def save(step: int) -> None:
        state = collect(step, model, optimizer, report.recent, accelerator, run.identity)
        if is_main:
            _save_model(job, model, backbone, card)
            run.save(state, config.keep_checkpoints)

    started, last = time.monotonic(), step == config.steps
    shown = Shown("training", config.steps, step, quiet=quiet)
    with closing(batches), shown, interruptible() as stop:
        while not last:
            began = time.monotonic()
            loaded = _next(batches, stop)
            if loaded is None:
                save(step)
                break
            waited = time.monotonic() - began
            parts = _parts(loaded.batch, live, config, accelerator, step)
            result = train_step(accelerator, wrapped, optimizer, parts, step, stop=stop.is_set())
            step += 1
            report.add(step, result, loaded, seconds=time.monotonic() - began, waited=waited)
            shown.update(step, report.note)
            if is_main and due(config.picture_every, step, config.steps):
                pictures.draw(model, step)
            last = step == config.steps or result.stopped or (ranks == 1 and stop.is_set())
            if last or step % config.checkpoint_every == 0:
                save(step)
    if is_main and not (job.output / MODEL).exists():
        _save_model(job, model, backbone, card)
    accelerator.wait_for_everyone()
    return report.summary(step, time.monotonic() - started)


def due(every: int, step: int, steps: int) -> bool:
    """Whether something that comes every so many steps, and at the end, is due; 0 is never."""
    return every > 0 and (step % every == 0 or step == steps)


def own_photos(job: TrainJob) -> list[Photo]:
    """The photos to train on; pictures in the run directory are none, even if it is among them.

    Raises:
        DataError: there are none.
    """
    own = job.output.resolve()
    photos = [p for p in find_photos(job.images) if own not in p.path.resolve().parents]
    if not photos:
        raise DataError(f"no photos in {', '.join(map(str, job.images))}")
    return photos


def open_data(
    job: TrainJob,
    config: TrainConfig,
    photos: list[Photo],
    run: RunDir,
    accelerator: Accelerator,
    *,
    quiet: bool,
) -> MaskReader:
    """The masks; the first process claims the run directory and makes masks if need be."""
    given: MaskReader | None = WholePhotos() if job.live else None
    if job.masks is not None:
        given = open_masks(job.masks, photos)
    if given is not None and not count_known(given, photos):
        raise DataError(
            f"none of the photos has masks in {job.masks}; do the masks belong to these photos?"
            " Names must match"
        )
    if accelerator.is_main_process:
        run.begin()
        if given is None:
            make_masks(job, photos, config, quiet=quiet)
    accelerator.wait_for_everyone()
    return given or open_masks(job.output / "masks", photos)


def make_masks(job: TrainJob, photos: list[Photo], config: TrainConfig, *, quiet: bool) -> None:
    """Superpixels of all photos, into the run directory; what is there already is kept."""
    settings = source_settings("superpixels", {})
    maker = FromPixels("superpixels", settings, max_pixels=config.max_pixels)
    made = generate(
        photos,
        job.output / "masks",
        MadeBy(maker, "superpixels", described(settings)),
        crew=Crew(workers=max(1, config.num_workers)),
        quiet=quiet,
    )
    for photo, message in made.failed[:10]:
        log.info("no masks for %s: %s", photo.shown, message)
    if len(made.failed) > 10:
        log.info("and for %d more photos", len(made.failed) - 10)


def _live_masks(job: TrainJob, config: TrainConfig, backbone: Backbone) -> LiveMasks | None:
    """What makes masks while training, if anything does.

    Raises:
        ModelError: its model cannot be loaded.
    """
    if job.live is None:
        return None
    colour = cast(Tensor, backbone.visual.mean)
    return LiveMasks(job.live, config, colour, str(backbone.device))


def _parts(
    batch: Batch, live: LiveMasks | None, config: TrainConfig, accelerator: Accelerator, step: int
) -> list[Batch]:
    """This process's micro-batches of a step, with masks, on the device."""
    batch = batch.to(accelerator.device)
    if live is not None:
        first, ranks = step * config.batch_size, accelerator.num_processes
        share = local_slice(config.batch_size, accelerator.process_index, ranks)
        batch = live(batch, range(first, first + config.batch_size)[share])
    return batch.split(config.micro_batches)


def view_settings(config: TrainConfig) -> ViewSettings:
    """The part of the settings that views are made by."""
    return ViewSettings(
        short_side=config.short_side,
        long_side=config.long_side,
        crop_size=config.crop_size,
        mask_size=config.mask_size,
        strong_view=config.strong_view,
        colour=config.colour,
        max_pixels=config.max_pixels,
        seed=config.seed,
        pad_masks=not config.authors_defects,
    )


def make_accelerator(device: str, config: TrainConfig) -> Accelerator:
    """Device, precision and processes; several where a launcher has started several.

    Raises:
        ConfigError: the device is unknown or not there.
    """
    where = choose_device(device)
    previous = os.environ.get(DEVICE_VARIABLE)
    if where.index is not None:
        os.environ[DEVICE_VARIABLE] = str(where)  # the only way to tell it
    make = partial(
        Accelerator,
        cpu=where.type == "cpu",
        mixed_precision="bf16" if wants_bfloat16(where, config.precision) else "no",
        # The first process may make masks while the others wait.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )
    try:
        return make()
    except ValueError:  # it remembers the precision of an earlier training in this process
        AcceleratorState._reset_state()
        return make()
    finally:
        os.environ.pop(DEVICE_VARIABLE, None)
        if previous is not None:
            os.environ[DEVICE_VARIABLE] = previous


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets: the step is ended and a checkpoint written.

    Several processes must stop after the same step: there the next one tells all. A second Ctrl-C
    stops at once. Outside the main thread, Python hands no signals on.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def stop(number: int, frame: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log.info("stopping after this step; the same command goes on from here")

    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(name, stop) for name in signals]
    try:
        yield event
    finally:
        for name, handler in zip(signals, previous, strict=True):
            signal.signal(name, handler)


def _next(batches: Iterator[LoadedBatch], stop: threading.Event) -> LoadedBatch | None:
    """The next batch; None if the signal that stops us has ended the workers too.

    Raises:
        DataError: photos cannot be used, or a worker died by itself.
    """
    try:
        return next(batches)
    except DataError:
        if stop.is_set():
            return None
        raise


def _batches(
    photos: list[Photo],
    reader: MaskReader,
    config: TrainConfig,
    accelerator: Accelerator,
    first: int,
) -> Generator[LoadedBatch, None, None]:
    """This process's share of the batches from step `first` on."""
    return make_loader(
        TrainPhotos(photos, reader, view_settings(config)),
        wider(photos, config.max_pixels)
        if config.same_aspect
        else np.ones(len(photos), dtype=bool),
        batch_size=config.batch_size,
        start=first,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
        num_workers=config.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )


def _record(
    job: TrainJob,
    config: TrainConfig,
    backbone: Backbone,
    photos: list[Photo],
    live: LiveMasks | None,
) -> dict[str, object]:
    """What `run.json` says of a run: all that decides its result, and versions."""
    names = json.dumps([photo.stem.as_posix() for photo in photos])
    return {
        "model": job.model,
        "weights": fingerprint(backbone),
        "images": [str(path.resolve()) for path in job.images],
        "masks": job.live if job.masks is None else str(job.masks.resolve()),
        **({} if live is None else {"mask_weights": live.weights}),
        "photos": len(photos),
        "photos_sha256": hashlib.sha256(names.encode()).hexdigest(),
        "settings": config.model_dump(mode="json"),
        "versions": {package: version(package) for package in PACKAGES},
    }


def _card(job: TrainJob, config: TrainConfig, backbone: Backbone, photos: int) -> ModelCard:
    """Card of the model that the run leaves."""
    base = text_base(job.model, job.checkpoint, backbone.card)
    training = {
        "from": job.model if job.checkpoint is None else f"{job.model} with {job.checkpoint}",
        "photos": photos,
        "settings": config.model_dump(mode="json"),
    }
    return backbone.card.model_copy(
        update={
            "name": job.output.resolve().name,
            "base": base,
            "text_hash": backbone.text_hash if base else "",
            "training": training,
        }
    )


def _save_model(job: TrainJob, model: PixelClip, backbone: Backbone, card: ModelCard) -> None:
    """Write the model that segments, with what was learned beside the image tower."""
    prompts: dict[str, Tensor] = dict(model.vectors.named_parameters())
    save_backbone(backbone, job.output / MODEL, card=card, prompts=prompts)
