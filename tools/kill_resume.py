"""Does a training that is killed again and again end with the same weights?

    python tools/kill_resume.py PHOTOS MASKS [--kills 20] [--steps 60]

Trains mini once without and once with interruptions: `kill -9` at random moments, from the first
second on, and the same command again. Prints when each kill came and what it left, then compares
every tensor of the two models and every row of the metrics but the times.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

SMALL = {
    "batch_size": 4, "num_clusters": 16, "crop_size": 128, "input_size": 128, "mask_size": 64,
    "num_workers": 1, "checkpoint_every": 4, "picture_every": 20,
}  # fmt: skip
TIMES = ("seconds", "loader_seconds")


def command(photos: Path, masks: Path, run: Path, steps: int) -> list[str]:
    """The command line of a run."""
    settings = [f"--set={name}={value}" for name, value in {**SMALL, "steps": steps}.items()]
    start = [sys.executable, "-m", "pixelclip", "train", "-q", "--model", "mini"]
    return [*start, "--images", str(photos), "--masks", str(masks), "-o", str(run), *settings]


def steps_written(run: Path) -> str:
    """Names of the checkpoints there are."""
    return ", ".join(path.stem for path in sorted(run.glob("checkpoints/*.pt"))) or "nothing"


def run_with_kills(arguments: list[str], run: Path, kills: int, draw: random.Random) -> None:
    """Start, kill, start again; the last time it may finish."""
    for number in range(1, kills + 1):
        process = subprocess.Popen(arguments)
        wait = draw.uniform(0.5, 16)
        try:
            process.wait(wait)
            print(f"finished before kill {number}", flush=True)
            return
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            print(f"kill {number:2} after {wait:4.1f} s: {steps_written(run)}", flush=True)
    subprocess.run(arguments, check=True)


def rows(run: Path) -> list[dict[str, object]]:
    """The metrics without times."""
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def main() -> int:
    """Print what differs; exit with 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("masks", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    whole, killed = folder / "whole", folder / "killed"
    start = time.monotonic()
    subprocess.run(command(options.photos, options.masks, whole, options.steps), check=True)
    print(f"uninterrupted: {time.monotonic() - start:.0f} s", flush=True)
    arguments = command(options.photos, options.masks, killed, options.steps)
    run_with_kills(arguments, killed, options.kills, random.Random(options.seed))
    ours, theirs = (load_file(run / "model.safetensors") for run in (whole, killed))
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    print(f"{len(ours)} tensors, different: {different or 'none'}")
    same_rows = rows(whole) == rows(killed)
    print(f"{len(rows(whole))} rows of metrics, {'equal' if same_rows else 'different'}")
    shutil.rmtree(folder)
    return int(bool(different) or not same_rows)


if __name__ == "__main__":
    sys.exit(main())
