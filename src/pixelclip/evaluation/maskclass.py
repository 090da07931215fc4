"""Zero-shot classification of given masks: which of the names is this region?"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Integer, UInt8
from torch import Tensor

from pixelclip.backbones.pixels import to_pixels
from pixelclip.device import autocast
from pixelclip.errors import ConfigError, DataError
from pixelclip.evaluation.chosen import photos_of
from pixelclip.evaluation.datasets import SegmentationDataset
from pixelclip.evaluation.evaluate import background_of
from pixelclip.evaluation.maskclass_pieces import NamedMasks, joined
from pixelclip.evaluation.maskclass_report import MaskClassReport, MaskTerms, make_mask_report
from pixelclip.evaluation.metrics import confusion
from pixelclip.evaluation.report import Terms
from pixelclip.images import as_photo, photo_size, resized
from pixelclip.masks.refine import mask_means, paint
from pixelclip.masks.refiner import Refine, Refiner
from pixelclip.masks.runs import PhotoMasks, from_labels
from pixelclip.photos import Photo
from pixelclip.segmenter import Segmenter

TRUTH = "truth"  # the masks are the true regions
VARIANTS = {
    "pooled": "mean of the dense features under the mask",
    "crop": "image embedding of the mask's box",
    "masked-crop": "the same, with the mean colour outside the mask",
}
CROPS_AT_ONCE = 8


def classify_masks(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    *,
    masks: Refine | None = None,
    variant: str = "pooled",
    on_photo: Callable[[], None] = lambda: None,
) -> MaskClassReport:
    """Name every mask of every photo and compare; broken photos are listed, not fatal.

    The same figures as of `pixelclip eval --masks`, in this process and with nothing kept on disk.

    Args:
        segmenter: its classes are the data set's.
        dataset: photos with labels.
        masks: which are named: those of a source, by name or as it is, or of a file, folder or
            reader; None: the true regions, one for each class of a photo.
        variant: `pooled`: the mean of the dense features under the mask, exact in pixels; `crop`:
            the image embedding of the mask's box, squashed to the size the model was trained with;
            `masked-crop`: the same with the mean colour outside the mask.
        on_photo: called after each photo, for progress.

    Raises:
        ConfigError: the variant is unknown, the classes are others, or there are no such masks.
        DataError: no photo could be used, or no mask counts.
    """
    check_variants([variant])
    if segmenter.classes != tuple(dataset.classes):
        raise ConfigError(f"the segmenter's classes are not those of {dataset.name}")
    refiner = None if masks is None else Refiner(masks, str(segmenter.backbone.device))
    found: list[NamedMasks] = []
    failed: list[str] = []
    for photo, (_, label_path) in zip(photos_of(dataset), dataset.pairs, strict=True):
        try:
            named = name_masks(segmenter, dataset, (photo, label_path), refiner, [variant])
        except DataError as error:
            failed.append(str(error))
        else:
            found.append(named[variant])
        on_photo()
    origin: dict[str, object] = {"source": TRUTH} if refiner is None else refiner.description
    how = mask_terms(segmenter, origin, variant)
    return make_mask_report(dataset, joined(found, len(dataset.classes)), failed, how)


def check_variants(variants: Sequence[str]) -> None:
    """Make sure that all are known.

    Raises:
        ConfigError: one is not.
    """
    for variant in variants:
        if variant not in VARIANTS:
            raise ConfigError(f"unknown variant {variant!r}; available: {', '.join(VARIANTS)}")


def mask_terms(
    segmenter: Segmenter,
    origin: Mapping[str, object],
    variant: str,
    terms: Terms = Terms(),  # noqa: B008 - it cannot be changed
) -> MaskTerms:
    """All that the figures depend on beside the photos.

    Args:
        segmenter: model and settings.
        origin: of the masks: `source` with its settings, or the path of `masks` made before.
        variant: what stands for a mask.
        terms: protocol and rival.
    """
    settings = {
        **segmenter.description(),
        "masks": dict(origin),
        "crop_side": None if variant == "pooled" else crop_side(segmenter),
    }
    masks = str(origin["source"] if "source" in origin else origin["masks"])
    return MaskTerms(segmenter.backbone.card.name, variant, masks, settings, terms)


def name_masks(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    pair: tuple[Photo, Path],
    refiner: Refiner | None,
    variants: Sequence[str],
) -> dict[str, NamedMasks]:
    """The masks of one photo, named and compared, by variant.

    Args:
        segmenter: its classes are the data set's.
        dataset: of the pair.
        pair: photo and label map.
        refiner: the masks; None: the true regions.
        variants: what stands for a mask.

    Raises:
        ConfigError: classes have templates of their own, or labels are refined.
        DataError: photo, labels or masks cannot be used.
    """
    if segmenter.experts is not None or segmenter.refiner is not None:
        reason = "templates of single classes" if segmenter.experts else "refined labels"
        raise ConfigError(f"masks cannot be named with {reason}; leave them out")
    photo, label_path = pair
    truth = dataset.truth(label_path)
    image = as_photo(photo.path, segmenter.config.max_pixels)
    pixels = np.asarray(resized(image, photo_size(image)))
    if truth.shape != pixels.shape[:2]:
        raise DataError(
            f"{label_path} is {truth.shape[1]} x {truth.shape[0]}, its photo"
            f" {pixels.shape[1]} x {pixels.shape[0]}"
        )
    if refiner is None:
        masks = from_labels(truth, ignore=(dataset.ignore,))
    else:
        masks = refiner(pixels, photo)
    masks = masks.select(masks.areas() > 0)
    return {
        variant: _named(
            segmenter, dataset, mask_embeddings(segmenter, pixels, masks, variant), masks, truth
        )
        for variant in variants
    }


@torch.inference_mode()
def _named(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    embeddings: Float[Tensor, "M D"],
    masks: PhotoMasks,
    truth: Integer[np.ndarray, "H W"],
) -> NamedMasks:
    """Each mask has the class whose text its embedding is nearest to."""
    count = len(dataset.classes)
    cosines = F.normalize(embeddings, dim=1) @ segmenter.text.T
    logits = segmenter.backbone.temperature * cosines
    found = logits.argmax(dim=1).cpu().numpy()
    background = background_of(dataset)  # "no class" is that, if the data set has it
    none = count if background is None else background
    found = np.where(found < count, found, none)
    painted = paint(np.full(truth.shape, none), masks, found)
    return NamedMasks(
        truth=true_classes(masks, truth, count),
        scores=logits.softmax(dim=1)[:, :count].float().cpu().numpy(),
        found=found,
        matrix=confusion(truth, painted, count),
    )


def true_classes(
    masks: PhotoMasks, truth: Integer[np.ndarray, "H W"], count: int
) -> Int64[np.ndarray, " M"]:
    """Class of most of each mask's labelled pixels; `count` if under half of them are labelled.

    Of several classes with as many pixels it is the first in the data set's order.
    """
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
        rows, columns = segmenter.axes(prepared)
        return mask_means(segmenter.grid_features(prepared), masks, rows, columns)
    backbone = segmenter.backbone
    crops = [_crop(segmenter, photo, masks, index, variant) for index in range(masks.count)]
    parts = [torch.zeros(0, backbone.dim, device=backbone.device)]
    for first in range(0, len(crops), CROPS_AT_ONCE):
        batch = torch.stack(crops[first : first + CROPS_AT_ONCE])
        batch = batch.to(backbone.device, backbone.dtype)
        with autocast(batch.device, segmenter.config.precision):
            parts.append(backbone.pooled(batch).float())
    return torch.cat(parts)


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
