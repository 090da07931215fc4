"""The pieces of a job over a Ray cluster, by Ray Data."""

import logging
import os
import pickle
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from pixelclip.errors import DataError, MissingExtra, PixelClipError
from pixelclip.jobs.work import Do, Outcome, Piece, Work
from pixelclip.workers import set_threads

MAX_BLOCKS = 4096  # Ray keeps a record of each


def run_on_ray(
    work: Work,
    pieces: Sequence[Piece],
    workers: int,
    threads: int,
    tick: Callable[[int], None],
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
        tick: told how many photos are done.
        gpu: each worker also takes a GPU.

    Raises:
        DataError: Ray gave up on a piece.
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
    try:
        with redirect_stdout(sys.stderr):  # what Ray says of dead workers is no result
            if is_ours:
                ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
            ray.data.DataContext.get_current().enable_progress_bars = False
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            rows = [{"piece": pickle.dumps(piece)} for piece in pieces]
            results = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map(
                _Actor,  # type: ignore[arg-type]  # a class is set up once per worker
                fn_constructor_args=(work, threads, Path.cwd()),
                concurrency=workers,
                num_cpus=threads,
                num_gpus=1 if gpu else None,
            )
            for row in results.iter_rows():
                yield _answer(row, tick)
    except (RayError, ConnectionError) as error:
        raise DataError(f"Ray gave up: {_first_line(error)}") from error
    finally:
        if is_ours:
            ray.shutdown()


def _answer(row: dict[str, bytes], tick: Callable[[int], None]) -> tuple[int, list[Outcome]]:
    """What a worker says of a piece.

    Raises:
        PixelClipError: it could not be done.
    """
    answer = pickle.loads(row["answer"])  # from our own workers
    if isinstance(answer, PixelClipError):
        raise answer
    number, outcomes = answer
    tick(len(outcomes))
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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
