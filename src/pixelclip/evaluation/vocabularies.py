"""One model, one data set, many vocabularies: each photo goes through the image tower once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer
from skimage.measure import label as connected
from torch import Tensor, nn

from pixelclip.backbones import Backbone
from pixelclip.config import SegmentConfig
from pixelclip.errors import ConfigError, DataError
from pixelclip.evaluation.datasets import SegmentationDataset
from pixelclip.evaluation.metrics import confusion
from pixelclip.evaluation.wordings import Wording
from pixelclip.segmenter import Prepared, Segmenter


class Remembering(nn.Module):
    """An image tower that computes a photo's features once and then gives them again, in order.

    Segmenters with equal settings ask for the same inputs of a photo in the same order, so the
    answers need no comparison. It holds one photo's features.
    """

    def __init__(self, visual: nn.Module):
        super().__init__()
        self.visual = visual
        self.stride, self.dim = visual.stride, visual.dim
        self.attention = getattr(visual, "attention", None)
        self.kept: list[Tensor] = []
        self.asked = 0

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """Dense features, not normalised."""
        if self.asked == len(self.kept):
            self.kept.append(self.visual(images))
        self.asked += 1
        return self.kept[self.asked - 1]

    def begin(self, *, again: bool) -> None:
        """The next input is the first of the same photo, or of another one."""
        self.asked = 0
        if not again:
            self.kept = []


class Vocabularies:
    """Segmenters that share a model, its settings and the features of the photo at hand.

    Args:
        backbone: the model.
        wordings: names and templates of each.
        config: settings of all but the templates, which a wording may replace.

    Raises:
        ConfigError: the first wording is not usable; others are listed in `left_out`.

    Attributes:
        wordings: the usable ones.
        left_out: label and reason of the others.
    """

    def __init__(self, backbone: Backbone, wordings: Sequence[Wording], config: SegmentConfig):
        self.tower = Remembering(backbone.visual)
        shared = Backbone(self.tower, backbone.text, backbone.card)
        shared.origin = backbone.origin
        self.wordings: list[Wording] = []
        self.segmenters: list[Segmenter] = []
        self.left_out: dict[str, str] = {}
        for wording in wordings:
            own = {"templates": wording.templates} if wording.templates else {}
            try:
                segmenter = Segmenter(shared, wording.names, config=config.model_copy(update=own))
            except ConfigError as error:  # names that this model cannot tell apart
                if not self.wordings:
                    raise
                self.left_out[wording.label] = str(error)
                continue
            self.wordings.append(wording)
            self.segmenters.append(segmenter)

    def prepare(self, photo: Path) -> Prepared:
        """The photo, read and resized.

        Raises:
            DataError: it cannot be read.
        """
        return self.segmenters[0].prepare(photo)

    def labels(self, photo: Prepared) -> "list[Integer[np.ndarray, '_ _']]":
        """The label map of every vocabulary."""
        self.tower.begin(again=False)
        maps = []
        for segmenter in self.segmenters:
            maps.append(segmenter.run([photo])[0].labels)
            self.tower.begin(again=True)
        return maps


@dataclass
class Counted:
    """What is counted over a data set of K classes.

    Attributes:
        matrices: per vocabulary, rows are true classes, columns its names and last "no class".
        piece_areas: per class, pixels of every connected piece (8 neighbours) of the truth.
        photos: per class, photos in which it occurs.
        failed: pairs that could not be used.
    """

    matrices: list[Int64[np.ndarray, "K _"]]
    piece_areas: list[list[int]]
    photos: Int64[np.ndarray, " K"]
    failed: list[str]


@torch.inference_mode()
def count_vocabularies(
    vocabularies: Vocabularies,
    dataset: SegmentationDataset,
    on_photo: Callable[[], None] = lambda: None,
) -> Counted:
    """Compare the labels of every vocabulary with the truth; broken pairs are listed, not fatal.

    Args:
        vocabularies: the first names of each are the data set's classes.
        dataset: photos with labels.
        on_photo: called after each photo, for progress.

    Raises:
        DataError: no pair could be used, or nothing is labelled.
    """
    count = len(dataset.classes)
    widths = [len(wording.names) + 1 for wording in vocabularies.wordings]
    counted = Counted(
        [np.zeros((count, width), dtype=np.int64) for width in widths],
        [[] for _ in range(count)], np.zeros(count, dtype=np.int64), [],
    )  # fmt: skip
    for photo, label_path in dataset.pairs:
        try:
            _count_pair(counted, vocabularies, dataset, photo, label_path)
        except DataError as error:
            counted.failed.append(str(error))
        on_photo()
    if len(counted.failed) == len(dataset.pairs):
        raise DataError(f"none of the photos could be used; first: {counted.failed[0]}")
    if not counted.matrices[0].any():
        raise DataError(f"no pixel of {dataset.name} is labelled")
    return counted


def _count_pair(
    counted: Counted,
    vocabularies: Vocabularies,
    dataset: SegmentationDataset,
    photo: Path,
    label_path: Path,
) -> None:
    truth = dataset.truth(label_path)
    prepared = vocabularies.prepare(photo)
    if truth.shape != (prepared.height, prepared.width):
        raise DataError(
            f"{label_path} is {truth.shape[1]} x {truth.shape[0]}, its photo"
            f" {prepared.width} x {prepared.height}"
        )
    count = len(dataset.classes)
    for matrix, labels in zip(counted.matrices, vocabularies.labels(prepared), strict=True):
        # Values of no class stay out: they lie above the K rows that are kept.
        matrix += confusion(truth, labels, matrix.shape[1] - 1)[:count]
    for index, areas in pieces(truth, count).items():
        counted.piece_areas[index] += areas
        counted.photos[index] += 1


def pieces(truth: Integer[np.ndarray, "H W"], num_classes: int) -> dict[int, list[int]]:
    """Pixels of the connected pieces (8 neighbours) of every class that occurs."""
    known = np.where((truth >= 0) & (truth < num_classes), truth, -1)
    numbers, count = connected(known, background=-1, return_num=True, connectivity=2)
    areas = np.bincount(numbers.ravel(), minlength=count + 1)
    owners = np.zeros(count + 1, dtype=np.int64)
    owners[numbers.ravel()] = known.ravel()
    found: dict[int, list[int]] = {}
    for owner, area in zip(owners[1:].tolist(), areas[1:].tolist(), strict=True):
        found.setdefault(owner, []).append(area)
    return found
