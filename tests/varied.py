"""A tiny model whose labels vary over a photo, which random weights' do not."""

import torch
from torch import Tensor, nn

from pixelclip.backbones import Backbone
from tests.tiny import tiny_vit


class Centred(nn.Module):
    """A tower's features less their mean: what they share would decide every pixel alike."""

    def __init__(self, visual: nn.Module):
        super().__init__()
        self.visual = visual
        self.stride, self.dim, self.attention = visual.stride, visual.dim, "centred"

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.visual(images)
        return features - features.mean(dim=(2, 3), keepdim=True)


def varied_vit(seed: int = 0) -> Backbone:
    """`tiny_vit` with centred features; deterministic."""
    backbone = tiny_vit(seed)
    with torch.no_grad():
        return Backbone(Centred(backbone.visual), backbone.text, backbone.card)
