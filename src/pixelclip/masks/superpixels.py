"""Masks without a model: regions of similar colour."""

import numpy as np
from jaxtyping import UInt8
from skimage.segmentation import felzenszwalb

from pixelclip.images import resized
from pixelclip.masks.runs import PhotoMasks, from_labels

SETTINGS = {"scale": 300.0, "sigma": 0.8, "min_share": 0.001}
LONG_SIDE = 512  # the regions' scale counts pixels, so all photos are brought to one size


def superpixels(
    image: UInt8[np.ndarray, "H W 3"],
    *,
    scale: float = SETTINGS["scale"],
    sigma: float = SETTINGS["sigma"],
    min_share: float = SETTINGS["min_share"],
) -> PhotoMasks:
    """Regions of Felzenszwalb and Huttenlocher (IJCV 2004), which cover the photo once.

    Args:
        image: the upright photo; it is looked at with at most 512 pixels on its longer side.
        scale: larger means larger regions (their k).
        sigma: of the Gaussian before, in pixels of the small photo.
        min_share: smaller regions, as a share of the photo, are joined to a neighbour.
    """
    height, width = image.shape[:2]
    shrink = min(1.0, LONG_SIDE / max(height, width))
    small_height, small_width = max(1, round(height * shrink)), max(1, round(width * shrink))
    small = np.asarray(resized(image, (small_width, small_height)))
    min_size = round(min_share * small_height * small_width)
    labels = felzenszwalb(small, scale=scale, sigma=sigma, min_size=min_size).astype(np.int32)
    rows = np.arange(height) * small_height // height
    columns = np.arange(width) * small_width // width
    return from_labels(labels[rows[:, None], columns])
