"""Models and rivals over data sets: a job whose pieces are counts, added up to one table."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pixelclip.backbones import Backbone
from pixelclip.errors import ConfigError, DataError
from pixelclip.evaluation.datasets import (
    SegmentationDataset,
    load_dataset,
    load_folder,
    read_spec,
)
from pixelclip.evaluation.entrants import Entrants, Means, Task
from pixelclip.evaluation.evaluate import compare
from pixelclip.evaluation.metrics import mean_iou, no_counts
from pixelclip.evaluation.pieces import PieceCounts, read_piece, sum_pieces, write_piece
from pixelclip.evaluation.protocols import protocol, settings_and_departures, suite
from pixelclip.evaluation.report import Scores, Terms, make_report
from pixelclip.evaluation.results import Result, Results, print_results, write_results
from pixelclip.images import check_writable
from pixelclip.jobs.run import Crew, make_crew, run
from pixelclip.jobs.work import Do, Outcome, Piece
from pixelclip.photos import Photo
from pixelclip.workers import cores


@dataclass(frozen=True)
class EvalJob:
    """What is asked for.

    Attributes:
        means: model and device.
        data: plain folders.
        datasets: names of data sets below `root`.
        suite: name of a suite, its sets below `root`; None: none.
        root: where data sets are: each in a folder of its name, or all of them in this one.
        rivals: beside the model itself.
        preset: a protocol; None: the suite's, or default.
        settings: of the segmenter, over the protocol's; None: not given.
        workers: processes; None: one, or as many as cores where models are small.
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
    preset: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    workers: int | None = None
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
        0: all done; 1: photos failed or data sets are missing, they are listed.

    Raises:
        PixelClipError: nothing could be done.
    """
    _check(job)
    datasets, missing = _datasets(job)
    with _folder(job.output) as folder:
        entrants = Entrants(job.means)
        crew = _crew(job, entrants.backbone(), sum(len(it.dataset.pairs) for it in datasets))
        tasks = _tasks(job, datasets, entrants, crew.threads, folder)
        is_here = crew.workers == 1
        work = EvalWork(job.means, tuple(tasks), entrants if is_here else None)
        pieces = [
            Piece(task.first + number, tuple(Photo(photo, Path(photo.stem)) for photo, _ in pairs))
            for task in tasks
            for number, pairs in enumerate(task.pieces)
        ]
        run(work, pieces, crew, what="evaluating", quiet=job.quiet)
        found, lost = _results(tasks, entrants, job.protocol)
    columns = suite(job.suite).sets if job.suite else ()
    sets = tuple(dict.fromkeys([*columns, *(it.dataset.name for it in datasets)]))
    results = Results(tuple(found), sets, (*missing, *lost), with_published=bool(job.suite))
    write_results(results, job.output, job.json_file)
    print_results(results, quiet=job.quiet)
    return 1 if results.missing or any(result.report["failed"] for result in found) else 0


def _check(job: EvalJob) -> None:
    """Make sure that the job makes sense and can be written, before the work."""
    if not (job.data or job.datasets or job.suite):
        raise ConfigError("nothing to evaluate on; give --data DIR, --dataset NAME or --suite NAME")
    protocol(job.protocol)
    named = bool(job.datasets or job.suite)
    if named != (job.root is not None):
        raise ConfigError(
            "--dataset and --suite need --root, the folder of the downloads"
            if named
            else "--root goes with --dataset or --suite"
        )
    if job.output is not None:
        check_writable(job.output)
    if job.json_file is not None:
        check_writable(job.json_file.parent)
        if job.json_file.is_dir():
            raise DataError(f"--json {job.json_file} is a folder; name a file")


@dataclass(frozen=True)
class Chosen:
    """A data set, and what is to be said of it in the results."""

    dataset: SegmentationDataset
    notes: tuple[str, ...] = ()


def _datasets(job: EvalJob) -> tuple[list[Chosen], list[str]]:
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
        raise DataError(f"none of the {len(missing)} data sets is there; first: {missing[0]}")
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
    own = job.root / Path(name).stem
    notes = read_spec(name).notes
    if job.suite and job.protocol != suite(job.suite).protocol:
        notes += (f"the protocol of the suite {job.suite} is {suite(job.suite).protocol}",)
    return Chosen(load_dataset(name, own if own.is_dir() else job.root), notes)


@contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    """Where pieces go."""
    if output is not None:
        yield output / "pieces"
        return
    with TemporaryDirectory(prefix="pixelclip-") as folder:
        yield Path(folder)


def _crew(job: EvalJob, backbone: Backbone, photos: int) -> Crew:
    """Who does it; the threads are the same for any number of photos, sets and workers."""
    is_light = backbone.card.family == "mini" and backbone.device.type == "cpu"
    crew = make_crew(photos, job.workers, "local", is_light=is_light)
    return crew._replace(threads=1 if is_light else cores())


def _tasks(
    job: EvalJob,
    datasets: Sequence[Chosen],
    entrants: Entrants,
    threads: int,
    folder: Path,
) -> list[Task]:
    """The model and each rival on each data set; what is wrong with any of them is said now."""
    for rival in job.rivals:
        entrants.backbone(rival)
    tasks: list[Task] = []
    first = 0
    for rival in dict.fromkeys(["", *job.rivals]):
        for data, notes in ((chosen.dataset, chosen.notes) for chosen in datasets):
            config, departures = settings_and_departures(job.protocol, job.settings, data, notes)
            task = Task(rival, data, config, tuple(departures), first)
            identity = entrants.identity(task, threads)
            own = folder / f"{data.name}-{rival or 'model'}-{identity[:12]}"
            tasks.append(replace(task, identity=identity, folder=own))
            first += len(task.pieces)
    return tasks


@dataclass(frozen=True)
class EvalWork:
    """Pairs become counts in files.

    Attributes:
        means: model and device.
        tasks: in the order of their pieces.
        entrants: models that are loaded already.
    """

    means: Means
    tasks: tuple[Task, ...]
    entrants: Entrants | None = None

    def start(self) -> Do:
        """A function that counts a piece; models are loaded but once."""
        entrants = self.entrants or Entrants(self.means)
        starts = [task.first for task in self.tasks]

        def do(piece: Piece) -> Iterator[Outcome]:
            task = self.tasks[bisect_right(starts, piece.number) - 1]
            number = piece.number - task.first
            pairs = task.pieces[number]
            stamp, path = task.stamp(pairs), task.path(number)
            known = read_piece(path, stamp, len(task.dataset.classes), len(pairs))
            if known is not None:
                for photo, error in zip(piece.photos, known.errors, strict=True):
                    yield Outcome(photo, error, is_new=False)
                return
            counts, mious = no_counts(len(task.dataset.classes)), np.full(len(pairs), np.nan)
            errors = [""] * len(pairs)
            for item in compare(entrants.segmenter(task), task.dataset, pairs):
                errors[item.number] = item.error
                if item.counts is not None:
                    counts += item.counts
                    mious[item.number] = mean_iou(item.counts.confusion)
                yield Outcome(piece.photos[item.number], item.error)
            write_piece(path, stamp, PieceCounts(counts, mious, errors))

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
            found.append(Result(report, scores, segmenter, task.dataset))
    if not found:
        raise DataError(lost[0])
    return found, lost


def _total(task: Task) -> PieceCounts:
    pieces = []
    for number, pairs in enumerate(task.pieces):
        path = task.path(number)
        piece = read_piece(path, task.stamp(pairs), len(task.dataset.classes), len(pairs))
        if piece is None:
            raise DataError(f"{path} has gone, or its photos changed meanwhile; run it again")
        pieces.append(piece)
    return sum_pieces(pieces)
