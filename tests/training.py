"""Small training runs: photos with masks, settings, and runs in processes that start at once."""

import json
import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pixelclip import cli
from pixelclip.checkpoint import read_state
from tests.tiny import photo

PRELOADED = [__name__, "pixelclip.training.start", "open_clip", "pixelclip.backbones.vit",
             "pixelclip.backbones.text", "pixelclip.backbones.open_clip_models"]  # fmt: skip
SIZES = [(90, 60), (64, 64), (50, 80), (70, 40), (100, 64), (48, 60)]
SMALL: dict[str, object] = {
    "steps": 2, "batch_size": 4, "num_clusters": 4, "prompt_length": 2, "short_side": 48,
    "long_side": 80, "crop_size": 48, "input_size": 64, "mask_size": 24, "num_workers": 0,
    "checkpoint_every": 1, "picture_every": 0,
}  # fmt: skip


def write_photos(folder: Path, *, masked: int = len(SIZES)) -> tuple[Path, Path]:
    """Folders of photos and of label maps, which the first `masked` photos have."""
    photos, masks = folder / "photos", folder / "masks"
    for path in (photos, masks):
        path.mkdir(parents=True)
    for seed, (width, height) in enumerate(SIZES):
        photo(width, height, seed).save(photos / f"{seed}.png")
        draw = np.random.default_rng(seed)
        coarse = Image.fromarray(draw.integers(0, 4 + seed, (4, 5), dtype=np.uint8))
        labels = coarse.resize((width, height), Image.Resampling.NEAREST)
        if seed < masked:
            labels.save(masks / f"{seed}.png")
    return photos, masks


def as_options(settings: dict[str, object]) -> list[str]:
    """Settings as the command line takes them."""
    return [part for key, value in settings.items() for part in ("--set", f"{key}={_toml(value)}")]


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def command(
    photos: Path, masks: Path, model: Path | str, output: Path, **settings: object
) -> list[str]:
    """`pixelclip train` of a small run."""
    paths = ["--images", photos, "--masks", masks, "--model", model, "-o", output]
    return ["train", *map(str, paths), "--device", "cpu", *as_options({**SMALL, **settings})]


def start(
    arguments: list[str],
    log: Path,
    *,
    ranks: tuple[int, int, int] | None = None,
    signal_at: tuple[int, str, int] | None = None,
    file_limit: int | None = None,
) -> ForkServerProcess:
    """The command line in a process of its own, forked from one that has loaded everything.

    Args:
        arguments: of `pixelclip`.
        log: takes what it prints.
        ranks: this process's number, the number of processes and the port they meet at.
        signal_at: a signal that the process gets before a file operation: part of the file's
            path, and at the how many-th such operation.
        file_limit: files cannot grow beyond so many bytes, as on a full disk.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run, args=(arguments, log, ranks, signal_at, file_limit))
    process.start()
    return process


def run(arguments: list[str], log: Path, **options: object) -> tuple[int, str]:
    """Exit code of the command line, and what it printed."""
    process = start(arguments, log, **options)
    process.join()
    return process.exitcode, log.read_text()


def random_numbers_moved(arguments: list[str], log: Path) -> list[str]:
    """Generators that the command line draws from; in this process beartype draws, too.

    Python's own is left out: libraries draw from it while they wait, and training never does.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_compare_generators, args=(arguments, log))
    process.start()
    process.join()
    return log.with_suffix(".moved").read_text().split()


def _compare_generators(arguments: list[str], log: Path) -> None:
    def states() -> dict[str, str]:
        return {
            "torch": str(torch.get_rng_state().tolist()),
            "numpy": str(np.random.get_state()[1].tolist()),
        }

    before = states()
    try:
        _run(arguments, log, None, None, None)
    except SystemExit as stop:
        moved = [name for name, state in states().items() if state != before[name]]
        log.with_suffix(".moved").write_text(" ".join(moved if stop.code == 0 else ["failed"]))


def run_together(arguments: list[str], log: Path, count: int) -> None:
    """The command line in several processes that train together, as torchrun starts them."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [log.with_suffix(f".{rank}") for rank in range(count)]
    processes = [
        start(arguments, path, ranks=(rank, count, port)) for rank, path in enumerate(logs)
    ]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count, logs[0].read_text()


def _run(
    arguments: list[str],
    log: Path,
    ranks: tuple[int, int, int] | None,
    signal_at: tuple[int, str, int] | None,
    file_limit: int | None,
) -> None:
    torch.set_num_threads(1)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["pixelclip", *arguments]
    if ranks is not None:
        join_processes(*ranks)
    if signal_at is not None:
        _signal_at(*signal_at)
    if file_limit is not None:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    try:
        cli.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def join_processes(rank: int, count: int, port: int) -> None:
    """What torchrun tells the processes that it starts."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def _signal_at(number: int, part: str, count: int) -> None:
    """Send a signal to this process before a file operation."""
    seen = 0

    def listen(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.chmod") and part in str(arguments[0]):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), number)

    sys.addaudithook(listen)


def read_rows(folder: Path) -> list[dict[str, float]]:
    """The steps' figures so far; a line that is just being written does not count."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def result(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """What a run leaves: weights, and figures without times."""
    rows = read_rows(folder)
    times = ("seconds", "loader_seconds")
    figures = [{key: value for key, value in row.items() if key not in times} for row in rows]
    return read_state(folder / "model.safetensors"), figures


def assert_same_run(one: Path, other: Path) -> None:
    """Equal to the last bit."""
    (ours, rows), (theirs, other_rows) = result(one), result(other)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert rows == other_rows
    csvs = [(folder / "metrics.csv").read_text().splitlines() for folder in (one, other)]
    assert len(csvs[0]) == len(csvs[1]) == len(rows) + 1
