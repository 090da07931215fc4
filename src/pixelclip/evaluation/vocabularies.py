"""One model, one data set, many vocabularies: each photo goes through the image tower once."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
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
from pixelclip.evaluation.evaluate import Pair, background_of
from pixelclip.evaluation.metrics import confusion
from pixelclip.evaluation.wordings import Wording
from pixelclip.segmenter import Prepared, Segmenter
from pixelclip.vocabulary import OWN, check_classes, check_distinct, class_features


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

    A name that stands in several vocabularies with the same templates is encoded once.

    Args:
        backbone: the model.
        wordings: names and templates of each; the first is how the classes are called.
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
        given = Segmenter(shared, wordings[0].names, config=config)
        rows = _rows(given, wordings)
        self.wordings = [wordings[0]]
        self.segmenters = [given]
        self.left_out: dict[str, str] = {}
        for wording in wordings[1:]:
            own = config.model_copy(update={"templates": wording.templates})
            try:
                segmenter = (
                    Segmenter(shared, wording.names, config=own if wording.templates else config)
                    if wording.templates or not rows
                    else _renamed(given, wording.names, rows)
                )
            except ConfigError as error:  # names that this model cannot tell apart
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


def _rows(given: Segmenter, wordings: Sequence[Wording]) -> dict[str, Float[Tensor, " D"]]:
    """Text features of all names with the given templates; none if classes have their own."""
    if any(OWN in template for template in given.templates):
        return {}
    more = {name for wording in wordings if not wording.templates for name in wording.names}
    names = sorted(more - set(given.classes))
    rows = dict(zip(given.classes, given.text, strict=False))  # contrast names may follow
    if not names:
        return rows
    features = class_features(
        given.backbone,
        names,
        given.templates,
        fix_article=given.config.fix_article,
        half=given._half_text(),
    )
    return rows | dict(zip(names, features, strict=True))


def _renamed(
    given: Segmenter, names: Sequence[str], rows: Mapping[str, Float[Tensor, " D"]]
) -> Segmenter:
    """The segmenter with other names for its classes.

    Raises:
        ConfigError: two names are, or look to the model, the same.
    """
    contrast = given.config.background_names if given.config.background == "names" else ()
    check_classes([*names, *contrast])
    segmenter = copy(given)
    segmenter.classes = tuple(names)
    segmenter.text = torch.cat(
        [torch.stack([rows[name] for name in names]), given.text[len(given.classes) :]]
    )
    check_distinct(segmenter.text, [*names, *contrast])
    return segmenter


@dataclass
class Counted:
    """What is counted in pairs of a data set of K classes.

    Attributes:
        matrices: per vocabulary, rows are true classes, columns its names and last "no class".
        piece_areas: per class, pixels of every connected piece (8 neighbours) of the truth.
        photos: per class, photos in which it occurs.
        errors: of each pair one line; empty where it could be used.
    """

    matrices: list[Int64[np.ndarray, "K _"]]
    piece_areas: list[list[int]]
    photos: Int64[np.ndarray, " K"]
    errors: list[str]

    @property
    def failed(self) -> list[str]:
        """Why pairs could not be used."""
        return [error for error in self.errors if error]

    def add(self, other: "Counted") -> None:
        """Count the pairs of both, these before the others."""
        for mine, theirs in zip(self.matrices, other.matrices, strict=True):
            mine += theirs
        for areas, more in zip(self.piece_areas, other.piece_areas, strict=True):
            areas += more
        self.photos += other.photos
        self.errors += other.errors


def nothing_counted(wordings: Sequence[Wording], num_classes: int) -> Counted:
    """The counts of no pair."""
    shapes = [(num_classes, len(wording.names) + 1) for wording in wordings]
    return Counted(
        [np.zeros(shape, dtype=np.int64) for shape in shapes],
        [[] for _ in range(num_classes)], np.zeros(num_classes, dtype=np.int64), [],
    )  # fmt: skip


def count_vocabularies(
    vocabularies: Vocabularies,
    dataset: SegmentationDataset,
    on_photo: Callable[[], None] = lambda: None,
) -> Counted:
    """Compare the labels of every vocabulary with the truth; broken pairs are listed, not fatal.

    The same counts as of `pixelclip bias`, in this process and with nothing kept on disk.

    Args:
        vocabularies: the first names of each are the data set's classes.
        dataset: photos with labels.
        on_photo: called after each photo, for progress.

    Raises:
        DataError: no pair could be used, or nothing is labelled.
    """
    counted = nothing_counted(vocabularies.wordings, len(dataset.classes))
    for pair in dataset.pairs:
        count_pair(counted, vocabularies, dataset, pair)
        on_photo()
    check_counted(counted, dataset)
    return counted


def check_counted(counted: Counted, dataset: SegmentationDataset) -> None:
    """Make sure that there is something to report.

    Raises:
        DataError: no pair could be used, or nothing is labelled.
    """
    if len(counted.failed) == len(dataset.pairs):
        raise DataError(f"none of the photos could be used; first: {counted.failed[0]}")
    if not counted.matrices[0].any():
        raise DataError(f"no pixel of {dataset.name} is labelled")


@torch.inference_mode()
def count_pair(
    counted: Counted, vocabularies: Vocabularies, dataset: SegmentationDataset, pair: Pair
) -> str:
    """Count a pair as well; one line says why if it cannot be used."""
    try:
        truth = dataset.truth(pair[1])
        prepared = vocabularies.prepare(pair[0])
        if truth.shape != (prepared.height, prepared.width):
            raise DataError(
                f"{pair[1]} is {truth.shape[1]} x {truth.shape[0]}, its photo"
                f" {prepared.width} x {prepared.height}"
            )
    except DataError as error:
        counted.errors.append(str(error))
        return str(error)
    count, background = len(dataset.classes), background_of(dataset)
    for matrix, labels in zip(counted.matrices, vocabularies.labels(prepared), strict=True):
        names = matrix.shape[1] - 1
        # Values of no class stay out: they lie above the K rows that are kept.
        found = confusion(truth, labels, names)[:count]
        if background is not None:  # as in `pixelclip eval`
            found[:, background] += found[:, names]
            found[:, names] = 0
        matrix += found
    for index, areas in pieces(truth, count).items():
        counted.piece_areas[index] += areas
        counted.photos[index] += 1
    counted.errors.append("")
    return ""


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
