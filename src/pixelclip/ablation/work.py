"""Train and evaluate the cells of a plan; what is done already is not done again."""

import hashlib
import json
import logging
import math
import time
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import cast

import torch

from pixelclip import __version__
from pixelclip.ablation.grid import (
    Grid,
    asked,
    base_model,
    is_trained,
    prepare,
    terms,
    trained_path,
)
from pixelclip.ablation.plan import Cell, Plan, file_name
from pixelclip.ablation.table import Result, Table, write_table
from pixelclip.backbones import Backbone, load_backbone
from pixelclip.checkpoint import read_json
from pixelclip.errors import PixelClipError
from pixelclip.evaluation.datasets import SegmentationDataset
from pixelclip.evaluation.evaluate import evaluate
from pixelclip.evaluation.report import Report
from pixelclip.images import write_json
from pixelclip.jobs.run import make_crew
from pixelclip.masks.generate import FromPixels, MadeBy, generate
from pixelclip.masks.sources import described, find_source, source_settings
from pixelclip.photos import find_photos
from pixelclip.progress import Shown
from pixelclip.segmenter import Segmenter
from pixelclip.training.loop import MODEL, run_job
from pixelclip.training.run import read_rows
from pixelclip.vocabulary import parse_templates

log = logging.getLogger("pixelclip")

# What may go wrong in one cell and leave the others as they are.
CELL_ERRORS = (PixelClipError, MemoryError, torch.OutOfMemoryError)


@dataclass
class Progress:
    """Which cell of how many, and how long the rest may take."""

    cells: int
    number: int = 0
    worked: list[float] = field(default_factory=list)

    def begin(self, cell: Cell) -> None:
        """Say which cell comes now."""
        self.number += 1
        left = ""
        if self.worked:
            mean = sum(self.worked) / len(self.worked)
            minutes = math.ceil(mean * (self.cells - self.number + 1) / 60)
            left = f", about {minutes} min left"
        log.info("cell %d of %d: %s%s", self.number, self.cells, cell.label, left)


def ablate(
    plan: Plan, out: str | Path, *, device: str = "auto", plot: bool = True, quiet: bool = True
) -> Table:
    """Train and evaluate every cell; table and plot are written after each.

    A cell that fails is listed, the others go on. The same call resumes: finished cells are not
    touched, an unfinished run goes on where it stopped.

    Args:
        plan: what is varied.
        out: folder of runs, masks, evaluations, table and plot.
        device: auto, cpu, cuda, cuda:N or mps.
        plot: draw `plot.png` and `plot.svg` as well.
        quiet: show no progress.

    Raises:
        PixelClipError: before anything is trained: a name or value of the plan is wrong, photos,
            data sets or the model cannot be used, or `out` holds other runs.
    """
    grid = prepare(plan, Path(out), device=device, plot=plot, quiet=quiet)
    results: dict[str, Result] = {}
    # What is done comes first, so that a resumed table is never shorter than before.
    order = sorted(grid.cells, key=lambda cell: not is_trained(grid, cell))
    progress = Progress(len(order))
    table = _table(grid, results)
    for cell in order:
        if not quiet:
            progress.begin(cell)
        began = time.monotonic()
        result = results[cell.label] = _result(grid, cell)
        if result.is_new and cell.job is not None:  # the baseline says nothing of the others
            progress.worked.append(time.monotonic() - began)
        table = _table(grid, results, stopped=result.stopped)
        if result.is_new or result.stopped or len(results) == len(order):
            write_table(table, grid.out, plot=plot)
        if result.stopped:
            break
    return table


def _table(grid: Grid, results: dict[str, Result], *, stopped: bool = False) -> Table:
    return Table(
        title=grid.plan.title or ", ".join(grid.plan.vary),
        datasets=tuple(dataset.name for dataset in grid.datasets),
        photos=tuple(len(dataset.pairs) for dataset in grid.datasets),
        rows=tuple(results.get(cell.label, _to_do(cell)) for cell in grid.cells),
        plan=grid.plan.model_dump(mode="json"),
        stopped=stopped,
    )


def _to_do(cell: Cell) -> Result:
    return Result(
        cell.label, cell.row, cell.values, run=cell.run, figures={}, is_baseline=cell.job is None
    )


def _result(grid: Grid, cell: Cell) -> Result:
    """What becomes of a cell; its errors are its own."""
    about = _to_do(cell)
    problems = []
    try:
        trained, is_new = _train(grid, cell)
        if trained is None:
            return about._replace(stopped=True, note="stopped; the same command goes on")
        about = about._replace(training=trained)
        if isinstance(unused := trained.get("not_used"), dict) and unused:
            problems.append(f"{len(unused)} photos were not trained on")
        model = Model(grid, cell, str(trained["weights"]))
        for dataset in grid.datasets:
            report, was_new = _evaluation(model, dataset)
            is_new = is_new or was_new
            about.figures[dataset.name] = _figures(report)
            if report["failed"]:
                problems.append(f"{len(report['failed'])} photos of {dataset.name} were not used")
        return about._replace(is_new=is_new, note="; ".join(problems))
    except CELL_ERRORS as error:
        line = " ".join(str(error).split()) or type(error).__name__
        if not grid.quiet:
            log.info("failed: %s: %s", cell.label, line)
        return about._replace(error=line, is_new=True)


# Training


def _train(grid: Grid, cell: Cell) -> tuple[dict[str, object] | None, bool]:
    """What is known of a cell's run, trained if it is not, and whether that was done now.

    None is known if the training was interrupted.

    Raises:
        PixelClipError: it cannot be trained.
    """
    if cell.job is None or cell.config is None:
        return {"weights": grid.base}, False
    path, model = trained_path(grid, cell), cell.job.output / MODEL
    if path.is_file() and model.is_file():
        trained = read_json(path).get("trained")
        if isinstance(trained, dict) and trained.get("weights") == _file_hash(model):
            return trained, False
    write_json(path, {"asked": asked(grid, cell)})
    if cell.source:
        _make_masks(grid, cell)
    summary = run_job(cell.job, cell.config, quiet=grid.quiet)
    if not summary.finished:
        return None, True
    rows = read_rows(cell.job.output / "metrics.jsonl", cell.config.steps)
    known: dict[str, object] = {
        "steps": summary.steps,
        "loss": summary.loss,
        "used_clusters": summary.used_clusters,
        "seconds": round(sum(s for row in rows if isinstance(s := row["seconds"], float)), 1),
        "not_used": summary.failed,
        "weights": _file_hash(model),
    }
    write_json(path, {"asked": asked(grid, cell), "trained": known})
    return known, True


def _make_masks(grid: Grid, cell: Cell) -> None:
    """The masks of a cell's photos, where they are not there already.

    Raises:
        PixelClipError: they cannot be made.
    """
    assert cell.job is not None
    assert cell.job.masks is not None
    photos = find_photos(cell.job.images)
    kind = find_source(cell.source)
    settings = source_settings(cell.source, grid.plan.mask_settings.get(cell.source, {}))
    maker = FromPixels(cell.source, settings, grid.device)
    made = generate(
        photos,
        cell.job.masks,
        MadeBy(maker, cell.source, described(settings)),
        crew=make_crew(len(photos), None, "local", is_light=kind.is_light),
        quiet=grid.quiet,
    )
    for photo, message in made.failed[:10]:
        log.info("no masks for %s: %s", photo.shown, message)


# Evaluation


@dataclass
class Model:
    """What a cell's training has left, loaded when it is first needed.

    Attributes:
        grid: the cell's.
        cell: whose it is.
        weights: their hash.
    """

    grid: Grid
    cell: Cell
    weights: str

    @cached_property
    def backbone(self) -> Backbone:
        """The model itself."""
        if self.cell.job is None:
            return base_model(self.grid.plan, self.grid.device)
        return load_backbone(str(self.cell.job.output), device=self.grid.device)


def _evaluation(model: Model, dataset: SegmentationDataset) -> tuple[Report, bool]:
    """A model's report on a data set, and whether it is new.

    Raises:
        PixelClipError: the model or the data set cannot be used.
    """
    grid, cell = model.grid, model.cell
    config, departures = terms(grid.plan, cell, dataset)
    pairs = json.dumps([[_state(path) for path in pair] for pair in dataset.pairs])
    templates = parse_templates(config.templates, of_classes=True) if config.templates else ()
    wanted = {
        "weights": model.weights,
        "pairs_sha256": hashlib.sha256(pairs.encode()).hexdigest(),
        "classes_sha256": dataset.classes_sha256,
        "settings": json.loads(config.model_dump_json()),
        "templates": list(templates),  # as the file has them now
        "labels": repr(dataset.values),
        "version": __version__,
    }
    name = ",".join([dataset.name, *([f"templates={cell.templates}"] if cell.templates else [])])
    path = grid.out / "evaluations" / cell.run / f"{file_name(name)}.json"
    if path.is_file():
        found = read_json(path)
        if found.get("asked") == wanted:
            return cast(Report, found["report"]), False
    segmenter = Segmenter(model.backbone, dataset.classes, config=config)
    done = count(1)
    with Shown(dataset.name, len(dataset.pairs), 0, quiet=grid.quiet, unit="photos") as shown:
        report = evaluate(segmenter, dataset, lambda: shown.update(next(done), ""))
    write_json(path, {"asked": wanted, "departures": departures, "report": report})
    return report, True


def _figures(report: Report) -> dict[str, float]:
    return {
        "miou": report["miou"],
        "pixel_accuracy": report["pixel_accuracy"],
        "mean_accuracy": report["mean_accuracy"],
        "boundary_iou": report["boundary_iou"],
        "photos": report["photos"],
    }


def _state(path: Path) -> list[object]:
    """What a file is told by: name, size and date; a missing one has neither."""
    if not path.is_file():
        return [path.name]
    stat = path.stat()
    return [path.name, stat.st_size, stat.st_mtime_ns]


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
