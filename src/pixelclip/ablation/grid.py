"""A plan made ready: everything that can be wrong with it is found before the first step."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pixelclip.ablation.plan import Cell, Plan, make_cells
from pixelclip.backbones import Backbone, load_backbone
from pixelclip.backbones.means import fingerprint
from pixelclip.checkpoint import read_json
from pixelclip.config import FREE_TO_CHANGE, SegmentConfig
from pixelclip.errors import ConfigError
from pixelclip.evaluation.chosen import Chosen, thinned
from pixelclip.evaluation.datasets import (
    SegmentationDataset,
    dataset_names,
    load_dataset,
    load_folder,
)
from pixelclip.evaluation.plots import check_plots
from pixelclip.evaluation.protocols import settings_and_departures
from pixelclip.images import check_writable
from pixelclip.masks.sources import source_settings
from pixelclip.photos import find_photos
from pixelclip.training.run import checkpoints


@dataclass(frozen=True)
class Grid:
    """A plan made ready.

    Attributes:
        plan: what was asked for.
        out: folder of all results.
        cells: rows of the table.
        datasets: to evaluate on.
        base: hash of the weights before training.
        device: auto, cpu, cuda, cuda:N or mps.
        quiet: show no progress.
    """

    plan: Plan
    out: Path
    cells: Sequence[Cell]
    datasets: Sequence[SegmentationDataset]
    base: str
    device: str
    quiet: bool


def prepare(plan: Plan, out: Path, *, device: str, plot: bool, quiet: bool) -> Grid:
    """All that can be checked before the first step.

    Raises:
        PixelClipError: as `ablate`.
    """
    if plot:
        check_plots("--no-plot")
    datasets = _datasets(plan)
    cells = make_cells(plan, out, device)
    for cell in cells:
        for dataset in datasets:
            terms(plan, cell, dataset)
        if cell.source:
            source_settings(cell.source, plan.mask_settings.get(cell.source, {}))
    check_writable(out)
    base = fingerprint(base_model(plan, device))
    grid = Grid(plan, out, cells, datasets, base, device, quiet)
    for cell in cells:
        _check_run(grid, cell)
    return grid


def base_model(plan: Plan, device: str) -> Backbone:
    """The model before training."""
    return load_backbone(plan.model, checkpoint=plan.checkpoint, device=device)


def _datasets(plan: Plan) -> list[SegmentationDataset]:
    """The data sets of a plan.

    Raises:
        ConfigError: there are none, or two have one name.
        DataError: one cannot be read.
    """
    datasets = []
    for text in plan.data:
        name, equals, root = text.partition("=")
        is_named = equals and name in dataset_names()
        dataset = load_dataset(name, Path(root)) if is_named else load_folder(Path(text))
        datasets.append(thinned(Chosen(dataset), plan.photos).dataset)
    names = [dataset.name for dataset in datasets]
    if not names:
        raise ConfigError(
            "no data sets to evaluate on; give --data FOLDER, several times if need be"
        )
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two data sets are called {twice}; rename one of the folders")
    return datasets


def terms(plan: Plan, cell: Cell, dataset: SegmentationDataset) -> tuple[SegmentConfig, list[str]]:
    """How a cell is evaluated on a data set, and what in it is not as the protocol says."""
    own = {"templates": cell.templates} if cell.templates else {}
    some = (f"at most {plan.photos} photos, evenly spaced",) if plan.photos else ()
    return settings_and_departures(plan.protocol, {**plan.evaluation, **own}, dataset, some)


def trained_path(grid: Grid, cell: Cell) -> Path:
    """The file that says what a run is of, and once it is finished, what came of it."""
    return grid.out / "runs" / f"{cell.run}.json"


def is_trained(grid: Grid, cell: Cell) -> bool:
    """Whether a cell's run is finished."""
    path = trained_path(grid, cell)
    return path.is_file() and "trained" in read_json(path)


def asked(grid: Grid, cell: Cell) -> dict[str, object]:
    """All that decides what a run gives."""
    assert cell.job is not None
    assert cell.config is not None
    masks = "" if cell.job.masks is None else str(cell.job.masks.resolve())
    photos = [photo.stem.as_posix() for photo in find_photos(cell.job.images)]
    values = {
        "weights": grid.base,
        "images": [str(path.resolve()) for path in cell.job.images],
        "photos_sha256": hashlib.sha256(json.dumps(photos).encode()).hexdigest(),
        "masks": cell.source or cell.job.live or masks,
        "mask_settings": grid.plan.mask_settings.get(cell.source, {}),
        **cell.config.model_dump(mode="json", exclude=FREE_TO_CHANGE),
    }
    return json.loads(json.dumps(values))


def _check_run(grid: Grid, cell: Cell) -> None:
    """Make sure that a run is the one that is wanted; without a checkpoint it is none yet.

    Raises:
        ConfigError: it is another one.
    """
    path = trained_path(grid, cell)
    if cell.job is None or not path.is_file():
        return
    if not is_trained(grid, cell) and not checkpoints(cell.job.output):
        return
    found, wanted = read_json(path).get("asked"), asked(grid, cell)
    was = found if isinstance(found, dict) else {}
    changed = [f"{key} was {was.get(key)!r}, now {wanted[key]!r}" for key in wanted
               if was.get(key) != wanted[key]]  # fmt: skip
    if changed:
        raise ConfigError(
            f"{grid.out} holds another ablation: {'; '.join(changed[:3])}; give another -o"
        )
