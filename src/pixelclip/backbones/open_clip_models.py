"""Building open_clip's CLIPs from a card, without weights."""

from open_clip.model import CLIP
from open_clip.timm_model import TimmModel
from torch import nn

from pixelclip.backbones import Backbone
from pixelclip.backbones.catalog import refusal
from pixelclip.backbones.convnext import DenseConvNeXt
from pixelclip.backbones.text import ClipText
from pixelclip.backbones.vit import DenseViT
from pixelclip.checkpoint import ModelCard
from pixelclip.errors import ModelError


def build(card: ModelCard, attention: str) -> Backbone:
    """A CLIP of that card, with random weights.

    Raises:
        ModelError: the configuration of the card cannot be built.
    """
    if reason := refusal(card.config):
        raise ModelError(f"{card.name} cannot segment here: {reason}; see pixelclip models")
    vision = card.config["vision_cfg"]
    assert isinstance(vision, dict)
    if "timm_model_name" in vision:
        vision = {**vision, "timm_model_pretrained": False}  # building downloads nothing
    try:
        clip = CLIP(
            **{**card.config, "vision_cfg": vision}, quick_gelu=card.activation == "quickgelu"
        )
    except (
        TypeError,
        ValueError,
        RuntimeError,
        AssertionError,
        ArithmeticError,
        AttributeError,
        LookupError,
    ) as error:
        reason = str(error) or type(error).__name__
        raise ModelError(f"cannot build {card.name}: {reason}") from error
    tower = clip.visual
    visual: nn.Module
    if isinstance(tower, TimmModel):
        dim = int(card.config["embed_dim"])  # type: ignore[call-overload]
        visual = DenseConvNeXt(tower, dim=dim, mean=card.mean, std=card.std)
    else:
        visual = DenseViT(tower, mean=card.mean, std=card.std, attention=attention)
    return Backbone(visual, ClipText(clip), card)
