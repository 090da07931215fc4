"""The pieces of a job over a Ray cluster, by Ray Data."""

import logging
import os
import pickle
import platform
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from pixelclip.errors import DataError, MissingExtra, PixelClipError
from pixelclip.jobs.work import Do, Outcome, Piece, Work
from pixelclip.workers import set_threads

MAX_BLOCKS = 4096  # Ray keeps a record of each


def run_on_ray(
    work: Work,
    pieces: Sequence[Piece],
    workers: int,
    threads: int,
    tick: Callable[[bool], None],
    *,
    gpu: bool,
) -> Iterator[tuple[int, list[Outcome]]]:
    """Do all pieces; those of a worker that dies are done by another.

    The cluster is the one that Ray finds (`RAY_ADDRESS`, or the one this process is connected
    to); without any, one is started on this machine for the job. Results must lie where all
    machines write to.

    Args:
        work: what is done.
        pieces: of the job.
        workers: processes in the cluster.
        threads: of each, hence cores that it takes.
        tick: told of each photo that is done whether it was done now.
        gpu: each worker also takes a GPU.

    Raises:
        DataError: there is no cluster at `RAY_ADDRESS`, or Ray gave up on a piece.
        MissingExtra: Ray is not installed.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it writes to the terminal as it likes
    try:
        import ray
        import ray.data
        from ray.exceptions import RayError
    except ImportError as error:
        raise MissingExtra("--engine ray needs Ray: pip install 'pixelclip[ray]'") from error
    is_ours = not ray.is_initialized()
    if is_ours:
        _check_address(os.environ.get("RAY_ADDRESS", ""))
    with redirect_stdout(sys.stderr):  # what Ray says of dead workers is no result
        try:
            if is_ours:
                ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
            ray.data.DataContext.get_current().enable_progress_bars = False
            logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # the error is ours to tell
            rows = [{"piece": pickle.dumps(piece)} for piece in pieces]
            results = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map(
                _Actor,  # type: ignore[arg-type]  # a class is set up once per worker
                fn_constructor_args=(work, threads, Path.cwd()),
                concurrency=workers,
                num_cpus=min(threads, _cores_of_largest(ray.nodes())),
                num_gpus=1 if gpu else None,
            )
            for row in results.iter_rows():
                yield _answer(row, tick)
        except (RayError, ConnectionError) as error:
            raise DataError(f"Ray gave up: {_last_line(error)}") from error
        finally:
            if is_ours:
                ray.shutdown()


def _check_address(address: str) -> None:
    """Make sure that something answers there: Ray itself would try for a quarter of an hour.

    Raises:
        DataError: nothing does.
    """
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", "local" or nothing
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise DataError(f"no Ray cluster answers at RAY_ADDRESS {address}: {error}") from error


def _cores_of_largest(nodes: Sequence[Mapping[str, Any]]) -> float:
    """More than that no worker can ask for: it would never be started."""
    cores = [node["Resources"].get("CPU", 0) for node in nodes if node["Alive"]]
    return max([1, *cores])


def _answer(row: dict[str, bytes], tick: Callable[[bool], None]) -> tuple[int, list[Outcome]]:
    """What a worker says of a piece.

    Raises:
        PixelClipError: it could not be done.
    """
    answer = pickle.loads(row["answer"])  # from our own workers
    if isinstance(answer, PixelClipError):
        raise answer
    number, outcomes = answer
    for outcome in outcomes:
        tick(outcome.is_new)
    return number, outcomes


class _Actor:
    """A worker of the cluster; the work is started with its first piece."""

    def __init__(self, work: Work, threads: int, folder: Path):
        set_threads(threads)
        self.work, self.folder = work, folder
        self.do: Do | None = None

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        piece: Piece = pickle.loads(row["piece"])
        answer: object
        try:
            self.do = self.do or self._start()
            answer = piece.number, list(self.do(piece))
        except PixelClipError as error:
            answer = error
        return {"answer": pickle.dumps(answer)}

    def _start(self) -> Do:
        """The work, started where the command was: its paths may be relative."""
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise DataError(
                f"{self.folder} is not there on {platform.node()}: the machines of the cluster"
                " must share it"
            ) from error
        return self.work.start()


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
