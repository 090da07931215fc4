"""How many photos per second and core the training loader makes, and where the time goes.

    python benchmarks/loader.py [--workers 0 1 2] [--photos 200] [FOLDER ...]

Without folders, photos like SA-1B's are made: JPEGs of 1500 x 2250 and of half that, with 100
masks each, which wait in memory as runs. Photos in folders get the masks of such a made one,
brought to their size; reading annotation files is not part of the question.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from pixelclip.images import load_photo, read_size, to_rgb
from pixelclip.masks.runs import PhotoMasks, from_masks
from pixelclip.photos import Photo, find_photos
from pixelclip.training.colour import distort, vary_colour
from pixelclip.training.data import TrainPhotos, make_loader
from pixelclip.training.views import (
    ViewSettings,
    crop_photo,
    draw_geometry,
    draw_rectangle,
    sample_masks,
    to_frame,
)

SETTINGS = {
    "crop 640": ViewSettings(),
    "crop 320": ViewSettings(short_side=512, long_side=667, crop_size=320),
}
BATCH_SIZE = 12


@dataclass(frozen=True)
class MadeMasks:
    """A reader with masks per size of photo, height and width."""

    masks: dict[tuple[int, int], PhotoMasks]

    def __call__(self, photo: Photo, size: tuple[int, int]) -> PhotoMasks:
        """The masks of the photo's size."""
        return self.masks[size]


def blobs(height: int, width: int, count: int = 100) -> PhotoMasks:
    """Ellipses with rough edges; areas vary as SA-1B's do, from a thousandth to a tenth."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    masks = np.zeros((count, height, width), dtype=bool)
    for mask in masks:
        radius = np.sqrt(height * width * 10 ** random.uniform(-3, -1) / np.pi)
        stretch = random.uniform(0.5, 2)
        down = (rows - random.uniform(0, height)) / (radius * stretch)
        across = (columns - random.uniform(0, width)) / (radius / stretch)
        wave = 0.1 * np.sin(columns / 7) + 0.1 * np.sin(rows / 5)
        mask[:] = down**2 + across**2 < 1 + wave
    return from_masks(masks)


def make_photos(folder: Path, width: int, height: int, count: int = 8) -> None:
    """JPEGs with detail at all scales, of about 2 bits per pixel."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        pixels = np.zeros((height, width, 3), dtype=np.float32)
        for scale in (4, 16, 64, 256):
            coarse = random.normal(
                0, 12 * scale**0.25, (height // scale + 2, width // scale + 2, 3)
            )
            levels = Image.fromarray((coarse + 128).clip(0, 255).astype(np.uint8))
            pixels += np.asarray(levels.resize((width, height), Image.Resampling.BICUBIC)) - 128.0
        photo = Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8))
        photo.save(folder / f"{number}.jpg", quality=90)


def speed(dataset: TrainPhotos, num_workers: int, count: int) -> str:
    """Photos per second and processor time per photo; the start of the workers is not counted."""
    wide = np.ones(len(dataset), dtype=bool)
    loader = make_loader(dataset, wide, batch_size=BATCH_SIZE, num_workers=num_workers)
    for _ in range(max(1, 3 * num_workers)):
        next(loader)
    began, used = time.perf_counter(), processor_seconds()
    for _ in range(count // BATCH_SIZE):
        next(loader)
    photos = count // BATCH_SIZE * BATCH_SIZE
    rate = photos / (time.perf_counter() - began)
    used = 1000 * (processor_seconds() - used) / photos
    return f"{rate:5.1f} photos/s, {used:.1f} ms of a core per photo"


def processor_seconds() -> float:
    """Time that this process and its workers have spent computing."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def stages(dataset: TrainPhotos, count: int) -> dict[str, float]:
    """Mean milliseconds of processor time per photo of each stage."""
    settings = dataset.settings
    spent: dict[str, float] = {}

    def timed(stage: str, call: Callable[[], object]) -> object:
        began = time.process_time()
        result = call()
        spent[stage] = spent.get(stage, 0) + time.process_time() - began
        return result

    for number in range(count):
        photo = dataset.photo(number % len(dataset))
        random = np.random.default_rng(number)
        size = read_size(photo.path)
        geometry = draw_geometry(random, size, settings)
        masks = dataset.reader(photo, (size[1], size[0]))
        image = timed(
            "decode", lambda p=photo, g=geometry: to_rgb(load_photo(p.path, at_least=g.resized))
        )
        view = timed("resize, crop", lambda i=image, g=geometry: crop_photo(i, g))
        view = timed("colour", lambda v=view, r=random: vary_colour(v, r))
        strong = timed("strong", lambda v=view, r=random: distort(v, r))
        box = draw_rectangle(random, view.width, view.height)
        timed("masks", lambda m=masks, g=geometry, b=box: sample_masks(m, g, settings, b))
        for part in (view, strong):
            timed("tensors", lambda v=part: to_frame(v, settings.crop_size))
    return {stage: 1000 * seconds / count for stage, seconds in spent.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--photos", type=int, default=120, help="timed per row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folders = options.folders
        if not folders:
            folders = [Path(made, "2250x1500"), Path(made, "1125x750")]
            make_photos(folders[0], 2250, 1500)
            make_photos(folders[1], 1125, 750)
        for folder in folders:
            photos = find_photos([folder])
            frames = {read_size(photo.path)[::-1] for photo in photos}
            reader = MadeMasks({frame: blobs(*frame) for frame in frames})
            print(f"\n{folder.name}: {len(photos)} photos")
            for name, settings in SETTINGS.items():
                dataset = TrainPhotos(photos, reader, settings)
                spent = stages(dataset, options.photos)
                print(f"  {name}: {sum(spent.values()):.1f} ms per photo:", end=" ")
                print(", ".join(f"{stage} {time:.1f}" for stage, time in spent.items()))
                for workers in options.workers:
                    print(f"    {workers} workers: {speed(dataset, workers, options.photos)}")
                weak_only = TrainPhotos(photos, reader, replace(settings, strong_view=False))
                print(f"    0 workers, no strong view: {speed(weak_only, 0, options.photos)}")


if __name__ == "__main__":
    main()
