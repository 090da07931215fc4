"""What chosen templates change on labelled photos."""

from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pixelclip.errors import DataError
from pixelclip.evaluation.datasets import SegmentationDataset
from pixelclip.evaluation.metrics import confusion, iou_per_class, mean_iou
from pixelclip.evaluation.template_choice import expert_features, fused_labels, grid_features
from pixelclip.plan import make_axes
from pixelclip.segmenter import Segmenter
from pixelclip.upsample import upsampled_argmax


class Effect(TypedDict):
    """One way to use templates: mIoU and IoU per class, in percent; None: not in the truth."""

    name: str
    miou: float
    per_class: dict[str, float | None]


@torch.inference_mode()
def measure_effect(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    texts: Float[Tensor, "T K D"],
    chosen: Sequence[Sequence[int]],
    on_photo: Callable[[], None] = lambda: None,
) -> list[Effect]:
    """The model's own templates, all candidates averaged, each class's own, and FLOSS's fusion.

    Args:
        segmenter: model, its own templates, the data set's classes; windows are not used.
        dataset: photos with labels.
        texts: of the candidates.
        chosen: per class, indices of candidates.
        on_photo: called after each photo.

    Raises:
        DataError: a photo or label map cannot be used.
    """
    experts, average = expert_features(texts, chosen)
    single = {
        "own": segmenter.text,
        "average": average,
        "per class": experts[range(len(chosen)), range(len(chosen))],
    }
    count, backbone = len(dataset.classes), segmenter.backbone
    matrices = {name: np.zeros((count, count + 1), np.int64) for name in (*single, "fused")}
    for photo, label_path in dataset.pairs:
        truth = dataset.truth(label_path)
        prepared = segmenter.prepare(photo)
        if truth.shape != (prepared.height, prepared.width):
            raise DataError(f"{label_path} is not of its photo's size")
        features = grid_features(segmenter, prepared)
        axes = make_axes(
            prepared.plan, segmenter.config, backbone.stride, prepared.width, prepared.height
        )
        for name, text in single.items():
            labels, _ = upsampled_argmax(features, text, *axes)
            matrices[name] += confusion(truth, labels, count)
        fused = fused_labels(features, experts, average, axes, backbone.temperature)
        matrices["fused"] += confusion(truth, fused, count)
        on_photo()
    return [
        Effect(name=name, miou=round(100 * mean_iou(matrix), 3), per_class={
            own: None if np.isnan(iou) else round(100 * float(iou), 3)
            for own, iou in zip(dataset.classes, iou_per_class(matrix), strict=True)
        })
        for name, matrix in matrices.items()
    ]  # fmt: skip
