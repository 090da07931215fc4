"""What a model's figures owe to the words, and to how frequent and large the classes are."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from jaxtyping import Float, Int64

from pixelclip.evaluation.datasets import SegmentationDataset
from pixelclip.evaluation.metrics import accuracy_per_class, iou_per_class, mean_accuracy, mean_iou
from pixelclip.evaluation.report import Terms
from pixelclip.evaluation.vocabularies import Counted, Vocabularies
from pixelclip.evaluation.wordings import Wording, changed_words

MAX_PAIRS = 20


class Spread(TypedDict):
    """IoU or mIoU over wordings, in percent, and the worst and the best of these."""

    wordings: int
    mean: float
    deviation: float
    lowest: float
    worst: str
    highest: float
    best: str


class Loss(TypedDict):
    """What near misses take from a class.

    `percent` of its pixels were right and are theirs; `most` is the one that takes most.
    """

    percent: float
    most: str


class ClassRow(TypedDict):
    """A class as it is named in the data set; IoU and accuracy in percent.

    `pixels_percent` is its share of the labelled pixels, `piece_pixels` the median size of its
    connected pieces; as rough outlines leave crumbs, `object_pixels` is that of the piece that its
    median pixel lies in. `wording` is over those wordings that rename it. What is not known of it
    is None.
    """

    name: str
    iou: float | None
    accuracy: float | None
    pixels_percent: float
    photos: int
    pieces: int
    piece_pixels: float | None
    object_pixels: int | None
    wording: Spread | None
    near_misses: Loss | None


class WordingRow(TypedDict):
    """A wording: mIoU in percent, over the true classes; `change` is that of the given one to it.

    `changed` has the new name of each class that is renamed, `iou` is that of the one class that
    `one synonym` renames.
    """

    kind: str
    label: str
    miou: float
    change: float
    changed: dict[str, str]
    iou: float | None


class PairRow(TypedDict):
    """Pixels of class `true` that became `predicted`: how many, and percent of the class."""

    true: str
    predicted: str
    pixels: int
    percent: float


class NearMisses(TypedDict):
    """Figures over the true classes without and with near misses in the vocabulary, in percent.

    What a near miss takes is a miss of its true class; taken from a wrong class, it is one
    false pixel less there, so that mIoU may even rise. Mean accuracy cannot. `pixels_percent` is
    the share of all labelled ones that near misses take.
    """

    names: list[str]
    miou_before: float
    miou_after: float
    accuracy_before: float
    accuracy_after: float
    pixels_percent: float


class VocabularyReport(TypedDict):
    """All of it.

    `rank_correlation` is Spearman's, of a class's IoU with four figures of `ClassRow`, by
    their names; `spread` that of mIoU over the wordings of all names.
    """

    dataset: str
    model: str
    classes_sha256: str
    photos: int
    protocol: str
    departures: list[str]
    miou: float
    classes: list[ClassRow]
    rank_correlation: dict[str, float | None]
    spread: Spread
    wordings: list[WordingRow]
    near_misses: NearMisses | None
    confused: list[PairRow]
    left_out: dict[str, str]
    failed: list[str]
    settings: dict[str, object]


def true_classes(matrix: Int64[np.ndarray, "K _"]) -> Int64[np.ndarray, "K K1"]:
    """The counts with all names beside the K true classes taken as "no class"."""
    count = len(matrix)
    return np.column_stack([matrix[:, :count], matrix[:, count:].sum(axis=1)])


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's: Pearson's of the ranks, equal values sharing their mean; None if undefined."""
    ranks = []
    for values in (first, second):
        _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[places])
    if len(first) < 3 or any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return round(float(np.corrcoef(ranks[0], ranks[1])[0, 1]), 3)


def object_area(areas: Sequence[int]) -> int:
    """The largest area such that pieces of at least that hold half of the pixels."""
    ordered = np.sort(areas)[::-1]
    return int(ordered[np.searchsorted(np.cumsum(ordered), ordered.sum() / 2)])


def confused_pairs(
    matrix: Int64[np.ndarray, "K K1"], names: Sequence[str], limit: int = MAX_PAIRS
) -> list[PairRow]:
    """The largest shares of a class's pixels that went to one other name, largest first.

    Args:
        matrix: pixel counts; the last column is "no class".
        names: of the columns before it; the first are those of the rows.
        limit: how many.
    """
    totals = matrix.sum(axis=1, keepdims=True)
    shares = matrix[:, : len(names)] / np.maximum(totals, 1)
    np.fill_diagonal(shares, 0)
    rows = []
    for place in np.argsort(-shares, axis=None, kind="stable")[:limit]:
        true, predicted = map(int, np.unravel_index(place, shares.shape))
        if shares[true, predicted] > 0:
            pixels, share = int(matrix[true, predicted]), float(shares[true, predicted])
            rows.append(PairRow(true=names[true], predicted=names[predicted], pixels=pixels,
                                percent=round(100 * share, 2)))  # fmt: skip
    return rows


def report(
    vocabularies: Vocabularies,
    dataset: SegmentationDataset,
    counted: Counted,
    terms: Terms = Terms(),  # noqa: B008 - it cannot be changed
) -> VocabularyReport:
    """The figures of what was counted."""
    wordings = vocabularies.wordings
    given = vocabularies.segmenters[0]
    matrices = [true_classes(matrix) for matrix in counted.matrices]
    rows = _wording_rows(wordings, matrices, dataset.classes)
    whole = _renaming(wordings)
    classes = _class_rows(wordings, counted, dataset.classes)
    return VocabularyReport(
        dataset=dataset.name,
        model=given.backbone.card.name,
        classes_sha256=dataset.classes_sha256,
        photos=len(dataset.pairs) - len(counted.failed),
        protocol=terms.protocol,
        departures=list(terms.departures),
        miou=rows[0]["miou"],
        classes=classes,
        rank_correlation=_correlations(classes),
        spread=_spread(
            [wordings[v] for v in whole], np.array([mean_iou(matrices[v]) for v in whole])
        ),
        wordings=rows,
        near_misses=_near_misses(wordings, counted.matrices),
        confused=confused_pairs(matrices[0], dataset.classes),
        left_out=vocabularies.left_out,
        failed=counted.failed,
        settings=given.description(),
    )


def _percent(value: float) -> float | None:
    return None if np.isnan(value) else _rounded(value)


def _rounded(share: float) -> float:
    return round(100 * float(share), 3)


def _wording_rows(
    wordings: Sequence[Wording],
    matrices: Sequence[Int64[np.ndarray, "_ _"]],
    classes: Sequence[str],
) -> list[WordingRow]:
    first = mean_iou(matrices[0])
    rows = []
    for wording, matrix in zip(wordings, matrices, strict=True):
        miou, changed = mean_iou(matrix), wording.changed
        own = None if changed is None else _percent(iou_per_class(matrix)[changed])
        rows.append(WordingRow(
            kind=wording.kind, label=wording.label, miou=round(100 * miou, 3),
            change=round(100 * (miou - first), 3),
            changed=changed_words(wording, classes), iou=own,
        ))  # fmt: skip
    return rows


def _spread(wordings: Sequence[Wording], values: Float[np.ndarray, " V"]) -> Spread:
    low, high = int(values.argmin()), int(values.argmax())
    return Spread(
        wordings=len(wordings),
        mean=_rounded(values.mean()), deviation=_rounded(values.std()),
        lowest=_rounded(values[low]), worst=wordings[low].label,
        highest=_rounded(values[high]), best=wordings[high].label,
    )  # fmt: skip


def _renaming(wordings: Sequence[Wording], index: int | None = None) -> list[int]:
    """Places of the wordings that rename all classes, or the given one as well.

    With near misses the vocabulary is another one.
    """
    return [
        place
        for place, wording in enumerate(wordings)
        if wording.kind != "near misses" and wording.changed in {None, index}
    ]


def _class_rows(
    wordings: Sequence[Wording], counted: Counted, classes: Sequence[str]
) -> list[ClassRow]:
    matrix = counted.matrices[0]
    pixels = matrix.sum(axis=1)
    ious = np.stack([iou_per_class(true_classes(matrix)) for matrix in counted.matrices])
    accuracies = accuracy_per_class(matrix)
    rows = []
    for index, name in enumerate(classes):
        areas = counted.piece_areas[index]
        own = _renaming(wordings, index)
        rows.append(ClassRow(
            name=name, iou=_percent(ious[0, index]), accuracy=_percent(accuracies[index]),
            pixels_percent=round(100 * float(pixels[index] / pixels.sum()), 3),
            photos=int(counted.photos[index]), pieces=len(areas),
            piece_pixels=float(np.median(areas)) if areas else None,
            object_pixels=object_area(areas) if areas else None,
            wording=None if np.isnan(ious[0, index])
            else _spread([wordings[v] for v in own], ious[own, index]),
            near_misses=_class_loss(wordings, counted.matrices, index),
        ))  # fmt: skip
    return rows


def _class_loss(
    wordings: Sequence[Wording], matrices: Sequence[Int64[np.ndarray, "_ _"]], index: int
) -> Loss | None:
    """What near misses take from one class.

    A name that is added leaves the scores of all others as they are, so a pixel keeps its class
    or goes to an added name; what was right and is right no more is the difference of the hits.
    """
    extended = [v for v, wording in enumerate(wordings) if wording.kind == "near misses"]
    true = matrices[0][index].sum()
    if not extended or not true:
        return None
    count = len(matrices[0])
    row = matrices[extended[0]][index]
    taken = row[count:-1]
    lost = matrices[0][index, index] - row[index]
    name = wordings[extended[0]].names[count + int(taken.argmax())] if taken.any() else ""
    return Loss(percent=_rounded(lost / true), most=name)


def _near_misses(
    wordings: Sequence[Wording], matrices: Sequence[Int64[np.ndarray, "_ _"]]
) -> NearMisses | None:
    count = len(matrices[0])
    for wording, matrix in zip(wordings, matrices, strict=True):
        if wording.kind == "near misses":
            taken = matrix[:, count:-1].sum() / matrix.sum()
            return NearMisses(
                names=list(wording.names[count:]),
                miou_before=round(100 * mean_iou(matrices[0]), 3),
                miou_after=round(100 * mean_iou(true_classes(matrix)), 3),
                accuracy_before=_rounded(mean_accuracy(true_classes(matrices[0]))),
                accuracy_after=_rounded(mean_accuracy(true_classes(matrix))),
                pixels_percent=_rounded(taken),
            )
    return None


def _correlations(classes: Sequence[ClassRow]) -> dict[str, float | None]:
    """Of IoU with frequency and size, over the classes that occur."""
    seen = [row for row in classes if row["iou"] is not None]
    ious = [float(row["iou"] or 0) for row in seen]
    return {
        "pixels_percent": rank_correlation(ious, [row["pixels_percent"] for row in seen]),
        "photos": rank_correlation(ious, [float(row["photos"]) for row in seen]),
        "piece_pixels": rank_correlation(ious, [float(row["piece_pixels"] or 0) for row in seen]),
        "object_pixels": rank_correlation(ious, [float(row["object_pixels"] or 0) for row in seen]),
    }
