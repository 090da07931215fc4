"""Which share of an evaluation's time is spent outside the encoder?

    python benchmarks/evaluate.py --json evaluate.json

From files to figures: photos (JPEG, 480 x 640) and label maps (PNG) are read, segmented and
counted, boundary IoU included, as `pixelclip eval` does with one process: a CLIP ViT-B/16 with
random weights, float32 on the CPU, `authors` preset, network input 320 x 320, features to 64 x 64,
150 classes. Class vectors are made so that about a third of the classes win somewhere, as in
`segment_cost.py`. The encoder is timed inside the same run.

"Outside" is all other time. With `--clock cpu` (one thread; for busy machines) it is the CPU time
of the whole process, the reading thread's in full though it runs while the encoder does, less the
encoder's own.

Goal: less than 20 % outside (the authors' code: 35 %, without reading).
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from segment_cost import CLASSES, CLOCKS, SIDE, Stopwatch, make_backbone, make_photo, make_text

from pixelclip.config import SegmentConfig
from pixelclip.evaluation.datasets import SegmentationDataset
from pixelclip.evaluation.evaluate import evaluate
from pixelclip.segmenter import Segmenter

HEIGHT, WIDTH = 480, 640


def make_set(folder: Path, photos: int, segmenter: Segmenter) -> SegmentationDataset:
    """Photos that differ by their columns' order, labelled as segmented, half of it shifted."""
    base = np.asarray(make_photo(HEIGHT, WIDTH))
    pairs = []
    for number in range(photos):
        pixels = np.roll(base, number * WIDTH // photos, axis=1)
        photo, labels = folder / f"{number}.jpg", folder / f"{number}.png"
        Image.fromarray(pixels).save(photo, quality=90)
        truth = segmenter(photo).labels
        truth[: HEIGHT // 2] = np.roll(truth[: HEIGHT // 2], 20, axis=1)
        Image.fromarray(truth).save(labels)
        pairs.append((photo, labels))
    return SegmentationDataset("made", CLASSES, tuple(pairs))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--photos", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu needs --threads 1: the encoder is timed in its own thread")
    torch.set_num_threads(args.threads)
    backbone = make_backbone()
    config = SegmentConfig(preset="authors", templates="name", precision="float32", short_side=SIDE)
    segmenter = Segmenter(backbone, CLASSES, config=config, cache=False)
    segmenter.text = make_text(backbone, make_photo(HEIGHT, WIDTH))
    whole = CLOCKS[args.clock]
    # Not the process's CPU time, which the reading thread adds to while the encoder runs.
    watch = Stopwatch(time.thread_time if args.clock == "cpu" else whole)
    backbone.dense = watch.wrap(backbone.dense)  # type: ignore[method-assign]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_set(Path(folder), args.photos, segmenter)  # the warm-up
        present = len({int(k) for _, path in dataset.pairs for k in np.unique(dataset.truth(path))})
        for _ in range(args.runs):
            watch.seconds, start = 0.0, whole()
            began = time.perf_counter()
            evaluate(segmenter, dataset)
            total = whole() - start
            rows.append(
                {"encoder": watch.seconds / args.photos, "total": total / args.photos,
                 "share": 1 - watch.seconds / total,
                 "photos_per_second": args.photos / (time.perf_counter() - began)}
            )  # fmt: skip
    setting = {"torch": torch.__version__, "python": platform.python_version(),
               "photos": args.photos, "size": f"{HEIGHT} x {WIDTH}", "classes": len(CLASSES),
               "classes_present": present, "threads": args.threads, "clock": args.clock,
               "runs": args.runs}  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in setting.items()), end="\n\n")
    print("| per photo | median | min | max |\n|---|---|---|---|")
    for key in rows[0]:
        values = [row[key] for row in rows]
        cells = " | ".join(
            f"{v:.3f}" for v in (statistics.median(values), min(values), max(values))
        )
        print(f"| {key} | {cells} |")
    if args.json:
        args.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
