"""Masks of SAM and its descendants: a grid of points asks for everything in a photo."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, UInt8
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pixelclip.backbones.sam import Encoded, load_sam
from pixelclip.masks.candidates import (
    Box,
    Candidate,
    Frame,
    area,
    crop_boxes,
    is_cut_off,
    joined,
    mask_boxes,
    mask_runs,
    point_grid,
    stability_scores,
    within_memory,
    without_duplicates,
    without_small_parts,
)
from pixelclip.masks.runs import MAX_MASKS, PhotoMasks

PIXELS_AT_ONCE = 2**24  # of the masks that are brought to the size of the photo together
FIRST_FAMILIES = ("sam", "sam_hq")  # all others descend from SAM 2


class SamSettings(BaseModel):
    """What is asked of a model, named as in the authors' SamAutomaticMaskGenerator.

    Attributes:
        model: name on the hub of any model that transformers lists for mask generation: SAM,
            SAM-HQ, SAM 2 and 2.1, SAM 3's tracker, EdgeTAM.
        checkpoint: folder with such a model and its processor, as `save_pretrained` writes them;
            in place of the name.
        points_per_side: points asked in a row and in a column of the photo.
        points_per_batch: points asked at once; changes memory, speed and the last bit of logits.
        crops_n_layers: layers of crops asked besides the photo; layer i has 4^i crops.
        crop_overlap_ratio: by which the crops of the first layer overlap, as a share of the
            photo's shorter side; halved with each layer.
        crop_n_points_downscale_factor: points per side are divided by it with each layer.
        pred_iou_thresh: the model's own estimate of a mask's IoU must be above it; 0 keeps all.
            None: the authors', 0.88 for SAM and SAM-HQ, 0.8 for SAM 2 and its descendants.
        stability_score_thresh: a mask's stability must reach it; 0 keeps all.
        stability_score_offset: the stability is the IoU of the mask cut off at a logit this much
            higher and this much lower.
        box_nms_thresh: of two masks of a crop whose boxes have a higher IoU, the one with the
            better predicted IoU is kept.
        crop_nms_thresh: of two masks of several crops whose boxes have a higher IoU, that of the
            smaller crop is kept.
        min_area: smaller regions of a mask are removed, smaller holes filled (the authors'
            `min_mask_region_area`), and masks of which nothing is left; a share of the photo
            below 1, pixels from 1 on.
        max_masks: at most so many, those of the best predicted IoU.
        precision: of the network: `float32`, `bfloat16`, or `auto`, which is bfloat16 on GPUs
            that compute it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field("facebook/sam-vit-base", min_length=1)
    checkpoint: str | None = None
    points_per_side: int = Field(32, ge=1, le=256)
    points_per_batch: int = Field(64, ge=1, le=4096)
    crops_n_layers: int = Field(0, ge=0, le=4)
    crop_overlap_ratio: float = Field(512 / 1500, ge=0, lt=1)
    crop_n_points_downscale_factor: int = Field(1, ge=1, le=256)
    pred_iou_thresh: float | None = Field(None, ge=0, le=1)
    stability_score_thresh: float = Field(0.95, ge=0, le=1)
    stability_score_offset: float = Field(1.0, ge=0, le=100)
    box_nms_thresh: float = Field(0.7, ge=0, le=1)
    crop_nms_thresh: float = Field(0.7, ge=0, le=1)
    min_area: float = Field(0.0, ge=0, le=2**32, allow_inf_nan=False)
    max_masks: int = Field(MAX_MASKS, ge=1, le=MAX_MASKS)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"


class SamMasks:
    """The automatic masks of SAM (Kirillov et al. 2023, appendix B), step by step as the authors'.

    The image tower sees each crop once; all points of the crop reuse what it gives. Beside the
    network, memory is bounded whatever the model gives out: the decoder's small masks of
    `points_per_batch` points; `PIXELS_AT_ONCE` pixels of masks in the size of the photo (one mask
    at least) at some 12 bytes, 30 where masks are noise; and the runs of candidates, see
    `candidates.MAX_RUNS`.

    Empty masks and those whose predicted IoU is no number are left out.

    Attributes:
        batch_size: photos it likes to be given at once.
    """

    batch_size = 1  # the points of one photo fill a device, and no other photo can change them

    def __init__(self, settings: SamSettings, device: str = "auto") -> None:
        self._settings = settings
        self._model = load_sam(
            settings.model,
            checkpoint=settings.checkpoint,
            device=device,
            precision=settings.precision,
        )
        default = 0.88 if self._model.family in FIRST_FAMILIES else 0.8
        given = settings.pred_iou_thresh
        self._pred_iou_thresh = default if given is None else given

    def __call__(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> list[PhotoMasks]:
        """The masks of upright photos, the best predicted IoU first.

        Raises:
            ModelError: the model cannot be run.
        """
        with torch.inference_mode():
            return [self._photo_masks(image) for image in images]

    def _photo_masks(self, image: UInt8[np.ndarray, "H W 3"]) -> PhotoMasks:
        """The masks of one photo."""
        settings = self._settings
        frame = image.shape[0], image.shape[1]
        crops = crop_boxes(frame, settings.crops_n_layers, settings.crop_overlap_ratio)
        found: list[Candidate] = []
        left_out = 0
        for crop, layer in crops:
            shrink = settings.crop_n_points_downscale_factor**layer
            grid = point_grid(max(1, settings.points_per_side // shrink))
            of_crop, too_many = self._crop_masks(image, crop, grid)
            found, too_many_before = within_memory(found + of_crop)
            left_out += too_many + too_many_before
        if len(crops) > 1:
            scores = [1 / area(candidate.crop) for candidate in found]
            found = without_duplicates(found, scores, settings.crop_nms_thresh)
        if settings.min_area > 0:
            found = self._without_small_parts(found, frame)
        found = sorted(found, key=lambda candidate: -candidate.predicted_iou)
        return joined(found[: settings.max_masks], frame, left_out)

    def _crop_masks(
        self, image: UInt8[np.ndarray, "H W 3"], crop: Box, grid: Float64[np.ndarray, "P 2"]
    ) -> tuple[list[Candidate], int]:
        """The masks of a crop without duplicates, and how many had no place in memory."""
        left, top, right, bottom = crop
        encoded = self._model.encode(image[top:bottom, left:right])
        if encoded is None:
            return [], 0
        frame = image.shape[0], image.shape[1]
        found: list[Candidate] = []
        left_out = 0
        points = grid * [right - left, bottom - top]
        for first in range(0, len(points), self._settings.points_per_batch):
            asked = points[first : first + self._settings.points_per_batch]
            logits, predicted = self._model.ask(encoded, asked)
            places = (asked + np.array([left, top])).repeat(len(logits) // len(asked), axis=0)
            for indices in self._promising(encoded, predicted):
                large = self._model.upscale(encoded, logits[indices])
                chosen = indices.cpu().numpy()
                new = self._candidates(large, predicted[indices], places[chosen], crop, frame)
                found, too_many = within_memory(found + new)
                left_out += too_many
        scores = [candidate.predicted_iou for candidate in found]
        return without_duplicates(found, scores, self._settings.box_nms_thresh), left_out

    def _promising(
        self, encoded: Encoded, predicted: Float[Tensor, " M"]
    ) -> Sequence[Int64[Tensor, " _"]]:
        """Indices of masks with a good predicted IoU, so many at a time as are held together."""
        keep = predicted.isfinite()
        if self._pred_iou_thresh > 0:
            keep &= predicted > self._pred_iou_thresh
        pixels = max(math.prod(encoded.size), self._model.side**2)
        kept = keep.nonzero().flatten()
        return kept.split(max(1, PIXELS_AT_ONCE // pixels)) if len(kept) else ()

    def _candidates(
        self,
        logits: Float[Tensor, "M H W"],
        predicted: Float[Tensor, " M"],
        points: Float64[np.ndarray, "M 2"],
        crop: Box,
        frame: Frame,
    ) -> list[Candidate]:
        """The stable masks among these of a crop, but for those that the crop cuts off."""
        settings = self._settings
        stability = stability_scores(logits, settings.stability_score_offset)
        masks = logits > 0
        boxes = mask_boxes(masks) + torch.tensor([*crop[:2], *crop[:2]], device=masks.device)
        is_good = masks.any(dim=2).any(dim=1) & ~is_cut_off(boxes, crop, frame)
        if settings.stability_score_thresh > 0:
            is_good &= stability >= settings.stability_score_thresh
        runs = mask_runs(masks[is_good], crop, frame)
        values = (boxes, predicted, stability)
        columns = [value[is_good].tolist() for value in values]
        asked = points[is_good.cpu().numpy()].tolist()
        return [
            Candidate(starts, ends, tuple(box), iou, stable, tuple(point), crop)
            for (starts, ends), box, iou, stable, point in zip(runs, *columns, asked, strict=True)
        ]

    def _without_small_parts(self, found: Sequence[Candidate], frame: Frame) -> list[Candidate]:
        """Masks without small regions and holes; of duplicates, an unchanged one is kept."""
        settings = self._settings
        share = settings.min_area
        min_pixels = share * math.prod(frame) if share < 1 else share
        kept, is_unchanged = [], []
        for before in found:
            after = without_small_parts(before, frame, min_pixels)
            if after is not None:
                kept.append(after)
                is_unchanged.append(float(after is before))
        limit = max(settings.box_nms_thresh, settings.crop_nms_thresh)
        return without_duplicates(kept, is_unchanged, limit)
