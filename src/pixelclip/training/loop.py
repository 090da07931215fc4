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
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import Tensor

from pixelclip.backbones import Backbone, load_backbone, save_backbone
from pixelclip.backbones.sources import text_base
from pixelclip.checkpoint import ModelCard
from pixelclip.config import TrainConfig
from pixelclip.device import choose_device, keep_heap, wants_bfloat16
from pixelclip.files import printable
from pixelclip.images import Photo, check_writable, find_photos
from pixelclip.masks.annotations import MaskReader, open_masks
from pixelclip.masks.generate import generate
from pixelclip.masks.superpixels import SETTINGS, superpixels
from pixelclip.progress import Ticker, progress_bar
from pixelclip.training.data import LoadedBatch, TrainPhotos, make_loader
from pixelclip.training.model import PixelClip
from pixelclip.training.order import wider
from pixelclip.training.parameters import make_optimizer
from pixelclip.training.pictures import ClusterPictures
from pixelclip.training.report import Report, TrainSummary
from pixelclip.training.run import RunDir
from pixelclip.training.state import collect, restore
from pixelclip.training.step import train_step
from pixelclip.training.views import ViewSettings

log = logging.getLogger("pixelclip")

PACKAGES = ("pixelclip", "torch", "open_clip_torch", "timm", "accelerate", "pillow", "numpy")


@dataclass(frozen=True)
class TrainJob:
    """What is trained, on what, and where the result goes.

    Attributes:
        images: photos and folders of photos.
        masks: mask store, folder or file of annotations; None: superpixels are made first.
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


def run_job(job: TrainJob, config: TrainConfig, *, quiet: bool = False) -> TrainSummary:
    """Train, or go on with an unfinished run, and leave a model in the run directory.

    Raises:
        ConfigError: settings do not fit the model, or the run directory holds another run.
        DataError: photos, masks or the run directory cannot be used.
        ModelError: the model cannot be loaded.
    """
    keep_heap()
    accelerator = make_accelerator(job.device, config)
    is_main = accelerator.is_main_process
    quiet = quiet or not is_main
    photos, reader = open_data(job, config, accelerator, quiet=quiet)
    with torch.random.fork_rng(devices=[]):  # layers draw weights that are then replaced
        backbone = load_backbone(job.model, checkpoint=job.checkpoint, device="cpu")
        card = _card(job, backbone, config, len(photos))
        model = PixelClip(backbone, config).to(accelerator.device)
    optimizer = make_optimizer(model, config)

    run = RunDir(job.output)
    state = run.load()
    step = first = 0 if state is None else state["step"]
    recent = None if state is None else restore(state, model, optimizer, is_main=is_main)
    wrapped = accelerator.prepare_model(model)
    report = Report(job.output, config, step, recent, process=accelerator.process_index)
    batches = _batches(photos, reader, config, accelerator, step)
    pictures = ClusterPictures(photos, reader, view_settings(config), job.output / "pictures")
    ticker = Ticker(config.steps, first, quiet=quiet)
    started = time.monotonic()
    with (
        closing(batches),
        progress_bar(quiet=quiet, note=True) as bar,
        interruptible(accelerator) as stop,
    ):
        task = bar.add_task("training", total=config.steps, completed=step, note="")
        while step < config.steps and not stop.is_set():
            began = time.monotonic()
            loaded = next(batches)
            waited = time.monotonic() - began
            parts = [b.to(accelerator.device) for b in loaded.batch.split(config.micro_batches)]
            result = train_step(accelerator, wrapped, optimizer, parts, step)
            step += 1
            report.add(step, result, loaded, seconds=time.monotonic() - began, waited=waited)
            bar.update(task, completed=step, note=report.note)
            ticker.tick(step, report.note)
            last = step == config.steps or stop.is_set()
            if is_main and config.picture_every and (last or step % config.picture_every == 0):
                pictures.draw(model, step)
            if last or step % config.checkpoint_every == 0:
                state = collect(step, model, optimizer, report.recent, accelerator)
                if is_main:
                    save_backbone(backbone, job.output, card=card, prompts=_prompts(model))
                    run.save(state, config.keep_checkpoints)
    accelerator.wait_for_everyone()
    return report.summary(step, time.monotonic() - started)


def open_data(
    job: TrainJob, config: TrainConfig, accelerator: Accelerator, *, quiet: bool
) -> tuple[list[Photo], MaskReader]:
    """Photos and masks; the first process claims the run directory and makes masks if need be."""
    photos = find_photos(job.images)
    if accelerator.is_main_process:
        check_writable(job.output)
        RunDir(job.output).begin(_record(job, config, photos))
        if job.masks is None:
            make_masks(job, photos, config.num_workers, quiet=quiet)
    accelerator.wait_for_everyone()
    return photos, open_masks(job.masks or job.output / "masks")


def make_masks(job: TrainJob, photos: list[Photo], workers: int, *, quiet: bool) -> None:
    """Superpixels of all photos, into the run directory; what is there already is kept."""
    failures = generate(
        photos,
        job.output / "masks",
        source=superpixels,
        name="superpixels",
        settings=dict(SETTINGS),
        workers=max(1, workers),
        quiet=quiet,
    )
    for path, message in failures[:10]:
        log.info("no masks for %s: %s", printable(path), message)
    if len(failures) > 10:
        log.info("and for %d more photos", len(failures) - 10)


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
    if not dist.is_available() or not dist.is_initialized():
        # accelerate remembers the first device and precision of the process for good.
        AcceleratorState._reset_state(reset_partial_state=True)
    if where.index is not None:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(where)  # the only way to tell it
    try:
        return Accelerator(
            cpu=where.type == "cpu",
            mixed_precision="bf16" if wants_bfloat16(where, config.precision) else "no",
            # The first process may make masks while the others wait.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
        )
    finally:
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)


@contextmanager
def interruptible(accelerator: Accelerator) -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets: the step is ended and a checkpoint written.

    A second Ctrl-C stops at once. Of several processes each would stop at another step, so there
    the last checkpoint has to do.
    """
    event = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or accelerator.num_processes > 1:
        yield event
        return
    previous = {name: signal.getsignal(name) for name in signals}

    def stop(number: int, frame: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log.info("stopping after this step; the same command goes on from here")

    for name in signals:
        signal.signal(name, stop)
    try:
        yield event
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


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
        wider(photos) if config.same_aspect else np.ones(len(photos), dtype=bool),
        batch_size=config.batch_size,
        start=first,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
        num_workers=config.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )


def _record(job: TrainJob, config: TrainConfig, photos: list[Photo]) -> dict[str, object]:
    """What `run.json` says of a run."""
    names = json.dumps([photo.stem.as_posix() for photo in photos])
    return {
        "model": job.model,
        "checkpoint": None if job.checkpoint is None else str(job.checkpoint.resolve()),
        "images": [str(path.resolve()) for path in job.images],
        "masks": None if job.masks is None else str(job.masks.resolve()),
        "photos": len(photos),
        "photos_sha256": hashlib.sha256(names.encode()).hexdigest(),
        "settings": config.model_dump(mode="json"),
        "versions": {package: version(package) for package in PACKAGES},
    }


def _card(job: TrainJob, backbone: Backbone, config: TrainConfig, photos: int) -> ModelCard:
    """Card of the model that the run leaves."""
    base = text_base(job.model, job.checkpoint, backbone.card)
    training = {"from": job.model, "photos": photos, "settings": config.model_dump(mode="json")}
    return backbone.card.model_copy(
        update={
            "name": job.output.resolve().name,
            "base": base,
            "text_hash": backbone.text_hash if base else "",
            "training": training,
        }
    )


def _prompts(model: PixelClip) -> dict[str, Tensor]:
    """What was learned beside the image tower: prompts or free vectors."""
    return dict(model.vectors.named_parameters())
