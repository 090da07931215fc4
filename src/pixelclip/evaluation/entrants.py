"""Who is evaluated on what: a model, its rivals on the same weights, data sets."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pixelclip.backbones import Backbone, load_backbone, weights_hash
from pixelclip.config import SegmentConfig
from pixelclip.evaluation.datasets import SegmentationDataset
from pixelclip.evaluation.evaluate import PIECE, Pair
from pixelclip.evaluation.rivals import make_rival
from pixelclip.files import printable
from pixelclip.segmenter import Segmenter

VERSION = 1  # of what is counted: pieces of another one are done again
FREE = {"max_pixels", "weights"}  # weights are told by their hashes


@dataclass(frozen=True)
class Means:
    """What photos are segmented with; goes to worker processes.

    Attributes:
        model: name, weight file or run directory.
        checkpoint: weights that replace the model's.
        device: auto, cpu, cuda, cuda:N or mps.
        attention: last block of a ViT, of the model itself.
        dino: tower of the rivals that need one: name, folder or weight file.
    """

    model: str
    checkpoint: Path | None = None
    device: str = "auto"
    attention: str = "pixelclip"
    dino: str | None = None


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
    """

    rival: str
    dataset: SegmentationDataset
    config: SegmentConfig
    departures: tuple[str, ...]
    first: int = 0
    identity: str = ""
    folder: Path = Path()

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

    def __init__(self, means: Means):
        self.means = means
        self.backbones: dict[str, Backbone] = {}
        self.hashes: dict[str, list[str]] = {}
        self.last: tuple[Task, Segmenter] | None = None

    def backbone(self, rival: str = "") -> Backbone:
        """The model, or a rival on its weights.

        Raises:
            ConfigError: the rival is unknown, or does not run on this model.
            ModelError: weights cannot be loaded.
        """
        if rival not in self.backbones:
            means = self.means
            self.backbones[rival] = (
                make_rival(rival, self.backbone(), dino=means.dino)
                if rival
                else load_backbone(
                    means.model,
                    checkpoint=means.checkpoint,
                    device=means.device,
                    attention=means.attention,
                )
            )
        return self.backbones[rival]

    def segmenter(self, task: Task) -> Segmenter:
        """The segmenter of a task; one is kept, as pieces come task by task.

        Raises:
            ConfigError: class names or settings are not usable.
        """
        if self.last is None or self.last[0] is not task:
            backbone = self.backbone(task.rival)
            self.last = task, Segmenter(backbone, task.dataset.classes, config=task.config)
        return self.last[1]

    def identity(self, task: Task, threads: int) -> str:
        """A hash of all that decides a task's figures, beside the photos and labels."""
        segmenter = self.segmenter(task)
        if task.rival not in self.hashes:
            backbone = segmenter.backbone
            self.hashes[task.rival] = [weights_hash(backbone.visual), backbone.text_hash]
        described = segmenter.description()
        what = {
            **{name: value for name, value in described.items() if name not in FREE},
            "evaluation": VERSION,
            "rival": task.rival,
            "classes": segmenter.classes,
            "hashes": self.hashes[task.rival],
            "labels": repr(task.dataset.values),
            "threads": threads,
            "piece": PIECE,
        }
        return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()
