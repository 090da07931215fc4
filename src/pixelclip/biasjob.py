"""The vocabulary report: a job whose pieces are counts of photos with many vocabularies."""

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from pixelclip.backbones.means import Means
from pixelclip.errors import ConfigError
from pixelclip.evaluation.chosen import dataset_below
from pixelclip.evaluation.datasets import SegmentationDataset, load_folder, read_spec
from pixelclip.evaluation.entrants import Entrants, Task, make_eval_crew
from pixelclip.evaluation.piece_files import gone
from pixelclip.evaluation.plots import check_plots
from pixelclip.evaluation.protocols import settings_and_departures
from pixelclip.evaluation.report import Terms
from pixelclip.evaluation.vocabularies import (
    Counted,
    Vocabularies,
    check_counted,
    count_pair,
    nothing_counted,
)
from pixelclip.evaluation.vocabulary_files import markdown, write_pictures
from pixelclip.evaluation.vocabulary_pieces import read_counted, write_counted
from pixelclip.evaluation.vocabulary_report import VocabularyReport
from pixelclip.evaluation.vocabulary_report import report as make_report
from pixelclip.evaluation.wordings import Wording, load_thesaurus, make_wordings
from pixelclip.images import check_writable, write_bytes, write_json
from pixelclip.jobs.run import run
from pixelclip.jobs.work import Do, Outcome, Piece, cut
from pixelclip.photos import Photo
from pixelclip.workers import threads

log = logging.getLogger("pixelclip")

VERSION = 1  # of what is counted: pieces of another one are done again
PIECE = 4  # photos: each goes through all vocabularies, which may take a minute


@dataclass(frozen=True)
class BiasJob:
    """What is asked for.

    Attributes:
        means: model and device.
        output: folder for report, pictures and pieces.
        data: a plain folder; None: `dataset` below `root`.
        dataset: name of a data set.
        root: where it is, or a folder of its name.
        thesaurus: file of synonyms and near misses; None: the built-in one.
        preset: a protocol.
        settings: of the segmenter, over the protocol's; None: not given.
        workers: processes; None: one, or as many as cores where models are small.
        pictures: draw them.
        quiet: print errors only.
    """

    means: Means
    output: Path
    data: Path | None = None
    dataset: str | None = None
    root: Path | None = None
    thesaurus: Path | None = None
    preset: str = "default"
    settings: Mapping[str, object] = field(default_factory=dict)
    workers: int | None = None
    pictures: bool = True
    quiet: bool = False


def run_bias_job(job: BiasJob) -> int:
    """Count, write report and pictures, print the summary.

    What a killed run has finished is kept in `output`; the figures are the same to the last bit.

    Returns:
        0: all done; 1: photos failed, they are listed.

    Raises:
        PixelClipError: nothing could be done.
    """
    if job.pictures:
        check_plots("--no-plots")
    dataset, notes = _dataset(job)
    wordings = make_wordings(dataset.classes, load_thesaurus(job.thesaurus))
    config, departures = settings_and_departures(job.preset, job.settings, dataset, notes)
    check_writable(job.output)
    if not job.quiet:
        log.info("%d vocabularies: their names come first, then the photos", len(wordings))
    task = Task("", dataset, config, tuple(departures))
    entrants = Entrants(job.means)
    crew = make_eval_crew(entrants.backbone(), len(dataset.pairs), job.workers)
    with threads(crew.threads):  # as in worker processes: features of words depend on it
        vocabularies = Vocabularies(entrants.backbone(), wordings, config)
        task = _identified(job, task, entrants, wordings, crew.threads)
    work = BiasWork(job.means, task, tuple(wordings), tuple(vocabularies.wordings))
    if crew.workers == 1:
        work = replace(work, vocabularies=vocabularies)
    photos = [Photo(photo, Path(photo.stem)) for photo, _ in dataset.pairs]
    run(work, cut(photos, PIECE), crew, what=f"{len(wordings)} vocabularies", quiet=job.quiet)
    counted = _total(task, vocabularies)
    terms = Terms(None, job.preset, departures)
    _write(job, make_report(vocabularies, dataset, counted, terms))
    return 1 if counted.failed else 0


def _dataset(job: BiasJob) -> tuple[SegmentationDataset, tuple[str, ...]]:
    """The data set, and what is to be said of it.

    Raises:
        ConfigError: none or two are named.
        DataError: it is not there.
    """
    if (job.data is None) == (job.dataset is None):
        raise ConfigError("give one data set: --data FOLDER, or --dataset NAME with --root FOLDER")
    if job.data is not None:
        if job.root is not None:
            raise ConfigError("--root goes with --dataset")
        return load_folder(job.data), ()
    assert job.dataset is not None
    if job.root is None:
        raise ConfigError("--dataset needs --root, the folder of the download")
    return dataset_below(job.dataset, job.root), read_spec(job.dataset).notes


def _identified(
    job: BiasJob, task: Task, entrants: Entrants, wordings: Sequence[Wording], threads: int
) -> Task:
    """The task with a hash of all that decides its figures, and the folder of its pieces."""
    what = [VERSION, PIECE, entrants.identity(task, threads), wordings]
    identity = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    folder = job.output / "pieces" / f"{task.dataset.name}-{identity[:12]}"
    return replace(task, identity=identity, folder=folder)


@dataclass(frozen=True)
class BiasWork:
    """Pairs become counts in files.

    Attributes:
        means: model and device.
        task: photos, settings, and where the pieces lie.
        wordings: all that were asked for.
        usable: those that the model can tell apart.
        vocabularies: made of them already.
    """

    means: Means
    task: Task
    wordings: tuple[Wording, ...]
    usable: tuple[Wording, ...]
    vocabularies: Vocabularies | None = None

    def start(self) -> Do:
        """A function that counts a piece; the model is loaded but once, and if need be."""
        task, words, num_classes = self.task, self.usable, len(self.task.dataset.classes)

        @cache
        def vocabularies() -> Vocabularies:
            made = self.vocabularies
            return made or Vocabularies(self.means.load(), self.wordings, task.config)

        def do(piece: Piece) -> Iterator[Outcome]:
            pairs = task.dataset.pairs[piece.number * PIECE :][:PIECE]
            stamp, path = task.stamp(pairs), task.path(piece.number)
            known = read_counted(path, stamp, words, num_classes, len(pairs))
            if known is not None and not known.failed:  # what was wrong may be mended
                for photo in piece.photos:
                    yield Outcome(photo, is_new=False)
                return
            counted = nothing_counted(words, num_classes)
            for photo, pair in zip(piece.photos, pairs, strict=True):
                yield Outcome(photo, count_pair(counted, vocabularies(), task.dataset, pair))
            write_counted(path, stamp, counted)

        return do


def _total(task: Task, vocabularies: Vocabularies) -> Counted:
    """All pieces as one, in their order.

    Raises:
        DataError: one has gone, no pair could be used, or nothing is labelled.
    """
    words, pairs = vocabularies.wordings, task.dataset.pairs
    total = nothing_counted(words, len(task.dataset.classes))
    for number, start in enumerate(range(0, len(pairs), PIECE)):
        own, path = pairs[start : start + PIECE], task.path(number)
        counted = read_counted(path, task.stamp(own), words, len(task.dataset.classes), len(own))
        if counted is None:
            raise gone(path)
        total.add(counted)
    check_counted(total, task.dataset)
    return total


def _write(job: BiasJob, report: VocabularyReport) -> None:
    write_json(job.output / "report.json", report)
    page = markdown(report)
    write_bytes(job.output / "report.md", page.encode())
    pictures = write_pictures(report, job.output) if job.pictures else []
    if not job.quiet:
        names = ", ".join(["report.md", "report.json", *(path.name for path in pictures)])
        print(page[: page.index("\n## ")] + f"\n{names} -> {job.output}/")
    for line in report["failed"]:
        print(f"pixelclip: failed: {line}", file=sys.stderr)
