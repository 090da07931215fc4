"""From photos to what image towers compute on: tensors, normalised, padded to whole cells."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor


def normalise_and_pad(
    images: Float[Tensor, "B 3 H W"],
    mean: Float[Tensor, "3 1 1"],
    std: Float[Tensor, "3 1 1"],
    stride: int,
) -> Float[Tensor, "B 3 Hp Wp"]:
    """Normalised pixels, zero-padded at the right and bottom to multiples of `stride`.

    Zero after normalisation is the pixel mean (behaviour.md 9).

    Args:
        images: RGB in [0, 1].
        mean: per channel, on the [0, 1] scale.
        std: per channel, on the [0, 1] scale.
        stride: pixels per feature cell.
    """
    height, width = images.shape[-2:]
    pixels = (images - mean) / std
    right, bottom = -width % stride, -height % stride
    return F.pad(pixels, (0, right, 0, bottom)) if right or bottom else pixels


def channel_buffer(values: tuple[float, float, float]) -> Float[Tensor, "3 1 1"]:
    """Three channel values in the shape that broadcasts over a batch of images."""
    return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)


def to_pixels(photo: Image.Image) -> Float[Tensor, "3 H W"]:
    """RGB in [0, 1]."""
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1).float().div(255)


def squash(pixels: Float[Tensor, "3 H W"], side: int) -> Float[Tensor, "3 S S"]:
    """Bilinear resize to a square without antialiasing (behaviour.md 9)."""
    return F.interpolate(pixels[None], (side, side), mode="bilinear", align_corners=False)[0]
