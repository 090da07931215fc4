"""The pieces of a job over processes of this machine."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import NamedTuple

from pixelclip.errors import DataError
from pixelclip.jobs.work import Do, Outcome, Piece, Work
from pixelclip.workers import end_with_parent, set_threads

AHEAD = 2  # pieces handed out per worker: a job of millions need not be queued at once
NEW, KEPT = b"n", b"k"
DIED = (
    "a worker process died, perhaps for want of memory; the same command with fewer --workers goes"
    " on, what is finished is kept"
)


def run_over(
    work: Work, pieces: Sequence[Piece], workers: int, threads: int, tick: Callable[[bool], None]
) -> Iterator[tuple[int, list[Outcome]]]:
    """Over processes that are spawned: a fork would inherit the locks of a caller's threads."""
    context = get_context("spawn")
    shown, ticks = context.Pipe(duplex=False)
    todo, running = iter(pieces), set[Future[tuple[int, list[Outcome]]]]()
    with (
        _counting(shown, ticks, tick),
        _pool(ProcessPoolExecutor(workers, context, _begin, (work, threads, ticks))) as pool,
    ):
        while True:
            while len(running) < AHEAD * workers and (piece := next(todo, None)) is not None:
                running.add(pool.submit(_do, piece))
            if not running:
                return
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                yield future.result()


@contextmanager
def _pool(pool: ProcessPoolExecutor) -> Iterator[ProcessPoolExecutor]:
    """The pool; on Ctrl-C or an error its processes end at once: a piece may take an hour."""
    try:
        with pool:
            try:
                yield pool
            except BaseException:
                processes = list((pool._processes or {}).values())
                pool.shutdown(wait=False, cancel_futures=True)
                for process in processes:
                    process.kill()
                raise
    except BrokenProcessPool as error:
        raise DataError(DIED) from error


@contextmanager
def _counting(shown: Connection, ticks: Connection, tick: Callable[[bool], None]) -> Iterator[None]:
    """Show what the workers have done, as they do it.

    All write to one pipe without a lock, which a worker that is killed would take with it: a
    message is a single write of a few bytes, which no other one divides.
    """

    def listen() -> None:
        while message := shown.recv_bytes():
            tick(message == NEW)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield
    finally:
        ticks.send_bytes(b"")
        listener.join(timeout=5)
        shown.close()
        ticks.close()


class _Worker(NamedTuple):
    work: Work
    ticks: Connection


_worker: list[_Worker] = []  # of a worker process


def _begin(work: Work, threads: int, ticks: Connection) -> None:
    end_with_parent()
    set_threads(threads)
    _worker.append(_Worker(work, ticks))


@cache
def _started() -> Do:
    """The work, started with the first piece, as an error there reaches the caller."""
    return _worker[0].work.start()


def _do(piece: Piece) -> tuple[int, list[Outcome]]:
    """Do a piece in a worker process."""
    outcomes = []
    for outcome in _started()(piece):
        _worker[0].ticks.send_bytes(NEW if outcome.is_new else KEPT)
        outcomes.append(outcome)
    return piece.number, outcomes
