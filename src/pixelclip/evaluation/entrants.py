"""Who is evaluated on what: a model, its rivals on the same weights, data sets."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pixelclip.backbones import Backbone
from pixelclip.backbones.means import Means, all_that_tells, identity_of
from pixelclip.config import SegmentConfig
from pixelclip.evaluation.datasets import SegmentationDataset
from pixelclip.evaluation.evaluate import PIECE, Pair
from pixelclip.evaluation.rivals import make_rival
from pixelclip.files import printable
from pixelclip.jobs.run import Crew, make_crew
from pixelclip.jobs.work import Piece
from pixelclip.masks.refiner import MadeBefore, Refiner
from pixelclip.photos import Photo
from pixelclip.segmenter import Segmenter
from pixelclip.workers import cores

VERSION = 3  # of what is counted: pieces of another one are done again
# Their arithmetic and their pictures decide the last bits.
PACKAGES = ("torch", "timm", "open_clip_torch", "numpy", "pillow", "scikit-image")


@dataclass(frozen=True)
class Task:
    """A model or rival on a data set.

    Attributes:
        rival: empty for the model itself.
        dataset: photos with labels.
        config: of the segmenter.
        departures: from the protocol.
        first: number of its first piece.
        identity: a hash of all that decides the figures beside the photos.
        folder: of its pieces.
        masks: of which each gets one class: the name of a source, or those made before.
    """

    rival: str
    dataset: SegmentationDataset
    config: SegmentConfig
    departures: tuple[str, ...]
    first: int = 0
    identity: str = ""
    folder: Path = Path()
    masks: str | MadeBefore | None = None

    @property
    def pieces(self) -> list[tuple[Pair, ...]]:
        """The pairs of each piece; always the same, whoever does them."""
        pairs = self.dataset.pairs
        return [pairs[start : start + PIECE] for start in range(0, len(pairs), PIECE)]

    @property
    def shares(self) -> list[Piece]:
        """The same as pieces of a job over several tasks."""
        return [
            Piece(self.first + number, tuple(Photo(path, Path(path.stem)) for path, _ in pairs))
            for number, pairs in enumerate(self.pieces)
        ]

    def path(self, number: int) -> Path:
        """Where a piece lies; its number counts from 0 in the task."""
        return self.folder / f"{number:05d}.npz"

    def stamp(self, pairs: Sequence[Pair]) -> str:
        """A hash of the identity and of the photos and labels, told by size and date."""
        states = [_state(path) for pair in pairs for path in pair]
        return hashlib.sha256(json.dumps([self.identity, states]).encode()).hexdigest()


def _state(path: Path) -> list[object]:
    try:
        stat = path.stat()
    except OSError:
        return [printable(path)]
    return [printable(path), stat.st_size, stat.st_mtime_ns]


class Entrants:
    """The model and its rivals, which share its weights; loaded when they are first asked for."""

    def __init__(self, means: Means, dino: str | None = None):
        """Load nothing yet.

        Args:
            means: the model.
            dino: tower of the rivals that need one: name, folder or weight file.
        """
        self.means = means
        self.dino = dino
        self.backbones: dict[str, Backbone] = {}
        self.models: dict[str, str] = {}  # hashes
        self.sources: dict[str, Refiner] = {}
        self.last: tuple[Task, Segmenter] | None = None

    def backbone(self, rival: str = "") -> Backbone:
        """The model, or a rival on its weights.

        Raises:
            ConfigError: the rival is unknown, or does not run on this model.
            ModelError: weights cannot be loaded.
        """
        if rival not in self.backbones:
            self.backbones[rival] = (
                make_rival(rival, self.backbone(), dino=self.dino) if rival else self.means.load()
            )
        return self.backbones[rival]

    def segmenter(self, task: Task) -> Segmenter:
        """The segmenter of a task; one is kept, as pieces come task by task.

        Raises:
            ConfigError: class names or settings are not usable.
        """
        if self.last is None or self.last[0] is not task:
            backbone = self.backbone(task.rival)
            self.last = (
                task,
                Segmenter(
                    backbone, task.dataset.classes, config=task.config, refine=self._refiner(task)
                ),
            )
        return self.last[1]

    def _refiner(self, task: Task) -> Refiner | None:
        """The masks of a task; a source, which may hold a model, is loaded once."""
        device = str(self.backbone().device)
        if not isinstance(task.masks, str):
            return None if task.masks is None else Refiner(task.masks, device)
        if task.masks not in self.sources:
            self.sources[task.masks] = Refiner(task.masks, device)
        return self.sources[task.masks]

    def identity(self, task: Task, threads: int) -> str:
        """A hash of all that decides a task's figures, beside the photos and labels."""
        segmenter = self.segmenter(task)
        if task.rival not in self.models:
            self.models[task.rival] = all_that_tells(segmenter.backbone)
        return identity_of(
            self.models[task.rival],
            segmenter.description(),
            evaluation=VERSION,
            rival=task.rival,
            classes=segmenter.classes,
            labels=repr(task.dataset.values),
            threads=threads,
            piece=PIECE,
            packages=[version(package) for package in PACKAGES],
        )


def make_eval_crew(
    backbone: Backbone,
    photos: int,
    workers: int | None,
    engine: str = "local",
    *,
    light_masks: bool = True,
) -> Crew:
    """Who evaluates; the threads are the same for any number of photos, sets and workers.

    Args:
        backbone: of the model itself.
        photos: of all data sets.
        workers: processes; None: one, or as many as cores where models are small.
        engine: `local`, or `ray`.
        light_masks: no large model makes masks of photos beside it.

    Raises:
        ConfigError: engine or workers are wrong.
    """
    is_mini = backbone.card.family == "mini" and backbone.device.type == "cpu"
    is_light = is_mini and light_masks
    gpu = backbone.device.type == "cuda"
    crew = make_crew(photos, workers, engine, is_light=is_light, gpu=gpu)
    return crew._replace(threads=1 if is_light else cores())
