"""Dense features of open_clip's ConvNeXt (a timm trunk), as the authors take them."""

from jaxtyping import Float
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from pixelclip.backbones.pixels import channel_buffer, normalise_and_pad


class DenseConvNeXt(nn.Module):
    """A ConvNeXt tower whose forward gives a feature per 32 x 32 pixels.

    The trunk head's LayerNorm is applied at every position instead of after pooling, then the
    projection (behaviour.md 7a); hence the mean of the dense map is not the pooled embedding.
    """

    stride = 32
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        tower: TimmModel,
        *,
        dim: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ):
        super().__init__()
        self.tower = tower
        self.dim = dim
        self.register_buffer("mean", channel_buffer(mean), persistent=False)
        self.register_buffer("std", channel_buffer(std), persistent=False)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """Dense features, not normalised; h = ceil(H / 32), w = ceil(W / 32).

        Args:
            images: RGB in [0, 1], of any height and width.
        """
        maps = self.tower.trunk.head.norm(self.trunk_features(images))  # [B, C, h, w]
        return self.tower.head(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def trunk_features(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Output of the trunk before its last norm."""
        pixels = normalise_and_pad(images, self.mean, self.std, self.stride)
        return self.tower.trunk.forward_features(pixels)

    def pooled(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Ordinary CLIP image embedding (average pooling, norm, projection), not normalised."""
        return self.tower.head(self.tower.trunk.forward_head(self.trunk_features(images)))
