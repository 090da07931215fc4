"""Masks without a model: regions of similar colour and texture, merged into a hierarchy."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float64, Int64, Integer, UInt8
from pydantic import BaseModel, ConfigDict, Field
from skimage.segmentation import felzenszwalb

from pixelclip.images import resized
from pixelclip.masks.hierarchy import Hierarchy, merge_regions
from pixelclip.masks.runs import PhotoMasks, from_labels

LONG_SIDE = 512  # the regions' scale counts pixels, so all photos are brought to one size


class SuperpixelSettings(BaseModel):
    """How regions of similar colour and texture are found.

    Attributes:
        threshold: neighbours more unlike than that stay apart (`hierarchy.merge_regions`); larger
            means fewer regions. How many there are depends on the photo.
        nested: give out the regions of the whole hierarchy, each a part of another, instead of
            those at the threshold, which cover the photo once.
        max_masks: of a photo if nested: those that last longest in the hierarchy.
        scale: of the first regions; larger means larger regions (k of Felzenszwalb and
            Huttenlocher, IJCV 2004).
        sigma: of the Gaussian before, in pixels of the photo with 512 on its longer side.
        min_share: smaller regions, as a share of the photo, are joined to a neighbour.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float = Field(default=0.85, ge=0.0, le=10.0)
    nested: bool = False
    max_masks: int = Field(default=200, ge=1, le=4096)
    scale: float = Field(default=30.0, ge=1.0, le=1e6)
    sigma: float = Field(default=0.8, ge=0.0, le=20.0)
    min_share: float = Field(default=0.0005, ge=0.0003, le=1.0)


DEFAULTS = SuperpixelSettings()


class Superpixels:
    """The mask source `superpixels`.

    Args:
        settings: of the regions.
        device: not used; the work is a processor's.
    """

    batch_size = 1

    def __init__(self, settings: SuperpixelSettings = DEFAULTS, device: str = "auto") -> None:
        self.settings = settings

    def __call__(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> list[PhotoMasks]:
        """The masks of upright photos, each in the photo's own pixels."""
        return [superpixels(image, self.settings) for image in images]


def superpixels(
    image: UInt8[np.ndarray, "H W 3"], settings: SuperpixelSettings = DEFAULTS
) -> PhotoMasks:
    """Regions of similar colour and texture; their score is how long they last when merged.

    Fine regions of Felzenszwalb and Huttenlocher (IJCV 2004) are merged, the most alike first.

    Args:
        image: the upright photo; it is looked at with at most 512 pixels on its longer side.
        settings: which regions.
    """
    height, width = image.shape[:2]
    shrink = min(1.0, LONG_SIDE / max(height, width))
    small_height, small_width = max(1, round(height * shrink)), max(1, round(width * shrink))
    small = np.asarray(resized(image, (small_width, small_height)))
    min_size = round(settings.min_share * small_height * small_width)
    labels = felzenszwalb(
        small, scale=settings.scale, sigma=settings.sigma, min_size=min_size
    ).astype(np.int64)
    tree = merge_regions(small, labels)
    rows = np.arange(height) * small_height // height
    columns = np.arange(width) * small_width // width
    if settings.nested:
        ranges, scores = _lasting(tree, settings.max_masks)
        ranks = tree.ranges()[: tree.count, 0]
        return _nested(ranks[labels][rows[:, None], columns], ranges, scores)
    regions = tree.cut(settings.threshold)
    masks = from_labels(regions[labels][rows[:, None], columns])
    scores = tree.survival()[np.unique(regions)]
    return replace(masks, scores=scores.astype(np.float32))


def _lasting(
    tree: Hierarchy, limit: int
) -> tuple[Int64[np.ndarray, "M 2"], Float64[np.ndarray, " M"]]:
    """The regions that last longest, larger ones first, as ranges of the tree, and their scores.

    Those that do not last at all are left out.
    """
    scores = tree.survival()
    order = np.argsort(-scores, kind="stable")
    kept = order[: min(limit, np.count_nonzero(scores))]
    kept = kept[np.argsort(-tree.sizes[kept], kind="stable")]
    return tree.ranges()[kept], scores[kept]


def _nested(
    ranks: Integer[np.ndarray, "H W"],
    ranges: Int64[np.ndarray, "M 2"],
    scores: Float64[np.ndarray, " M"],
) -> PhotoMasks:
    """The masks of the pixels with ranks in each range."""
    height, width = ranks.shape
    flat = ranks.ravel(order="F")
    bounds = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    values = flat[bounds[:-1]]  # one per run; every pixel is in one
    edges = []
    for first, last in ranges.tolist():
        is_inside = np.zeros(len(values) + 2, dtype=bool)
        is_inside[1:-1] = (values >= first) & (values < last)
        edges.append(bounds[np.flatnonzero(is_inside[1:] != is_inside[:-1])])
    joined = np.concatenate(edges)
    return PhotoMasks(
        height=height,
        width=width,
        starts=joined[::2],
        ends=joined[1::2],
        owners=np.repeat(np.arange(len(edges)), [len(part) // 2 for part in edges]),
        count=len(edges),
        scores=scores.astype(np.float32),
    )
