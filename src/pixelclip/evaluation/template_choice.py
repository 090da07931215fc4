"""Templates per class, chosen on photos without labels by the entropy of the prediction.

FLOSS (Benigmim et al., arXiv 2504.10487): among the classifiers of one template each, those whose
softmax over the classes has the lowest entropy where they say "sofa" are its class experts. Each
expert classifies with its own templates in all classes' names; where experts say their own class,
the surest wins; elsewhere the average of all templates decides.

`choose` is the choice, `fused_labels` the paper's way to use it, at K times the cost of labels. One
feature per class from its own templates (`--templates FILE`) costs nothing and is another thing:
its scores are compared across templates, and on stuff classes it lost (docs/bias.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Integer
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pixelclip.backbones.pixels import squash, to_pixels
from pixelclip.errors import ConfigError, DataError
from pixelclip.images import write_json
from pixelclip.photos import Photo, at_hand
from pixelclip.segmenter import Prepared, Segmenter
from pixelclip.upsample import Axis, upsampled_confidence
from pixelclip.vocabulary import OWN, TEMPLATES_FORMAT, TEXTS_PER_CALL, per_template

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
def template_features(segmenter: Segmenter, templates: Sequence[str]) -> Float[Tensor, "T K D"]:
    """Unit-norm features of every class in every template alone, synonyms averaged.

    Raises:
        ConfigError: templates are of single classes already.
    """
    if any(OWN in template for template in templates):
        raise ConfigError("candidates must be templates for all classes, not for single ones")
    names, step = segmenter.classes, max(1, TEXTS_PER_CALL // len(templates))
    parts = [
        per_template(
            segmenter.backbone.text,  # type: ignore[arg-type]  # nn.Module is untyped
            names[start : start + step],
            templates,
            fix_article=segmenter.config.fix_article,
        )
        for start in range(0, len(names), step)
    ]
    return torch.cat(parts).transpose(0, 1)


@torch.inference_mode()
def grid_features(segmenter: Segmenter, photo: Prepared) -> Float[Tensor, "h w D"]:
    """Unit-norm features of a photo that goes through the network in one piece."""
    pixels = to_pixels(photo.image)
    if segmenter.config.preset == "authors":
        pixels = squash(pixels, photo.plan.height)
    return segmenter.features([pixels])[0]


@torch.inference_mode()
def count_entropies(
    features: Float[Tensor, "h w D"], texts: Float[Tensor, "T K D"], temperature: float
) -> Entropies:
    """Entropy of every template's softmax over the classes, summed per predicted class.

    Counted over the cells of the feature grid; the paper counts pixels of up-sampled maps.
    """
    cells = features.flatten(0, 1)
    count = texts.shape[1]
    sums = np.zeros(texts.shape[:2])
    found = np.zeros(texts.shape[:2], dtype=np.int64)
    step = max(1, SCORES_PER_CALL // (len(cells) * count))
    for start in range(0, len(texts), step):
        some = texts[start : start + step]
        logs = (temperature * cells @ some.mT).log_softmax(dim=2)  # [t, hw, K]
        entropies = -(logs.exp() * logs).sum(dim=2).double().cpu().numpy()
        places = logs.argmax(dim=2).cpu().numpy() + np.arange(len(some))[:, None] * count
        size = len(some) * count
        added = np.bincount(places.ravel(), entropies.ravel(), size).reshape(-1, count)
        sums[start : start + step] += added
        found[start : start + step] += np.bincount(places.ravel(), minlength=size).reshape(
            -1, count
        )
    return Entropies(sums, found)


def photo_entropies(
    segmenter: Segmenter,
    photos: Sequence[Photo],
    texts: Float[Tensor, "T K D"],
    on_photo: Callable[[], None] = lambda: None,
) -> Entropies:
    """The entropies over all photos; those that cannot be read are listed.

    Args:
        segmenter: model, classes and settings; windows are not used.
        photos: without labels.
        texts: as from `template_features`.
        on_photo: called after each photo.

    Raises:
        DataError: none could be read.
    """
    sums = np.zeros(texts.shape[:2])
    cells = np.zeros(texts.shape[:2], dtype=np.int64)
    failed: list[str] = []
    for photo in photos:
        try:
            with at_hand(photo) as local:
                prepared = segmenter.prepare(local.path)
        except DataError as error:
            failed.append(str(error))
            on_photo()
            continue
        features = grid_features(segmenter, prepared)
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


def expert_features(
    texts: Float[Tensor, "T K D"], chosen: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, "K K D"], Float[Tensor, "K D"]]:
    """Per class its expert's features of all classes; and those of the average of all templates."""
    experts = [F.normalize(texts[list(own)].mean(dim=0), dim=1) for own in chosen]
    return torch.stack(experts), F.normalize(texts.mean(dim=0), dim=1)


@torch.inference_mode()
def fused_labels(
    features: Float[Tensor, "h w D"],
    experts: Float[Tensor, "K K D"],
    average: Float[Tensor, "K D"],
    axes: tuple[Axis, Axis],
    temperature: float,
) -> Integer[np.ndarray, "H W"]:
    """Labels by the paper's fusion, at K times the cost of one classifier.

    Args:
        features: unit-norm, per grid point.
        experts: per class, features of all classes.
        average: for pixels where no expert says its own class.
        axes: where rows and columns of the labels lie on the grid.
        temperature: factor on cosines before the softmax.
    """
    labels, _ = upsampled_confidence(features, average, *axes, temperature=temperature)
    labels = labels.copy()
    surest = np.zeros(labels.shape, dtype=np.float32)
    for index, texts in enumerate(experts):
        best, sure = upsampled_confidence(features, texts, *axes, temperature=temperature)
        wins = (best == index) & (sure > surest)
        labels[wins] = index
        surest[wins] = sure[wins]
    return labels


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
