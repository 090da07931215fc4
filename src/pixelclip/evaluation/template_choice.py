"""Templates per class, chosen on photos without labels by the entropy of the prediction.

FLOSS (Benigmim et al., arXiv 2504.10487): among the classifiers of one template each, those whose
softmax over the classes has the lowest entropy where they say "sofa" are its class experts. What
is made of them: `labelling.fused`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pixelclip.errors import DataError
from pixelclip.images import write_json
from pixelclip.photos import Photo, at_hand
from pixelclip.segmenter import Segmenter
from pixelclip.vocabulary import TEMPLATES_FORMAT

SCORES_PER_CALL = 16_000_000


class ChoiceSettings(BaseModel):
    """How templates are chosen.

    Attributes:
        experts: N, templates kept per class (4 in the paper).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    experts: int = Field(4, ge=1, le=10_000)


@dataclass(frozen=True, eq=False)
class Entropies:
    """What is summed over photos.

    Attributes:
        sums: per template and class, entropy in nats over the cells predicted as the class.
        cells: how many these are.
        failed: photos that could not be used, with the reason.
    """

    sums: Float[np.ndarray, "T K"]
    cells: Int64[np.ndarray, "T K"]
    failed: tuple[str, ...] = ()


@torch.inference_mode()
def count_entropies(
    features: Float[Tensor, "h w D"], texts: Float[Tensor, "K T D"], temperature: float
) -> Entropies:
    """Entropy of every template's softmax over the classes, summed per predicted class.

    Counted over the cells of the feature grid; the paper counts pixels of up-sampled maps.
    """
    num_classes, num_templates = texts.shape[:2]
    sums = np.zeros((num_templates, num_classes))
    found = np.zeros((num_templates, num_classes), dtype=np.int64)
    for cells in features.flatten(0, 1).split(max(1, SCORES_PER_CALL // num_classes)):
        for index in range(num_templates):
            logs = (temperature * cells @ texts[:, index].T).log_softmax(dim=1)  # [n, K]
            entropies = -(logs.exp() * logs).sum(dim=1).double().cpu().numpy()
            best = logs.argmax(dim=1).cpu().numpy()
            sums[index] += np.bincount(best, entropies, num_classes)
            found[index] += np.bincount(best, minlength=num_classes)
    return Entropies(sums, found)


def photo_entropies(
    segmenter: Segmenter,
    photos: Sequence[Photo],
    texts: Float[Tensor, "K T D"],
    on_photo: Callable[[], None] = lambda: None,
) -> Entropies:
    """The entropies over all photos; those that cannot be read are listed.

    Args:
        segmenter: model, classes and settings.
        photos: without labels.
        texts: of the classes in every template, as from `vocabulary.template_features`.
        on_photo: called after each photo.

    Raises:
        DataError: none could be read.
    """
    shape = (texts.shape[1], texts.shape[0])
    sums, cells = np.zeros(shape), np.zeros(shape, dtype=np.int64)
    failed: list[str] = []
    for photo in photos:
        try:
            with at_hand(photo) as local:
                prepared = segmenter.prepare(local.path)
        except DataError as error:
            failed.append(str(error))
            on_photo()
            continue
        features = segmenter.grid_features(prepared)
        counted = count_entropies(features, texts, segmenter.backbone.temperature)
        sums += counted.sums
        cells += counted.cells
        on_photo()
    if len(failed) == len(photos):
        raise DataError(f"none of the {len(failed)} photos could be used; first: {failed[0]}")
    return Entropies(sums, cells, tuple(failed))


def choose(entropies: Entropies, settings: ChoiceSettings) -> list[list[int]]:
    """Per class the templates of lowest mean entropy, surest first; all if it is never predicted.

    Equal ones keep their order.
    """
    cells = entropies.cells
    chosen = []
    for index in range(cells.shape[1]):
        own = cells[:, index]
        usable = np.flatnonzero(own)
        if not len(usable):
            chosen.append(list(range(len(own))))
            continue
        means = entropies.sums[usable, index] / own[usable]
        order = np.argsort(means, kind="stable")[: settings.experts]
        chosen.append(usable[order].tolist())
    return chosen


def write_choice(
    path: Path,
    segmenter: Segmenter,
    templates: Sequence[str],
    chosen: Sequence[Sequence[int]],
    *,
    photos: int,
    settings: ChoiceSettings,
) -> None:
    """Write the chosen templates as JSON, for `--templates`.

    Args:
        path: of the file.
        segmenter: model and classes.
        templates: candidates; they serve classes that the file does not name.
        chosen: per class, indices of candidates.
        photos: how many were looked at.
        settings: of the choice.

    Raises:
        DataError: the file cannot be written.
    """
    document = {
        "format": TEMPLATES_FORMAT,
        "version": 1,
        "default": list(templates),
        "classes": {
            name: [templates[index] for index in own]
            for name, own in zip(segmenter.classes, chosen, strict=True)
        },
        "made_from": {
            "model": segmenter.backbone.card.name,
            "weights": segmenter.backbone.origin,
            "photos": photos,
            **settings.model_dump(),
        },
    }
    write_json(path, document)
