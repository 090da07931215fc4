"""How long would the paper's schedule take on this GPU? For a machine that has one.

    python benchmarks/train_gpu.py [--device cuda] [--json FILE]

ViT-B/16 with random weights, batches of 48 crops of 640 pixels, 40 masks each, bfloat16: seconds
per step from batches that lie in memory, photos per second that this needs, peak memory, and the
projected time of 10,000 steps. Then the loader alone, on JPEGs of 750 x 1125 pixels with 100 masks
each: photos per second with that many workers. The goal is the whole schedule in 20 minutes.
On a CPU, `--device cpu --batch 2 --runs 1` shows that the script works.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from loader import SETTINGS, MadeMasks, blobs, make_photos
from train_step import Setting, make_problem

from pixelclip.config import TrainConfig
from pixelclip.photos import find_photos
from pixelclip.training.batch import make_batch
from pixelclip.training.data import TrainPhotos, make_loader
from pixelclip.training.loop import make_accelerator
from pixelclip.training.model import PixelClip
from pixelclip.training.parameters import make_optimizer
from pixelclip.training.step import train_step

PAPER_STEPS = 10_000


def step_figures(device: str, batch_size: int, runs: int) -> dict[str, float]:
    """Seconds per step and peak memory."""
    setting = Setting("ViT-B-16-quickgelu", batch_size, 64, 40, 1, os.cpu_count() or 1, 0)
    problem = make_problem(setting)
    config = TrainConfig(batch_size=batch_size)
    accelerator = make_accelerator(device, config)
    model = PixelClip(problem.backbone, config).to(accelerator.device)
    optimizer = make_optimizer(model, config)
    wrapped = accelerator.prepare_model(model)
    batch = make_batch(problem.weak, problem.strong, problem.masks, mask_size=config.mask_size)
    seconds = []
    for step in range(runs + 3):  # three to warm up
        start = time.perf_counter()
        result = train_step(accelerator, wrapped, optimizer, [batch.to(device)], step)
        seconds.append(time.perf_counter() - start)  # the step ends with figures on the CPU
    on_gpu = torch.cuda.is_available() and accelerator.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * _resident_kb()
    median = statistics.median(seconds[3:])
    return {
        "step_seconds": median,
        "photos_per_second_needed": batch_size / median,
        "peak_memory_gb": peak / 1e9,
        "projected_minutes": PAPER_STEPS * median / 60,
        "loss": result.loss,
    }


def _resident_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def loader_figures(batch_size: int, workers: int, batches: int) -> dict[str, float]:
    """Photos per second of the loader alone, at the authors' size and at half of it."""
    figures = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made, "photos")
        make_photos(folder, 1125, 750)
        photos, reader = find_photos([folder]), MadeMasks({(750, 1125): blobs(750, 1125)})
        wide = np.ones(len(photos), dtype=bool)
        for name, settings in SETTINGS.items():
            samples = TrainPhotos(photos, reader, settings)
            loader = make_loader(samples, wide, batch_size=batch_size, num_workers=workers)
            for _ in range(1 + 2 * workers):  # workers have started, their first batches are used
                next(loader)
            start = time.perf_counter()
            for _ in range(batches):
                next(loader)
            elapsed = time.perf_counter() - start
            loader.close()
            figures[f"{name}, photos per second"] = batches * batch_size / elapsed
    return figures


def main() -> None:
    """Print the figures, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = step_figures(options.device, options.batch, options.runs)
    figures |= loader_figures(options.batch, options.workers, max(2, options.runs // 2))
    figures["workers"] = options.workers
    for name, value in figures.items():
        print(f"{name:32} {value:.3f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
