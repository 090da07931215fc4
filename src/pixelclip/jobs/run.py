"""Run a job: an engine, a progress bar, a summary."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from pixelclip.errors import ConfigError
from pixelclip.jobs.processes import run_over
from pixelclip.jobs.ray_data import run_on_ray
from pixelclip.jobs.work import Outcome, Piece, Work
from pixelclip.photos import Photo
from pixelclip.progress import Shown
from pixelclip.workers import check_not_importing, cores
from pixelclip.workers import threads as limited_threads

MANY = 64  # photos; below, starting processes takes longer than it saves


class Crew(NamedTuple):
    """Who does a job.

    Attributes:
        engine: `local`, or `ray` for the cluster that Ray finds (`ray_data.py`).
        workers: processes; with `local`, 1 is this one.
        threads: of each process for torch.
        gpu: with `ray`, every worker takes a GPU.
    """

    engine: str = "local"
    workers: int = 1
    threads: int = 1
    gpu: bool = False


def make_crew(
    photos: int, workers: int | None, engine: str, *, is_light: bool, gpu: bool = False
) -> Crew:
    """Workers and threads for so many photos.

    Light work on many photos gets a thread per process and, unless told otherwise, a process per
    core. All other work gets all cores in each process, and one process. Threads never depend on
    the number of workers, as results may depend on threads in the last bit.

    Raises:
        ConfigError: engine or workers are wrong.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"{workers} workers; at least 1 is needed")
    if engine not in ("local", "ray"):
        raise ConfigError(f"unknown engine {engine!r}; available: local, ray")
    is_split = is_light and photos >= MANY
    own = cores() if is_split else 1
    threads = 1 if is_split else cores()
    return Crew(engine, own if workers is None else workers, threads, gpu)


class Summary(NamedTuple):
    """What became of a job.

    Attributes:
        failed: photos and one line each, in the order of the pieces.
        new: number of photos done now.
        kept: number of photos done in an earlier run.
    """

    failed: list[tuple[Photo, str]]
    new: int
    kept: int


def run(
    work: Work,
    pieces: Sequence[Piece],
    crew: Crew = Crew(),  # noqa: B008 - it cannot be changed
    *,
    what: str,
    quiet: bool = False,
) -> Summary:
    """Do all pieces.

    Args:
        work: what is done.
        pieces: of the job, those that are done already included.
        crew: who does it.
        what: is done, for the progress bar ("making masks").
        quiet: show no progress.

    Raises:
        ConfigError: a worker process of the caller has got here as it was started.
        DataError: a worker process died, or results cannot be written.
        MissingExtra: Ray is not installed.
    """
    check_not_importing()
    total = sum(len(piece.photos) for piece in pieces)
    with Shown(what, total, 0, quiet=quiet, unit=_unit(pieces, total)) as shown:
        done = 0

        def tick(is_new: bool) -> None:
            nonlocal done
            done += 1
            shown.first += not is_new  # what was there says nothing of the time left
            shown.update(done, "")

        if crew.engine == "ray" and pieces:
            return _summary(
                run_on_ray(work, pieces, crew.workers, crew.threads, tick, gpu=crew.gpu)
            )
        if crew.workers > 1 and pieces:
            return _summary(run_over(work, pieces, crew.workers, crew.threads, tick))
        return _summary(_run_here(work, pieces, crew.threads, tick))


def _unit(pieces: Sequence[Piece], total: int) -> str:
    """What is counted: photos, or where they come several times, as with rivals, so many."""
    photos = len({(photo.path, photo.url) for piece in pieces for photo in piece.photos})
    return "photos" if photos == total else f"passes over {photos} photos"


def _summary(outcomes: Iterator[tuple[int, list[Outcome]]]) -> Summary:
    new = kept = 0
    failed: list[tuple[int, Photo, str]] = []
    for index, piece in outcomes:
        for outcome in piece:
            if outcome.error:
                failed.append((index, outcome.photo, outcome.error))
            elif outcome.is_new:
                new += 1
            else:
                kept += 1
    failed.sort(key=lambda item: item[0])
    return Summary([(photo, error) for _, photo, error in failed], new, kept)


def _run_here(
    work: Work, pieces: Sequence[Piece], threads: int, tick: Callable[[bool], None]
) -> Iterator[tuple[int, list[Outcome]]]:
    with limited_threads(threads):
        do = work.start()
        for piece in pieces:
            outcomes = []
            for outcome in do(piece):
                tick(outcome.is_new)
                outcomes.append(outcome)
            yield piece.number, outcomes
