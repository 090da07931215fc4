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
from pixelclip.masks.refiner import MadeBefore, Refiner
from pixelclip.segmenter import Segmenter

VERSION = 2  # of what is counted: pieces of another one are done again
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
