"""Small seeded models and photos for tests."""

import numpy as np
import torch
from PIL import Image

from pixelclip.backbones import Backbone, build_backbone
from pixelclip.backbones.catalog import make_card
from pixelclip.backbones.means import Means
from pixelclip.checkpoint import ModelCard

VIT_CONFIG: dict[str, object] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1
    },
}  # fmt: skip


def vit_card(**changes: object) -> ModelCard:
    """Card of a ViT with 16-pixel patches and 16-D features."""
    card = make_card("tiny-vit", VIT_CONFIG, activation="quickgelu", pixels={})
    return card.model_copy(update={"short_side": 64, "square": 64, **changes})


def tiny_vit(seed: int = 0, attention: str = "pixelclip") -> Backbone:
    """The ViT of that card with random weights, drawn without touching the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = build_backbone(vit_card(), attention)
        with torch.no_grad():
            backbone.visual.tower.proj.copy_(torch.randn_like(backbone.visual.tower.proj))
    return backbone


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A photo with coloured patches and noise."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (max(1, height // 12), max(1, width // 12), 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = draw.integers(-20, 20, (height, width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


class Watched(Means):
    """A model on the CPU that tells with how many threads it encodes words."""

    def __init__(self, model: str, seen: list[int]):
        super().__init__(model, device="cpu")
        object.__setattr__(self, "seen", seen)

    def load(self) -> Backbone:
        """The model."""
        backbone = super().load()
        backbone.text.register_forward_pre_hook(
            lambda *_: self.seen.append(torch.get_num_threads())
        )
        return backbone
