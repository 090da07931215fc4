"""What does segmenting a photo cost beside the encoder, here and in the authors' inference?

    python benchmarks/segment_cost.py --json segment_cost.json

From a decoded photo to its label map, float32 on the CPU: a CLIP ViT-B/16 with random weights,
network input 320 x 320, features to 64 x 64, 150 classes. "Theirs" is a plain rendering of the
authors' inference (behaviour.md 9, 17, 18a; without detectron2 around it and without the
evaluator's results file); "ours" is `Segmenter` with the `authors` preset. Class vectors are given
to both. The encoder is timed inside each call, so its share comes from the same run.

Goals: less than 10 % outside the encoder at 480 x 640 and less than 40 % at 1024 x 2048. On a busy
machine use `--threads 1 --clock cpu`. Linux only (peak memory is read from /proc).
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data
from torch import Tensor

from pixelclip.backbones import Backbone, build_backbone, catalog
from pixelclip.backbones.pixels import squash, to_pixels
from pixelclip.backbones.vit import DenseViT
from pixelclip.config import SegmentConfig
from pixelclip.plan import authors_size
from pixelclip.segmenter import Segmenter
from pixelclip.upsample import ScoreBlocks, candidates
from pixelclip.vocabulary import class_lists

SIZES = ((480, 640), (1024, 2048))
CLASSES = class_lists()["ade20k-150"]
SIDE, GRID, SHORT_SIDE = 320, 64, 640
NOISE = 0.7  # of the class vectors; leaves about 50 of 150 classes in the photos
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Labeller = Callable[[Image.Image], np.ndarray]


@dataclass
class Spread:
    """Median and range of some runs."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Of these values."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Cost:
    """What one of the two took: seconds, share outside the encoder, bytes above the model."""

    encoder: Spread
    outside: Spread
    total: Spread
    share: Spread
    peak_bytes: int = 0


@dataclass
class Result:
    """Both on one photo; candidates are the classes that can win in a cell of the grid."""

    height: int
    width: int
    classes_present: int
    candidates_per_cell: float
    candidates_most: int
    agreement: float
    ratio: Spread
    costs: dict[str, Cost]


class Timing(NamedTuple):
    """Seconds of one call, and those of the encoder in it."""

    total: float
    encoder: float


@dataclass
class Stopwatch:
    """Sums the seconds spent in the functions it wraps."""

    clock: Callable[[], float]
    seconds: float = 0.0

    def wrap(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The same function, timed."""

        def timed(*args: Tensor) -> Tensor:
            start = self.clock()
            result = function(*args)
            self.seconds += self.clock() - start
            return result

        return timed


class AuthorsInference:
    """The authors' inference on one photo, wasted projections of the last block included."""

    def __init__(self, backbone: Backbone, text: Tensor):
        """Share the weights of a backbone."""
        given = cast(DenseViT, backbone.visual)
        # Pixels are normalised before they are resized, so the tower gets them as they are.
        self.visual = DenseViT(given.tower, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        self.mean, self.std = given.mean * 255, given.std * 255
        self.text = text
        self.encode: Callable[..., Tensor] = self._encode

    def _encode(self, images: Tensor) -> Tensor:
        """Dense features [B, D, h, w]: q, k, v and class row all computed, then v patches kept."""
        tokens, grid = self.visual.tokens(images)
        block, tower = self.visual.tower.transformer.resblocks[-1], self.visual.tower
        attention = block.attn
        parts = F.linear(block.ln_1(tokens), attention.in_proj_weight, attention.in_proj_bias)
        _, _, values = (attention.out_proj(part) for part in parts.chunk(3, dim=-1))
        hidden = values + tokens[:, :1]
        hidden = hidden + block.mlp(block.ln_2(hidden))
        features = (tower.ln_post(hidden) @ tower.proj)[:, 1:]
        return features.unflatten(1, grid).permute(0, 3, 1, 2)

    @torch.no_grad()
    def __call__(self, photo: Image.Image) -> np.ndarray:
        """Label map of the photo."""
        width, height = photo.size
        scale = SHORT_SIDE / min(width, height)
        size = (int(width * scale + 0.5), int(height * scale + 0.5))
        array = np.asarray(photo.resize(size, Image.Resampling.BILINEAR))
        pixels = torch.as_tensor(np.ascontiguousarray(array.transpose(2, 0, 1)))
        pixels = ((pixels - self.mean) / self.std)[None]
        pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", align_corners=False)
        features = self.encode(pixels)
        features = F.interpolate(features, (GRID, GRID), mode="bilinear", align_corners=False)
        features = F.normalize(features, dim=1).permute(0, 2, 3, 1)
        scores = (features @ self.text.T).permute(0, 3, 1, 2)  # [1, K, 64, 64], channels last
        maps = F.interpolate(scores, (height, width), mode="bilinear", align_corners=False)
        return maps[0].argmax(dim=0).numpy()


def make_photo(height: int, width: int) -> Image.Image:
    """Three photos of scikit-image side by side."""
    canvas = Image.new("RGB", (width, height))
    edges = [round(width * part / 3) for part in range(4)]
    for left, right, load in zip(
        edges, edges[1:], (data.astronaut, data.coffee, data.rocket), strict=False
    ):
        picture = Image.fromarray(load()).resize((right - left, height), Image.Resampling.BICUBIC)
        canvas.paste(picture, (left, 0))
    return canvas


def network_input(photo: Image.Image) -> Tensor:
    """The photo as both give it to the encoder, before normalising."""
    size = authors_size(photo.width, photo.height)
    return squash(to_pixels(photo.resize(size, Image.Resampling.BILINEAR)), SIDE)


def make_backbone() -> Backbone:
    """ViT-B/16 CLIP with seeded random weights."""
    torch.manual_seed(0)
    return build_backbone(catalog.open_clip_card("ViT-B-16", "openai"))


@torch.inference_mode()
def make_text(backbone: Backbone, photo: Image.Image) -> Tensor:
    """Class vectors [K, D] that give smooth maps of which about a third win somewhere.

    Features of a random ViT are nearly parallel (cosine 0.96), so their mean is taken off; each
    class is the feature of one patch of the photo plus noise.
    """
    pixels = network_input(photo)
    patches = F.normalize(backbone.dense(pixels[None])[0].flatten(1).T, dim=1)
    patches = F.normalize(patches - patches.mean(dim=0), dim=1)  # [hw, D]
    generator = torch.Generator().manual_seed(1)
    picks = torch.randperm(len(patches), generator=generator)[: len(CLASSES)]
    noise = torch.randn(len(CLASSES), patches.shape[1], generator=generator)
    return F.normalize(patches[picks] + NOISE * F.normalize(noise, dim=1), dim=1)


def make_segmenter(backbone: Backbone, text: Tensor) -> Segmenter:
    """Our segmenter with the authors' preset and those class vectors."""
    config = SegmentConfig(preset="authors", templates="name", precision="float32")
    ours = Segmenter(backbone, CLASSES, config=config, cache=False)
    ours.text = text
    return ours


def timed(label: Labeller, photo: Image.Image, watch: Stopwatch) -> Timing:
    """One call."""
    watch.seconds = 0.0
    start = watch.clock()
    label(photo)
    return Timing(watch.clock() - start, watch.seconds)


def cost(rows: list[Timing]) -> Cost:
    """Spread over the runs."""
    return Cost(
        encoder=Spread.of([row.encoder for row in rows]),
        outside=Spread.of([row.total - row.encoder for row in rows]),
        total=Spread.of([row.total for row in rows]),
        share=Spread.of([1 - row.encoder / row.total for row in rows]),
    )


def measure(photo: Image.Image, text: Tensor, runs: int, clock: str) -> Result:
    """Times of both on one photo, interleaved after one warm-up, and how far they agree."""
    backbone = make_backbone()
    ours, theirs = make_segmenter(backbone, text), AuthorsInference(backbone, text)
    pixels = network_input(photo)
    grid = ours.features([pixels])[0]
    per_cell = np.bincount(candidates(ScoreBlocks(grid, text))[0], minlength=GRID * GRID)
    watch = Stopwatch(CLOCKS[clock])
    backbone.dense = watch.wrap(backbone.dense)  # type: ignore[method-assign]
    theirs.encode = watch.wrap(theirs.encode)
    callers: dict[str, Labeller] = {"ours": lambda photo: ours(photo).labels, "theirs": theirs}
    labels = {name: call(photo) for name, call in callers.items()}  # the warm-up
    timings: dict[str, list[Timing]] = {name: [] for name in callers}
    for _ in range(runs):
        for name, call in callers.items():
            timings[name].append(timed(call, photo, watch))
    pairs = zip(timings["ours"], timings["theirs"], strict=True)
    return Result(
        height=photo.height,
        width=photo.width,
        classes_present=len(np.unique(labels["theirs"])),
        candidates_per_cell=float(per_cell.mean()),
        candidates_most=int(per_cell.max()),
        agreement=float((labels["ours"] == labels["theirs"]).mean()),
        ratio=Spread.of([theirs.total / ours.total for ours, theirs in pairs]),
        costs={name: cost(rows) for name, rows in timings.items()},
    )


def status_bytes(field: str) -> int:
    """A field of /proc/self/status that is given in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure_memory(name: str, size: tuple[int, int], text_path: str) -> int:
    """Peak memory of the first call in this process, above what the loaded model takes.

    Not ru_maxrss: it includes the parent's size at fork, and loading's own peak.
    """
    backbone, photo = make_backbone(), make_photo(*size)
    text = torch.from_numpy(np.load(text_path))
    ours, theirs = make_segmenter(backbone, text), AuthorsInference(backbone, text)
    label: Labeller = theirs if name == "theirs" else lambda photo: ours(photo).labels
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present size
    before = status_bytes("VmRSS")
    label(photo)
    return status_bytes("VmHWM") - before


def memory_in_child(name: str, size: tuple[int, int], text: Tensor, threads: int) -> int:
    """`measure_memory` in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, text.numpy())
        file.flush()
        command = [sys.executable, __file__, "--threads", str(threads), "--memory", name,
                   *map(str, size), file.name]  # fmt: skip
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(answer.split()[-1])


def seconds(times: Spread) -> str:
    """Median and range for a cell of the table."""
    return f"{times.median:.3f} ({times.min:.3f}-{times.max:.3f})"


def table(results: list[Result]) -> str:
    """The results as Markdown; times are medians with their range."""
    lines = [
        "| photo | which | encoder s | outside s | total s | outside % | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results:
        for name, one in row.costs.items():
            times = " | ".join(map(seconds, (one.encoder, one.outside, one.total)))
            share = f"{one.share.median:.1%} ({one.share.min:.1%}-{one.share.max:.1%})"
            lines.append(
                f"| {row.height} x {row.width} | {name} | {times} | {share}"
                f" | {one.peak_bytes / 1e6:.0f} |"
            )
    for row in results:
        lines.append(
            f"\n{row.height} x {row.width}: ours {row.ratio.median:.2f} times as fast"
            f" ({row.ratio.min:.2f}-{row.ratio.max:.2f}); equal labels {row.agreement:.5%};"
            f" {row.classes_present} classes present; {row.candidates_per_cell:.1f}"
            f" candidates per cell, at most {row.candidates_most}."
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)  # in the child processes
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        name, height, width, text_path = args.memory
        print(measure_memory(name, (int(height), int(width)), text_path))
        return
    results = []
    for size in SIZES:
        photo = make_photo(*size)
        text = make_text(make_backbone(), photo)
        result = measure(photo, text, args.runs, args.clock)
        for name, one in result.costs.items():
            one.peak_bytes = memory_in_child(name, size, text, args.threads)
        results.append(result)
    setting = {"torch": torch.__version__, "python": platform.python_version(),
               "threads": args.threads, "clock": args.clock, "runs": args.runs,
               "classes": len(CLASSES)}  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in setting.items()), end="\n\n")
    print(table(results))
    if args.json:
        content = {"setting": setting, "results": [asdict(result) for result in results]}
        args.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
