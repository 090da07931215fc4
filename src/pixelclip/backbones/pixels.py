"""What every image tower does first: normalise pixels, pad to whole cells."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
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
