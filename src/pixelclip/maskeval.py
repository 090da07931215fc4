"""Zero-shot classification of masks over data sets: a job whose pieces are named masks."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from pydantic import BaseModel

from pixelclip.backbones.means import Means
from pixelclip.errors import ConfigError, DataError
from pixelclip.evaljob import (
    EvalJob,
    check_job,
    eval_crew,
    find_datasets,
    make_tasks,
    pieces_folder,
)
from pixelclip.evaluation.chosen import Chosen, masks_of, thinned
from pixelclip.evaluation.datasets import SegmentationDataset
from pixelclip.evaluation.entrants import Entrants, Task
from pixelclip.evaluation.maskclass import (
    TRUTH,
    VARIANTS,
    check_variants,
    mask_terms,
    name_masks,
)
from pixelclip.evaluation.maskclass_pieces import (
    NamedMasks,
    NamedPiece,
    joined,
    read_named,
    write_named,
)
from pixelclip.evaluation.maskclass_report import (
    MaskClassReport,
    MaskResults,
    make_mask_report,
    print_mask_results,
    write_mask_results,
)
from pixelclip.evaluation.piece_files import gone
from pixelclip.evaluation.protocols import suite
from pixelclip.evaluation.report import Terms
from pixelclip.files import printable
from pixelclip.jobs.run import run
from pixelclip.jobs.work import Do, Outcome, Piece
from pixelclip.masks.refiner import MadeBefore, Refiner, check_apart, is_light
from pixelclip.masks.sources import MASK_SOURCES, described, find_source, source_settings
from pixelclip.segmenter import Segmenter

VERSION = 1  # of what is counted: pieces of another one are done again


@dataclass(frozen=True)
class MaskQuestion:
    """Which masks are named, and how.

    Attributes:
        masks: `truth`, a source by name, or a file or folder of masks: of all data sets, or with a
            folder for each, named like it.
        settings: of the source, by name.
        variants: what stands for a mask; none: all there are.
    """

    masks: str
    settings: Mapping[str, object] = field(default_factory=dict)
    variants: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Origin:
    """Where the masks of a data set come from; goes to worker processes as it is.

    Attributes:
        description: what results say of the masks.
        source: name of a source; empty: there is none.
        settings: of the source.
        device: of the source.
        before: masks that were made before; None: there are none, so without a source they are
            the true regions.
    """

    description: Mapping[str, object]
    source: str = ""
    settings: BaseModel | None = None
    device: str = "auto"
    before: MadeBefore | None = None

    def start(self) -> Refiner | None:
        """What gives the masks of a photo; None: they are its true regions.

        Raises:
            ModelError: the source's model cannot be loaded.
        """
        if self.source:
            return Refiner(find_source(self.source).make(self.settings, self.device))
        return None if self.before is None else Refiner(self.before)

    @property
    def telling(self) -> list[object]:
        """What tells these masks from others."""
        return [self.description, None if self.before is None else self.before.state]


@dataclass(frozen=True)
class MaskTask:
    """A model or rival on the masks of a data set.

    Attributes:
        task: the model and the data set.
        origin: the masks.
        variants: what stands for a mask.
    """

    task: Task
    origin: Origin
    variants: tuple[str, ...]

    def path(self, number: int, variant: str) -> Path:
        """Where a piece lies; its number counts from 0 in the task."""
        return self.task.folder / f"{number:05d}-{variant}.npz"

    def read(self, number: int, variant: str, stamp: str) -> NamedPiece | None:
        """A piece; None if it is to be done."""
        count, size = len(self.task.dataset.classes), len(self.task.pieces[number])
        return read_named(self.path(number, variant), stamp, count, size)


def run_mask_eval(job: EvalJob, question: MaskQuestion) -> int:
    """Name the masks of all data sets, print and write the figures.

    What a killed run has finished is kept in `output`; the figures are the same to the last bit.

    Returns:
        0: all done; 1: photos failed, or data sets are missing or not whole; they are listed.

    Raises:
        PixelClipError: nothing could be done.
    """
    _check(job, question)
    datasets, missing = find_datasets(job)
    origins = _origins(question, datasets, job.means.device)
    datasets = [thinned(chosen, job.photos) for chosen in datasets]
    with pieces_folder(job.output) as folder:
        entrants = Entrants(job.means, job.dino)
        crew = eval_crew(job, datasets, entrants, light_masks=is_light(question.masks))
        plain = make_tasks(job, datasets, entrants, crew.threads, folder)
        tasks = tuple(_mask_task(question, task, origins[task.dataset.name]) for task in plain)
        is_here = crew.engine == "local" and crew.workers == 1
        work = MaskEvalWork(job.means, job.dino, tasks, entrants if is_here else None)
        pieces = [piece for own in tasks for piece in own.task.shares]
        run(work, pieces, crew, what="naming masks", quiet=job.quiet)
        reports, lost = _reports(tasks, entrants, job.protocol)
    columns = suite(job.suite).sets if job.suite else ()
    sets = tuple(dict.fromkeys([*columns, *(it.dataset.name for it in datasets)]))
    failed = {report.dataset for report in reports if report.failed}
    partial = {
        it.dataset.name: it.dataset.lacking
        for it in datasets
        if it.dataset.expected is not None and (it.dataset.lacking or it.dataset.name in failed)
    }
    results = MaskResults(tuple(reports), sets, (*missing, *lost), partial)
    write_mask_results(results, job.output, job.json_file)
    print_mask_results(results, quiet=job.quiet)
    return 1 if results.missing or partial or failed else 0


def _check(job: EvalJob, question: MaskQuestion) -> None:
    """Make sure that the job makes sense and can be written, before the work."""
    check_variants(question.variants)
    is_made = question.masks == TRUTH or question.masks in MASK_SOURCES
    path = Path(question.masks)
    if not is_made and not path.exists():
        raise ConfigError(
            f"no masks at {printable(path)}; --masks takes {TRUTH}, {', '.join(MASK_SOURCES)}, or"
            " a file or folder of masks"
        )
    if question.settings and question.masks not in MASK_SOURCES:
        raise ConfigError(f"--mask-set is for sources ({', '.join(MASK_SOURCES)})")
    if job.rivals and "pooled" not in (question.variants or VARIANTS):
        raise ConfigError("--rival is about dense features; add --variant pooled")
    check_apart(None if is_made else question.masks, job.output, "--masks")
    check_job(job)


def _origins(question: MaskQuestion, datasets: Sequence[Chosen], device: str) -> dict[str, Origin]:
    """Where the masks of each data set come from, by its name.

    Raises:
        ConfigError: a setting of the source is not allowed.
        DataError: the masks are damaged, or none of a data set's photos has any.
        ModelError: a checkpoint of the source cannot be read.
    """
    if question.masks in MASK_SOURCES:
        settings = source_settings(question.masks, question.settings)
        description = {"source": question.masks, **described(settings)}
        one = Origin(description, question.masks, settings, device)
    elif question.masks == TRUTH:
        one = Origin({"source": TRUTH})
    else:
        return {it.dataset.name: _made_before(question.masks, it.dataset) for it in datasets}
    return {it.dataset.name: one for it in datasets}


def _made_before(masks: str, dataset: SegmentationDataset) -> Origin:
    before = masks_of(dataset, masks)
    assert isinstance(before, MadeBefore)
    return Origin({"masks": printable(before.path)}, before=before)


def _mask_task(question: MaskQuestion, task: Task, origin: Origin) -> MaskTask:
    """The masks of a task; its pieces are not those of label maps."""
    asked = question.variants or tuple(VARIANTS)
    # A rival has the model's image embedding, so that its crops are the model's.
    variants = ("pooled",) if task.rival else tuple(v for v in VARIANTS if v in asked)
    what = json.dumps([VERSION, task.identity, origin.telling], default=str)
    identity = hashlib.sha256(what.encode()).hexdigest()
    name = f"{task.dataset.name}-{task.rival or 'model'}-masks-{identity[:12]}"
    departures = task.departures
    if task.config.background == "threshold":
        departures += ("masks have no threshold: each is named",)
    own = replace(
        task, identity=identity, folder=task.folder.with_name(name), departures=departures
    )
    return MaskTask(own, origin, variants)


@dataclass(frozen=True)
class MaskEvalWork:
    """Pairs become named masks in files.

    Attributes:
        means: the model.
        dino: tower of the rivals that need one.
        tasks: in the order of their pieces.
        entrants: models that are loaded already.
    """

    means: Means
    dino: str | None
    tasks: tuple[MaskTask, ...]
    entrants: Entrants | None = None

    def start(self) -> Do:
        """A function that does a piece; models are loaded but once."""
        entrants = self.entrants or Entrants(self.means, self.dino)
        starts = [own.task.first for own in self.tasks]
        start_masks = cache(Origin.start)

        def do(piece: Piece) -> Iterator[Outcome]:
            own = self.tasks[bisect_right(starts, piece.number) - 1]
            number = piece.number - own.task.first
            stamp = own.task.stamp(own.task.pieces[number])
            known = {variant: own.read(number, variant, stamp) for variant in own.variants}
            # What was wrong with a photo may be mended.
            todo = [name for name, it in known.items() if it is None or any(it.errors)]
            if todo:
                segmenter, refiner = entrants.segmenter(own.task), start_masks(own.origin)
                yield from _name_piece(own, piece, segmenter, refiner, todo)
                return
            for photo in piece.photos:
                yield Outcome(photo, is_new=False)

        return do


def _name_piece(
    own: MaskTask,
    piece: Piece,
    segmenter: Segmenter,
    refiner: Refiner | None,
    variants: Sequence[str],
) -> Iterator[Outcome]:
    """Name the masks of a piece and write them, a file for each variant."""
    number, dataset = piece.number - own.task.first, own.task.dataset
    pairs = own.task.pieces[number]
    stamp = own.task.stamp(pairs)
    found: list[dict[str, NamedMasks]] = []
    errors: list[str] = []
    for photo, pair in zip(piece.photos, pairs, strict=True):
        named = photo if refiner is None else refiner.photo(photo.path)
        try:
            found.append(name_masks(segmenter, dataset, (named, pair[1]), refiner, variants))
            errors.append("")
        except DataError as error:
            errors.append(str(error))
        yield Outcome(photo, errors[-1])
    for variant in variants:
        every = joined([masks[variant] for masks in found], len(dataset.classes))
        write_named(own.path(number, variant), stamp, NamedPiece(every, errors))


def _reports(
    tasks: Sequence[MaskTask], entrants: Entrants, protocol: str
) -> tuple[list[MaskClassReport], list[str]]:
    """The figures of each task and variant, and a line for each data set that has none.

    Raises:
        DataError: none has any, or a piece has gone.
    """
    reports: list[MaskClassReport] = []
    lost: dict[str, None] = {}
    for own in tasks:
        task = own.task
        terms = Terms(task.rival or None, protocol, task.departures)
        for variant in own.variants:
            total = _total(own, variant)
            failed = [error for error in total.errors if error]
            segmenter = entrants.segmenter(task)
            how = mask_terms(segmenter, own.origin.description, variant, terms)
            try:
                reports.append(make_mask_report(task.dataset, total.named, failed, how))
            except DataError as error:
                lost[str(error)] = None
    if not reports:
        raise DataError(next(iter(lost)))
    return reports, list(lost)


def _total(own: MaskTask, variant: str) -> NamedPiece:
    pieces = []
    for number, pairs in enumerate(own.task.pieces):
        piece = own.read(number, variant, own.task.stamp(pairs))
        if piece is None:
            raise gone(own.path(number, variant))
        pieces.append(piece)
    named = joined([piece.named for piece in pieces], len(own.task.dataset.classes))
    return NamedPiece(named, [error for piece in pieces for error in piece.errors])
