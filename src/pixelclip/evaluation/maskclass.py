"""Zero-shot classification of given masks: which of the names is this region?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Integer, UInt8
from pydantic import BaseModel
from sklearn.metrics import average_precision_score
from torch import Tensor

from pixelclip.backbones.pixels import to_pixels
from pixelclip.device import autocast
from pixelclip.errors import ConfigError, DataError
from pixelclip.evaluation.datasets import SegmentationDataset
from pixelclip.evaluation.metrics import confusion, mean_iou
from pixelclip.evaluation.table import markdown
from pixelclip.images import as_photo, photo_size, resized
from pixelclip.masks.annotations import MaskReader
from pixelclip.masks.refine import mask_means, paint
from pixelclip.masks.runs import PhotoMasks, from_labels
from pixelclip.masks.sources import MaskSource, described
from pixelclip.photos import Photo
from pixelclip.plan import make_axes
from pixelclip.segmentation import none_label
from pixelclip.segmenter import Prepared, Segmenter

VARIANTS = {
    "pooled": "mean of the dense features under the mask",
    "crop": "image embedding of the mask's box",
    "masked-crop": "the same, with the mean colour outside the mask",
}
CROPS_AT_ONCE = 8


@dataclass(frozen=True)
class MaskClassReport:
    """Figures of one run; all in percent.

    Attributes:
        dataset: its name.
        model: name on its card.
        variant: key of `VARIANTS`, what stands for a mask.
        photos: that could be used.
        masks: that count: at least half of their pixels are labelled. The class of a mask is that
            of most of its labelled pixels.
        left_out: masks that do not count.
        accuracy: share of the masks whose class is found.
        mean_accuracy: the mean over classes of the share of their masks.
        miou: of the label maps in which every mask is painted with the class found, small masks on
            top; labelled pixels under no mask are wrong.
        ap: mean over the classes that occur of the average precision (scikit-learn's: no
            interpolation) of ranking all masks of the data set by their probability for the class.
            Masks are given, so unlike COCO's it says nothing of masks that were not found.
        per_class: accuracy and AP per class; None for those that no mask has.
        failed: what is wrong with the photos that could not be used.
        settings: all that the figures depend on.
    """

    dataset: str
    model: str
    variant: str
    photos: int
    masks: int
    left_out: int
    accuracy: float
    mean_accuracy: float
    miou: float
    ap: float
    per_class: dict[str, tuple[float, float] | None]
    failed: tuple[str, ...]
    settings: dict[str, object]


class _Judged(NamedTuple):
    """The masks of one photo.

    Attributes:
        truth: class per mask; the number of classes for a mask that does not count.
        scores: probability of each class.
        found: class with the highest; the highest label for a name of background.
        matrix: confusion of the painted pixels.
    """

    truth: Int64[np.ndarray, " M"]
    scores: Float[np.ndarray, "M K"]
    found: Integer[np.ndarray, " M"]
    matrix: Integer[np.ndarray, "K K1"]


def classify_masks(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    *,
    masks: MaskReader | MaskSource | None = None,
    variant: str = "pooled",
    on_photo: Callable[[], None] = lambda: None,
) -> MaskClassReport:
    """Name every mask of every photo and compare; broken photos are listed, not fatal.

    Args:
        segmenter: its classes are the data set's.
        dataset: photos with labels.
        masks: which are named: of a reader, or of a source; None: the true regions, one for each
            class of a photo.
        variant: `pooled`: the mean of the dense features under the mask, exact in pixels; `crop`:
            the image embedding of the mask's box, squashed to the size the model was trained with;
            `masked-crop`: the same with the mean colour outside the mask.
        on_photo: called after each photo, for progress.

    Raises:
        ConfigError: the variant is unknown, or the classes are others.
        DataError: no photo could be used, or no mask counts.
    """
    if variant not in VARIANTS:
        raise ConfigError(f"unknown variant {variant!r}; available: {', '.join(VARIANTS)}")
    if segmenter.classes != tuple(dataset.classes):
        raise ConfigError(f"the segmenter's classes are not those of {dataset.name}")
    judged: list[_Judged] = []
    failed: list[str] = []
    for pair in dataset.pairs:
        try:
            judged.append(_judge(segmenter, dataset, pair, masks, variant))
        except DataError as error:
            failed.append(str(error))
        on_photo()
    if not judged:
        raise DataError(f"none of the {len(failed)} photos could be used; first: {failed[0]}")
    settings = _settings(segmenter, dataset, masks, variant)
    return _report(segmenter, dataset, judged, tuple(failed), variant, settings)


def _settings(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    masks: MaskReader | MaskSource | None,
    variant: str,
) -> dict[str, object]:
    """All that the figures depend on beside the photos."""
    made_with = getattr(masks, "settings", None)
    return {
        "classes_sha256": dataset.classes_sha256,
        **segmenter.description(),
        "masks": "true regions" if masks is None else type(masks).__name__,
        "mask_settings": described(made_with) if isinstance(made_with, BaseModel) else None,
        "crop_side": None if variant == "pooled" else crop_side(segmenter),
    }


def _report(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    judged: Sequence[_Judged],
    failed: tuple[str, ...],
    variant: str,
    settings: dict[str, object],
) -> MaskClassReport:
    """The figures of all photos.

    Raises:
        DataError: no mask counts.
    """
    count = len(dataset.classes)
    truth = np.concatenate([part.truth for part in judged])
    counts = truth < count
    if not counts.any():
        raise DataError(f"no mask of {dataset.name} lies on labelled pixels")
    scores = np.concatenate([part.scores for part in judged])[counts]
    hits = (np.concatenate([part.found for part in judged]) == truth)[counts]
    truth = truth[counts]
    present = np.unique(truth).tolist()
    accuracy = {k: 100 * float(hits[truth == k].mean()) for k in present}
    precision = {k: 100 * float(average_precision_score(truth == k, scores[:, k])) for k in present}
    matrix = np.sum([part.matrix for part in judged], axis=0)
    return MaskClassReport(
        dataset=dataset.name,
        model=segmenter.backbone.card.name,
        variant=variant,
        photos=len(judged),
        masks=len(truth),
        left_out=int((~counts).sum()),
        accuracy=round(100 * float(hits.mean()), 3),
        mean_accuracy=round(float(np.mean(list(accuracy.values()))), 3),
        miou=round(100 * mean_iou(matrix), 3),
        ap=round(float(np.mean(list(precision.values()))), 3),
        per_class={
            name: (round(accuracy[k], 3), round(precision[k], 3)) if k in accuracy else None
            for k, name in enumerate(dataset.classes)
        },
        failed=failed,
        settings=settings,
    )


def _judge(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    pair: tuple[Path, Path],
    source: MaskReader | MaskSource | None,
    variant: str,
) -> _Judged:
    """The masks of one photo, named and compared.

    Raises:
        DataError: photo, labels or masks cannot be used.
    """
    path, label_path = pair
    truth = dataset.truth(label_path)
    image = as_photo(path, segmenter.config.max_pixels)
    photo = np.asarray(resized(image, photo_size(image)))
    if truth.shape != photo.shape[:2]:
        raise DataError(
            f"{label_path} is {truth.shape[1]} x {truth.shape[0]}, its photo"
            f" {photo.shape[1]} x {photo.shape[0]}"
        )
    masks = _masks(source, path, photo, truth, dataset.ignore)
    masks = masks.select(masks.areas() > 0)
    count = len(dataset.classes)
    embeddings = F.normalize(mask_embeddings(segmenter, photo, masks, variant), dim=1)
    logits = segmenter.backbone.temperature * (embeddings @ segmenter.text.T)
    found = logits.argmax(dim=1).cpu().numpy()
    found = np.where(found >= count, none_label(count), found)
    painted = paint(np.full(truth.shape, none_label(count)), masks, found)
    return _Judged(
        truth=true_classes(masks, truth, count),
        scores=logits.softmax(dim=1)[:, :count].float().cpu().numpy(),
        found=found,
        matrix=confusion(truth, painted, count),
    )


def _masks(
    source: MaskReader | MaskSource | None,
    path: Path,
    photo: UInt8[np.ndarray, "H W 3"],
    truth: Integer[np.ndarray, "H W"],
    ignore: int,
) -> PhotoMasks:
    """The masks of a photo; none if a reader knows nothing of it."""
    if source is None:
        return from_labels(truth, ignore=(ignore,))
    if isinstance(source, MaskSource):
        return source([photo])[0]
    height, width = truth.shape
    found = source(Photo(path, Path(path.stem)), (height, width))
    return found or from_labels(np.zeros((height, width), dtype=np.uint8), ignore=(0,))


def true_classes(
    masks: PhotoMasks, truth: Integer[np.ndarray, "H W"], count: int
) -> Int64[np.ndarray, " M"]:
    """Class of most of each mask's labelled pixels; `count` if under half of them are labelled."""
    flat = truth.ravel(order="F")
    bounds = np.searchsorted(masks.owners, np.arange(masks.count + 1))
    classes = np.full(masks.count, count, dtype=np.int64)
    for index in range(masks.count):
        runs = range(bounds[index], bounds[index + 1])
        parts = [flat[masks.starts[run] : masks.ends[run]] for run in runs]
        values = np.concatenate(parts) if parts else flat[:0]
        labelled = values[(values >= 0) & (values < count)]
        if len(labelled) and 2 * len(labelled) >= len(values):
            classes[index] = np.bincount(labelled, minlength=count).argmax()
    return classes


@torch.inference_mode()
def mask_embeddings(
    segmenter: Segmenter,
    photo: UInt8[np.ndarray, "H W 3"],
    masks: PhotoMasks,
    variant: str = "pooled",
) -> Float[Tensor, "M D"]:
    """What stands for each mask, not normalised; see `classify_masks`.

    Args:
        segmenter: model and settings.
        photo: upright.
        masks: of the photo, none empty.
        variant: how.
    """
    if variant == "pooled":
        prepared = segmenter.prepare(photo)
        stride = segmenter.backbone.stride
        rows, columns = make_axes(
            prepared.plan, segmenter.config, stride, prepared.width, prepared.height
        )
        return mask_means(grid_features(segmenter, prepared), masks, rows, columns)
    backbone = segmenter.backbone
    crops = [_crop(segmenter, photo, masks, index, variant) for index in range(masks.count)]
    parts = [torch.zeros(0, backbone.dim, device=backbone.device)]
    for first in range(0, len(crops), CROPS_AT_ONCE):
        batch = torch.stack(crops[first : first + CROPS_AT_ONCE])
        batch = batch.to(backbone.device, backbone.dtype)
        with autocast(batch.device, segmenter.config.precision):
            parts.append(backbone.pooled(batch).float())
    return torch.cat(parts)


def grid_features(segmenter: Segmenter, photo: Prepared) -> Float[Tensor, "h w D"]:
    """The whole grid of a photo from which its labels are made, in windows where it is large."""
    if len(photo.plan.rows) * len(photo.plan.columns) > 1:
        return torch.cat(list(segmenter._bands(photo)))
    return segmenter.features([segmenter._pixels(photo)])[0]


def crop_side(segmenter: Segmenter) -> int:
    """Side of a crop as network input: what the image embedding was trained with, if known."""
    card = segmenter.backbone.card
    vision = card.config.get("vision_cfg")
    size = vision.get("image_size") if isinstance(vision, dict) else None
    return size if isinstance(size, int) else card.square


def _crop(
    segmenter: Segmenter,
    photo: UInt8[np.ndarray, "H W 3"],
    masks: PhotoMasks,
    index: int,
    variant: str,
) -> Float[Tensor, "3 S S"]:
    """The box of a mask as network input, squashed to a square."""
    left, top, width, height = masks.boxes()[index].tolist()
    box = photo[top : top + height, left : left + width]
    if variant == "masked-crop":
        mask = masks.select(np.array([index]))
        inside = mask.sample(np.arange(top, top + height), np.arange(left, left + width))[0]
        box = _filled(box, inside, segmenter.backbone.card.mean)
    side = crop_side(segmenter)
    return to_pixels(resized(np.ascontiguousarray(box), (side, side)))


def _filled(
    box: UInt8[np.ndarray, "h w 3"],
    inside: Bool[np.ndarray, "h w"],
    mean: tuple[float, float, float],
) -> UInt8[np.ndarray, "h w 3"]:
    """The box with a colour outside the mask."""
    colour = np.round(255 * np.array(mean)).astype(np.uint8)
    return np.where(inside[..., None], box, colour)


def as_table(reports: Sequence[MaskClassReport]) -> str:
    """The figures as a Markdown table, a line for each report."""
    head = ["data set", "model", "masks", "variant", "number"]
    lines = [[*head, "accuracy", "mean accuracy", "mIoU", "AP"]]
    for report in reports:
        figures = (report.accuracy, report.mean_accuracy, report.miou, report.ap)
        cells = [report.dataset, report.model, str(report.settings["masks"]), report.variant]
        lines.append([*cells, str(report.masks), *(f"{figure:.1f}" for figure in figures)])
    return markdown(lines)
