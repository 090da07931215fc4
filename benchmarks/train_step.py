"""How long does one training step take, and how much memory, here and in the authors' way?

    python benchmarks/train_step.py --json train_step.json

A whole step (forward, backward, clipping, optimiser) from uint8 views and boolean masks in memory:
a CLIP ViT-B/16 with random weights, crops of 640 pixels, network input 320, 64 prompts of 4 tokens,
40 masks a photo over 86 % of its pixels, float32 on two threads. "baseline" is `authors_step.py`,
"ours" is `pixelclip.training`; both start from equal weights, views and masks.

Every measurement is a process of its own: one warm-up step, whose loss both must agree on, then the
timed steps. The two take turns. All is done under the default allocator and again with glibc told
to keep its heap (`HEAP_KEPT`), as fresh pages for every large block cost the baseline most
(speed.md vi). `--only baseline --breakdown` prints where one of the two spends its time.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import open_clip
import timm
import torch
import torch.nn.functional as F
from authors_step import AuthorsStep, Decoder
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from pixelclip.backbones import Backbone, build_backbone, catalog
from pixelclip.checkpoint import ModelCard

CROP, PROMPT_LENGTH, TEMPERATURE, COVERAGE = 640, 4, 100.0, 0.86
CUT_OUT = slice(200, 328)  # rows and columns that the strong view and the masks lack
HEAP_KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(64 * 2**30)}
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "equal": HEAP_KEPT}
PARTS = (
    "network_input", "encode_prompts", "encode_student", "update_teacher", "encode_teacher",
    "pool_masks", "compare", "balance", "merge_targets", "correlate", "decode", "compute_loss",
    "forward", "backward", "update",
)  # fmt: skip
SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 3, "width": 128, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}

Step = Callable[[], float]  # one whole training step; gives the loss before its update


@dataclass(frozen=True)
class Setting:
    """What is computed; a child process gets it on its command line."""

    architecture: str
    batch: int
    clusters: int
    masks: int
    steps: int
    threads: int
    seed: int


@dataclass(frozen=True, eq=False)
class Problem:
    """Weights and one batch, the same in every process."""

    backbone: Backbone
    prompt_tokens: Float[Tensor, "K L E"]
    head_state: dict[str, Tensor]
    weak: list[UInt8[Tensor, "3 H W"]]
    strong: list[UInt8[Tensor, "3 H W"]]
    masks: list[Bool[Tensor, "M H W"]]


@dataclass(frozen=True)
class Measurement:
    """What one process found.

    Attributes:
        first_loss: of the warm-up step.
        seconds: wall time of each timed step.
        cpu_seconds: of all threads, which tells how much of that the machine's load took.
        system_seconds: spent in the kernel by the whole process.
        peak_bytes: resident memory.
        parts: wall seconds per step of parts of it, if asked for; `forward` includes those before.
    """

    first_loss: float
    seconds: list[float]
    cpu_seconds: list[float]
    system_seconds: float
    peak_bytes: int
    parts: dict[str, float]


def baseline(problem: Problem, parts: dict[str, float] | None = None) -> Step:
    """The authors' step on that batch; seconds of its parts are added to `parts`."""
    theirs = AuthorsStep(
        problem.backbone,
        problem.prompt_tokens,
        problem.head_state,
        temperature=TEMPERATURE,
        clip_resolution=problem.backbone.card.square,
    )
    for name in PARTS if parts is not None else ():
        setattr(theirs, name, timed(getattr(theirs, name), parts, name))
    return lambda: float(theirs.step(problem.weak, problem.strong, problem.masks))


def ours(problem: Problem, parts: dict[str, float] | None = None) -> Step:
    """Our step on that batch, as `pixelclip train` runs it; seconds of parts are not told apart."""
    from pixelclip.config import TrainConfig
    from pixelclip.device import keep_heap
    from pixelclip.training.batch import make_batch
    from pixelclip.training.loop import make_accelerator
    from pixelclip.training.model import PixelClip
    from pixelclip.training.parameters import make_optimizer
    from pixelclip.training.step import train_step

    keep_heap()  # does nothing where the environment has set the allocator
    clusters, length, _ = problem.prompt_tokens.shape
    config = TrainConfig(
        num_clusters=clusters, prompt_length=length, temperature=TEMPERATURE, precision="float32"
    )
    accelerator = make_accelerator("cpu", config)
    model = PixelClip(problem.backbone, config)
    model.vectors.load_state_dict({"tokens": problem.prompt_tokens})
    model.decoder.load_state_dict(problem.head_state)
    optimizer = make_optimizer(model, config)
    steps = itertools.count()

    def step() -> float:
        batch = make_batch(problem.weak, problem.strong, problem.masks, mask_size=config.mask_size)
        return train_step(accelerator, model, optimizer, [batch], next(steps)).loss

    return step


CONTESTANTS: dict[str, Callable[[Problem, dict[str, float] | None], Step]] = {
    "baseline": baseline,
    "ours": ours,
}


def timer(
    parts: dict[str, float] | None,
) -> Callable[[str], AbstractContextManager[None]]:
    """Contexts whose seconds are added to `parts`; without them they do nothing."""

    @contextmanager
    def measure(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if parts is not None:
            parts[name] = parts.get(name, 0.0) + time.perf_counter() - start

    return measure


def timed(
    function: Callable[..., object], parts: dict[str, float], name: str
) -> Callable[..., object]:
    """The same function; its seconds are added to `parts`."""

    def wrapped(*args: object) -> object:
        with timer(parts)(name):
            return function(*args)

    return wrapped


def make_problem(setting: Setting) -> Problem:
    """Seeded weights and batch; leaves the global generator as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(setting.seed)
        backbone = build_backbone(make_card(setting.architecture))
        head_state = Decoder().state_dict()
    generator = torch.Generator().manual_seed(setting.seed)
    table = backbone.text.token_embedding.weight
    ids = torch.randint(len(table), (setting.clusters, PROMPT_LENGTH), generator=generator)
    weak = [make_view(generator) for _ in range(setting.batch)]
    return Problem(
        backbone=backbone,
        prompt_tokens=table[ids].detach().clone(),
        head_state=head_state,
        weak=weak,
        strong=[distort(view) for view in weak],
        masks=[make_masks(setting.masks, generator) for _ in range(setting.batch)],
    )


def make_card(architecture: str) -> ModelCard:
    """Card of an open_clip architecture, or of a ViT of three layers called "small"."""
    if architecture == "small":
        return catalog.make_card("small", SMALL, activation="quickgelu", pixels={})
    return catalog.open_clip_card(architecture, None)


def make_view(generator: torch.Generator) -> UInt8[Tensor, "3 H W"]:
    """Smooth colour patches of several sizes."""
    layers = [
        F.interpolate(torch.randn(1, 3, side, side, generator=generator), (CROP, CROP),
                      mode="bicubic", align_corners=False)[0]
        for side in (5, 20, 80)
    ]  # fmt: skip
    pixels = 128 + 50 * layers[0] + 25 * layers[1] + 12 * layers[2]
    return pixels.clamp(0, 255).to(torch.uint8)


def distort(view: UInt8[Tensor, "3 H W"]) -> UInt8[Tensor, "3 H W"]:
    """The strong view: paler, turned in colour, a black rectangle."""
    strong = (0.7 * view.roll(1, dims=0).float() + 40).clamp(0, 255).to(torch.uint8)
    strong[:, CUT_OUT, CUT_OUT] = 0
    return strong


def make_masks(count: int, generator: torch.Generator) -> Bool[Tensor, "M H W"]:
    """Overlapping rectangles and ellipses of very different sizes, scaled to cover `COVERAGE`.

    The cut-out is no part of any mask (behaviour.md 8g).
    """
    axis = (torch.arange(CROP) + 0.5) / CROP
    y, x = torch.rand(2, count, 1, 1, generator=generator)
    height, width = torch.rand(2, count, 1, 1, generator=generator).mul(3).sub(3).exp()
    dy, dx = (axis[:, None] - y).abs() / height, (axis - x).abs() / width
    is_round = torch.rand(count, 1, 1, generator=generator) < 0.5
    distance = torch.where(is_round, (dx**2 + dy**2).sqrt(), torch.maximum(dx, dy))
    distance[:, CUT_OUT, CUT_OUT] = torch.inf
    nearest = distance.amin(dim=0).flatten()
    scale = nearest.sort().values[int(COVERAGE * len(nearest)) - 1]
    return distance <= scale


def measure_here(name: str, setting: Setting, breakdown: bool) -> Measurement:
    """Steps of one contestant in this process."""
    torch.set_num_threads(setting.threads)
    parts: dict[str, float] | None = {} if breakdown else None
    step = CONTESTANTS[name](make_problem(setting), parts)
    first_loss = step()  # the warm-up
    if parts:
        parts.clear()
    seconds, cpu_seconds = [], []
    for _ in range(setting.steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Measurement(
        first_loss=first_loss,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        system_seconds=usage.ru_stime,
        # Linux counts in kB, and counts the parent's few hundred MB at fork as the least value.
        peak_bytes=usage.ru_maxrss * 1024,
        parts={part: total / setting.steps for part, total in (parts or {}).items()},
    )


def measure_in_child(
    name: str, setting: Setting, allocator: Mapping[str, str], breakdown: bool = False
) -> Measurement:
    """`measure_here` in a process of its own with that allocator."""
    environment = {key: value for key, value in os.environ.items() if key not in HEAP_KEPT}
    environment |= {"OMP_NUM_THREADS": str(setting.threads), **allocator}
    command = [sys.executable, __file__, "--child", name, json.dumps(asdict(setting))]
    command += ["--breakdown"] if breakdown else []
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Measurement(**json.loads(child.stdout.splitlines()[-1]))


def measure_all(
    setting: Setting, names: list[str], runs: int, breakdown: bool
) -> dict[str, dict[str, list[Measurement]]]:
    """By allocator and contestant; the contestants take turns."""
    found: dict[str, dict[str, list[Measurement]]] = {}
    for allocator, environment in ALLOCATORS.items():
        found[allocator] = {name: [] for name in names}
        for _ in range(runs):
            for name in names:
                one = measure_in_child(name, setting, environment, breakdown)
                found[allocator][name].append(one)
                print(f"{allocator:8} {name:8} {describe(one)}", flush=True)
    return found


def describe(one: Measurement) -> str:
    """The numbers of one process, and a line for each part."""
    wall, cpu = statistics.median(one.seconds), statistics.median(one.cpu_seconds)
    lines = [f"{wall:.2f} s ({cpu:.2f} s CPU), {one.peak_bytes / 1e9:.2f} GB,"
             f" first loss {one.first_loss:.7f}"]  # fmt: skip
    lines += [f"    {part:16} {seconds:7.3f} s" for part, seconds in one.parts.items()]
    return "\n".join(lines)


def summarise(found: dict[str, dict[str, list[Measurement]]]) -> dict[str, float]:
    """Medians over the runs, and how far the first losses lie apart at most."""
    seconds = {
        (allocator, name): statistics.median(t for one in rows for t in one.seconds)
        for allocator, contestants in found.items()
        for name, rows in contestants.items()
    }
    peaks = {
        name: statistics.median(one.peak_bytes for one in rows)
        for name, rows in found["default"].items()
    }
    losses = {
        name: [one.first_loss for contestants in found.values() for one in contestants[name]]
        for name in CONTESTANTS
    }
    return {
        **{
            f"speedup_{allocator}_allocator": seconds[allocator, "baseline"]
            / seconds[allocator, "ours"]
            for allocator in found
        },
        "peak_memory_ratio": peaks["ours"] / peaks["baseline"],
        "loss_abs_diff": max(
            abs(mine - theirs) for mine in losses["ours"] for theirs in losses["baseline"]
        ),
    }


def describe_machine() -> dict[str, object]:
    """Processor, memory and versions."""
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": model[0] if model else platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "timm": timm.__version__,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--clusters", type=int, default=64)
    parser.add_argument("--masks", type=int, default=40, help="per photo")
    parser.add_argument("--runs", type=int, default=5, help="processes per contestant")
    parser.add_argument("--steps", type=int, default=1, help="timed steps per process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--architecture", default="ViT-B-16-quickgelu", help="or: small")
    parser.add_argument("--only", choices=list(CONTESTANTS), help="measure one of the two")
    parser.add_argument("--breakdown", action="store_true", help="seconds by part of the step")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse()
    if args.child:
        name, setting = args.child[0], Setting(**json.loads(args.child[1]))
        print(json.dumps(asdict(measure_here(name, setting, args.breakdown))))
        return
    setting = Setting(
        architecture=args.architecture,
        batch=args.batch,
        clusters=args.clusters,
        masks=args.masks,
        steps=args.steps,
        threads=args.threads,
        seed=args.seed,
    )
    names = [args.only] if args.only else list(CONTESTANTS)
    found = measure_all(setting, names, args.runs, args.breakdown)
    results = {} if args.only else summarise(found)
    for key, value in results.items():
        print(f"{key}: {value:.3g}")
    if args.json:
        raw = {
            allocator: {name: [asdict(one) for one in rows] for name, rows in contestants.items()}
            for allocator, contestants in found.items()
        }
        content = {**results, "setting": asdict(setting), "runs": args.runs,
                   "allocators": ALLOCATORS, "machine": describe_machine(), "raw": raw}  # fmt: skip
        args.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
