"""Models and rivals over data sets: a job whose pieces are counts, added up to one table."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pixelclip.backbones.means import Means
from pixelclip.errors import ConfigError, DataError
from pixelclip.evaluation.chosen import Chosen, dataset_below, thinned, with_masks
from pixelclip.evaluation.datasets import load_folder, read_spec
from pixelclip.evaluation.entrants import Entrants, Task, make_eval_crew
from pixelclip.evaluation.evaluate import compare
from pixelclip.evaluation.metrics import mean_iou, no_counts
from pixelclip.evaluation.piece_files import gone
from pixelclip.evaluation.pieces import (
    PieceCounts,
    read_piece,
    sum_pieces,
    worst_of,
    write_piece,
)
from pixelclip.evaluation.protocols import protocol, settings_and_departures, suite
from pixelclip.evaluation.report import Scores, Terms, make_report
from pixelclip.evaluation.results import (
    Result,
    Results,
    print_lines,
    print_results,
    write_results,
)
from pixelclip.evaluation.rivals import check_rivals, departures_of
from pixelclip.evaluation.sheet import small
from pixelclip.images import check_writable
from pixelclip.jobs.run import Crew, run
from pixelclip.jobs.work import Do, Outcome, Piece
from pixelclip.masks.refiner import check_apart, is_light
from pixelclip.workers import threads


@dataclass(frozen=True)
class EvalJob:
    """What is asked for.

    Attributes:
        means: the model.
        data: plain folders.
        datasets: names of data sets below `root`.
        suite: name of a suite, its sets below `root`; None: none.
        root: where data sets are: each in a folder of its name, or all of them in this one.
        rivals: beside the model itself.
        dino: tower of the rivals that need one: name, folder or weight file.
        photos: at most so many of each data set, evenly spaced; None: all.
        preset: a protocol; None: the suite's, or default.
        settings: of the segmenter, over the protocol's; None: not given.
        refine: masks of which each gets one class: the name of a source, or a file or folder of
            masks of all data sets, or one with a folder for each, named like it; None: none.
        workers: processes; None: one, or as many as cores where models are small.
        engine: `local`, or `ray`.
        output: folder for results and pieces; None: nothing is kept.
        json_file: for the figures; None: none.
        quiet: print errors only.
    """

    means: Means
    data: tuple[Path, ...] = ()
    datasets: tuple[str, ...] = ()
    suite: str | None = None
    root: Path | None = None
    rivals: tuple[str, ...] = ()
    dino: str | None = None
    photos: int | None = None
    preset: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    refine: str | None = None
    workers: int | None = None
    engine: str = "local"
    output: Path | None = None
    json_file: Path | None = None
    quiet: bool = False

    @property
    def protocol(self) -> str:
        """The name of the protocol."""
        return self.preset or (suite(self.suite).protocol if self.suite else "default")


def run_eval_job(job: EvalJob) -> int:
    """Evaluate the model and the rivals on all data sets, print and write the figures.

    What a killed run has finished is kept in `output`; the figures are the same to the last bit.

    Returns:
        0: all done; 1: photos failed, or data sets are missing or not whole; they are listed.

    Raises:
        PixelClipError: nothing could be done.
    """
    check_job(job)
    datasets, missing = find_datasets(job)
    datasets = [with_masks(chosen, job.refine) for chosen in datasets]
    datasets = [thinned(chosen, job.photos) for chosen in datasets]
    with pieces_folder(job.output) as folder:
        entrants = Entrants(job.means, job.dino)
        crew = eval_crew(job, datasets, entrants, light_masks=is_light(job.refine))
        tasks = make_tasks(job, datasets, entrants, crew.threads, folder)
        is_here = crew.engine == "local" and crew.workers == 1
        work = EvalWork(job.means, job.dino, tuple(tasks), entrants if is_here else None)
        pieces = [piece for task in tasks for piece in task.shares]
        run(work, pieces, crew, what="evaluating", quiet=job.quiet)
        found, lost = _results(tasks, entrants, job.protocol)
    columns = suite(job.suite).sets if job.suite else ()
    sets = tuple(dict.fromkeys([*columns, *(it.dataset.name for it in datasets)]))
    results = Results(tuple(found), sets, (*missing, *lost), with_published=bool(job.suite))
    write_results(results, job.output, job.json_file)
    print_results(results, quiet=job.quiet)
    has_failed = any(result.report["failed"] for result in found)
    return 1 if results.missing or results.partial or has_failed else 0


def check_job(job: EvalJob) -> None:
    """Make sure that the job makes sense and can be written, before the work."""
    if not (job.data or job.datasets or job.suite):
        raise ConfigError("nothing to evaluate on; give --data DIR, --dataset NAME or --suite NAME")
    protocol(job.protocol)
    check_rivals(job.rivals, job.dino)
    named = bool(job.datasets or job.suite)
    if named != (job.root is not None):
        raise ConfigError(
            "--dataset and --suite need --root, the folder of the downloads"
            if named
            else "--root goes with --dataset or --suite"
        )
    if job.photos is not None and job.photos < 1:
        raise ConfigError(f"--photos {job.photos}: at least 1 of each data set")
    if job.engine == "ray" and job.output is None:
        raise ConfigError("--engine ray needs -o, a folder that all machines of the cluster share")
    check_apart(job.refine, job.output)
    if job.output is not None:
        check_writable(job.output)
    if job.json_file is not None:
        check_writable(job.json_file.parent)
        if job.json_file.is_dir():
            raise DataError(f"--json {job.json_file} is a folder; name a file")


def find_datasets(job: EvalJob) -> tuple[list[Chosen], list[str]]:
    """The data sets, and a line for each of the suite that is not there.

    Raises:
        DataError: none is there, or one that was asked for by name is not.
    """
    found = [Chosen(load_folder(folder)) for folder in job.data]
    found += [_below(job, name) for name in job.datasets]
    missing = []
    for name in suite(job.suite).sets if job.suite else ():
        if name in job.datasets:
            continue
        try:
            found.append(_below(job, name))
        except DataError as error:
            missing.append(str(error))
    if not found:
        print_lines(missing)
        raise DataError(f"none of the {len(missing)} data sets is there; all are named above")
    taken: set[str] = set()
    for index, chosen in enumerate(found):
        own, number = chosen.dataset.name, 2
        while (name := own if number == 2 else f"{own}-{number - 1}") in taken:
            number += 1
        taken.add(name)
        found[index] = replace(chosen, dataset=replace(chosen.dataset, name=name))
    return found, missing


def _below(job: EvalJob, name: str) -> Chosen:
    assert job.root is not None
    notes = read_spec(name).notes
    if job.suite and job.protocol != suite(job.suite).protocol:
        notes += (f"the protocol of the suite {job.suite} is {suite(job.suite).protocol}",)
    return Chosen(dataset_below(name, job.root), notes)


@contextmanager
def pieces_folder(output: Path | None) -> Iterator[Path]:
    """Where pieces go."""
    if output is not None:
        yield output / "pieces"
        return
    with TemporaryDirectory(prefix="pixelclip-") as folder:
        yield Path(folder)


def eval_crew(
    job: EvalJob, datasets: Sequence[Chosen], entrants: Entrants, *, light_masks: bool
) -> Crew:
    """Who does it; `light_masks`: no large model makes masks of photos beside it."""
    photos = sum(len(it.dataset.pairs) for it in datasets)
    return make_eval_crew(
        entrants.backbone(), photos, job.workers, job.engine, light_masks=light_masks
    )


def make_tasks(
    job: EvalJob,
    datasets: Sequence[Chosen],
    entrants: Entrants,
    num_threads: int,
    folder: Path,
) -> list[Task]:
    """The model and each rival on each data set; what is wrong with any of them is said now."""
    for rival in job.rivals:
        entrants.backbone(rival)
    tasks: list[Task] = []
    first = 0
    for rival in dict.fromkeys(["", *job.rivals]):
        for chosen in datasets:
            data = chosen.dataset
            config, departures = settings_and_departures(
                job.protocol, job.settings, data, chosen.notes
            )
            departures += departures_of(rival)
            task = Task(rival, data, config, tuple(departures), first, masks=chosen.masks)
            with threads(num_threads):  # as in worker processes: features of words depend on it
                identity = entrants.identity(task, num_threads)
            own = folder / f"{data.name}-{rival or 'model'}-{identity[:12]}"
            tasks.append(replace(task, identity=identity, folder=own))
            first += len(task.pieces)
    return tasks


@dataclass(frozen=True)
class EvalWork:
    """Pairs become counts in files.

    Attributes:
        means: the model.
        dino: tower of the rivals that need one.
        tasks: in the order of their pieces.
        entrants: models that are loaded already.
    """

    means: Means
    dino: str | None
    tasks: tuple[Task, ...]
    entrants: Entrants | None = None

    def start(self) -> Do:
        """A function that counts a piece; models are loaded but once."""
        entrants = self.entrants or Entrants(self.means, self.dino)
        starts = [task.first for task in self.tasks]

        def do(piece: Piece) -> Iterator[Outcome]:
            task = self.tasks[bisect_right(starts, piece.number) - 1]
            number = piece.number - task.first
            pairs = task.pieces[number]
            stamp, path = task.stamp(pairs), task.path(number)
            known = read_piece(path, stamp, len(task.dataset.classes), len(pairs))
            if known is not None and not any(known.errors):  # what was wrong may be mended
                for photo in piece.photos:
                    yield Outcome(photo, is_new=False)
                return
            counts, mious = no_counts(len(task.dataset.classes)), np.full(len(pairs), np.nan)
            errors, maps = [""] * len(pairs), {}
            for item in compare(entrants.segmenter(task), task.dataset, pairs):
                errors[item.number] = item.error
                if item.counts is not None and item.labels is not None:
                    counts += item.counts
                    mious[item.number] = mean_iou(item.counts.confusion)
                    maps[item.number] = small(item.labels)
                yield Outcome(piece.photos[item.number], item.error)
            drawn = {worst: maps[worst] for worst in worst_of(mious)}
            write_piece(path, stamp, PieceCounts(counts, mious, errors, drawn))

        return do


def _results(
    tasks: Sequence[Task], entrants: Entrants, protocol: str
) -> tuple[list[Result], list[str]]:
    """The figures of each task, and a line for each that has none.

    Raises:
        DataError: none has any, or a piece has gone.
    """
    found: list[Result] = []
    lost: list[str] = []
    for task in tasks:
        total = _total(task)
        failed = [error for error in total.errors if error]
        scores = Scores(total.counts, total.mious, failed)
        terms = Terms(task.rival or None, protocol, task.departures)
        segmenter = entrants.segmenter(task)
        try:
            report = make_report(segmenter, task.dataset, scores, terms)
        except DataError as error:
            lost.append(str(error))
        else:
            max_pixels = task.config.max_pixels
            found.append(Result(report, scores, total.drawn, task.dataset, max_pixels))
    if not found:
        raise DataError(lost[0])
    return found, lost


def _total(task: Task) -> PieceCounts:
    def read() -> Iterator[PieceCounts]:
        for number, pairs in enumerate(task.pieces):
            path = task.path(number)
            piece = read_piece(path, task.stamp(pairs), len(task.dataset.classes), len(pairs))
            if piece is None:
                raise gone(path)
            yield piece

    return sum_pieces(read())
