"""Tiny towers of timm's, saved as a user saves his own."""

from pathlib import Path

import timm
import torch
from torch import nn

SMALL_VIT: dict[str, object] = {"embed_dim": 24, "depth": 2, "num_heads": 2}
TOWERS: dict[str, tuple[str, dict[str, object]]] = {
    "dino": ("vit_small_patch16_224.dino", SMALL_VIT),
    "dinov2": ("vit_small_patch14_reg4_dinov2.lvd142m", SMALL_VIT | {"img_size": 56}),
    "dinov3": ("vit_small_patch16_dinov3.lvd1689m", SMALL_VIT),
    "convnext": ("convnext_tiny.dinov3_lvd1689m", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 24)}),
    "resnet": ("resnet18.a1_in1k", {"channels": (8, 8, 16, 24)}),
}  # fmt: skip


def tower(kind: str, seed: int = 0, **options: object) -> nn.Module:
    """A tower of that kind with random weights, drawn without touching the global generator."""
    name, arguments = TOWERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(name, **arguments, **options).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:  # positions and tokens are nearly zero at first
                    parameter.normal_(0, 0.2)
    return model


def save_tower(folder: Path, kind: str, seed: int = 0, *, safe: bool = True) -> Path:
    """A folder with a tower, as timm writes it."""
    timm.models.save_for_hf(
        tower(kind, seed), folder, model_args=TOWERS[kind][1], safe_serialization=safe
    )
    return folder
