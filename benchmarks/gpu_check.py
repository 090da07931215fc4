"""Does a GPU give what the CPU gives, and how much faster? For a machine that has one.

    python benchmarks/gpu_check.py [--device cuda]

Compares features, labels and confidences of mini and of a ViT-B/16 with random weights between the
CPU in float32 and the device in float32 and bfloat16, and times a batch of photos. Exits with 1
where float32 labels differ on more than one pixel in a thousand.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from PIL import Image

from pixelclip.backbones import Backbone, build_backbone, catalog, load_backbone
from pixelclip.config import SegmentConfig
from pixelclip.images import read_photo
from pixelclip.samples import sample_photos
from pixelclip.segmenter import Segmenter
from pixelclip.vocabulary import class_lists

RUNS = 5


def backbones() -> list[Backbone]:
    """The models to compare, on the CPU."""
    torch.manual_seed(0)
    vit = build_backbone(catalog.open_clip_card("ViT-B-16", "openai"))
    return [load_backbone("mini", device="cpu"), vit]


def photos() -> list[Image.Image]:
    """The sample photos in one size, so that they share a batch."""
    return [read_photo(path).resize((640, 480)) for path, _ in sample_photos()]


def run(backbone: Backbone, device: str, precision: str) -> tuple[list[np.ndarray], float]:
    """Labels of all photos, and the median time per photo in seconds."""
    config = SegmentConfig(precision=precision, batch_size=8)
    names = class_lists()["ade20k-150"]
    segmenter = Segmenter(backbone.to(device), names, config=config, cache=False)
    pictures, times = photos(), []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        results = segmenter(pictures)
        times.append((time.perf_counter() - start) / len(pictures))
    return [result.labels for result in results], statistics.median(times[1:])


def main() -> int:
    """Print one line per model and precision."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    worst = 0.0
    for backbone in backbones():
        expected, cpu_time = run(backbone, "cpu", "float32")
        print(f"{backbone.card.name}: cpu float32 {cpu_time * 1e3:.0f} ms per photo")
        for precision in ("float32", "bfloat16"):
            labels, seconds = run(backbone, device, precision)
            pairs = zip(labels, expected, strict=True)
            differ = float(np.mean([(ours != theirs).mean() for ours, theirs in pairs]))
            worst = max(worst, differ if precision == "float32" else 0.0)
            print(
                f"{backbone.card.name}: {device} {precision} {seconds * 1e3:.0f} ms per photo"
                f" ({cpu_time / seconds:.1f}x), {100 * differ:.3f} % of the labels differ"
            )
    return int(worst > 1e-3)


if __name__ == "__main__":
    raise SystemExit(main())
