"""Which models have a name: open_clip's plain ViTs and ConvNeXts, the authors', ours.

open_clip is imported where it is asked, as that takes seconds which the offline model can spare.
Only architectures whose dense path we know are here. A plain ViT has a class token, a learned
position table and CLIP's own causal text tower; everything else is refused by name.
"""

import difflib
from typing import NamedTuple

from pixelclip.checkpoint import ModelCard
from pixelclip.errors import ModelError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

PLAIN_VISION = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio",
                "ls_init_value", "patch_dropout"}  # fmt: skip
# No real model is larger; a file that claims more would cost memory before it is refused.
LARGEST = {"image_size": 4096, "layers": 200, "width": 16384, "patch_size": 1024,
           "head_width": 4096, "heads": 1024, "context_length": 4096, "vocab_size": 1_000_000,
           "embed_dim": 16384}  # fmt: skip
PLAIN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers"}


class Published(NamedTuple):
    """One of the authors' models: file in their hub repository and what it was made from."""

    filename: str
    architecture: str
    activation: str


PUBLISHED_REPO = "hsshin98/PixelCLIP"
PUBLISHED = {
    "pixelclip-vit-b16": Published("weights/pixelclip_vit_base.pth", "ViT-B-16", "quickgelu"),
    "pixelclip-vit-b16-dino": Published(
        "weights/pixelclip_vit_base_dino.pth", "ViT-B-16", "quickgelu"
    ),
    "pixelclip-convnext-b": Published(
        "weights/pixelclip_convnext_base.pth", "convnext_base_w_320", "gelu"
    ),
    "pixelclip-convnext-b-dino": Published(
        "weights/pixelclip_convnext_base_dino.pth", "convnext_base_w_320", "gelu"
    ),
}
LOCAL = ("mini", "mini-base")


def refusal(config: dict[str, object]) -> str | None:
    """Why an open_clip architecture has no dense path here, or None if it has one."""
    vision, text = config.get("vision_cfg"), config.get("text_cfg")
    if not isinstance(vision, dict) or not isinstance(text, dict):
        return "its configuration lacks vision_cfg or text_cfg"
    if config.get("custom_text") or set(text) - PLAIN_TEXT:
        return "its text tower is not CLIP's own"
    trunk = str(vision.get("timm_model_name", ""))
    if trunk and not trunk.startswith("convnext"):
        return f"its trunk {trunk} is not a ConvNeXt"
    if isinstance(vision.get("layers"), list):
        return "its image tower is a ResNet"
    sizes = {**text, "embed_dim": config.get("embed_dim")}
    sizes |= {} if trunk else {key: size for key, size in vision.items() if key in LARGEST}
    if any(type(size) is not int or not 1 <= size <= LARGEST[key] for key, size in sizes.items()):
        return "its sizes are not whole numbers in a sensible range"
    if not trunk and set(vision) - PLAIN_VISION:
        return "its image tower is not a plain ViT"
    return None


def open_clip_names() -> list[str]:
    """`architecture/tag` of every open_clip model that can be loaded."""
    import open_clip

    return [
        f"{architecture}/{tag}"
        for architecture, tag in open_clip.list_pretrained()
        if not architecture.endswith("-quickgelu")
        and refusal(open_clip.get_model_config(architecture)) is None
    ]


def architecture_config(architecture: str) -> dict[str, object]:
    """open_clip's configuration of an architecture we can use.

    Raises:
        ModelError: the architecture is unknown, or has no dense path here.
    """
    import open_clip

    config = open_clip.get_model_config(architecture)
    if config is None:
        raise unknown_model(architecture)
    if reason := refusal(config):
        raise ModelError(f"{architecture} cannot segment here: {reason}; see pixelclip models")
    return dict(config)


def open_clip_card(architecture: str, tag: str | None) -> ModelCard:
    """Card of an open_clip model; the activation comes from the tag.

    Raises:
        ModelError: architecture or tag is unknown, or the two contradict each other.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    config = architecture_config(architecture)
    pretrained: dict[str, object] = {}
    quick = bool(config.get("quick_gelu", False))
    if tag is not None:
        pretrained = get_pretrained_cfg(architecture, tag)
        if not pretrained:
            tags = open_clip.list_pretrained_tags_by_model(architecture)
            raise ModelError(
                f"{architecture} has no weights {tag!r}; available: {', '.join(tags) or 'none'}"
            )
        if quick and not pretrained.get("quick_gelu", False):
            raise ModelError(
                f"{architecture} computes QuickGELU, but {tag} was trained with GELU;"
                f" use {architecture.removesuffix('-quickgelu')}/{tag}"
            )
        quick = bool(pretrained.get("quick_gelu", False))
    return make_card(
        f"{architecture}/{tag}" if tag else architecture,
        config,
        activation="quickgelu" if quick else "gelu",
        pixels=pretrained,
    )


def make_card(
    name: str, config: dict[str, object], *, activation: str, pixels: dict[str, object]
) -> ModelCard:
    """Card of an open_clip architecture with the pixel mean and std of its weights."""
    vision = config["vision_cfg"]
    assert isinstance(vision, dict)
    convnext = "timm_model_name" in vision
    architecture = {key: value for key, value in config.items() if key != "quick_gelu"}
    return ModelCard.model_validate(
        {
            "name": name,
            "family": "convnext" if convnext else "vit",
            "config": architecture,
            "activation": activation,
            "mean": pixels.get("mean") or CLIP_MEAN,
            "std": pixels.get("std") or CLIP_STD,
            "short_side": 640 if convnext else 336,
            "square": 640 if convnext else 320,
            "licence": licence(name) if pixels.get("hf_hub") else "unknown",
        }
    )


def licence(name: str) -> str:
    """Licence of weights as their publisher states it, for names that `pixelclip models` lists."""
    if name in LOCAL:
        return "Apache-2.0 parts; alignment for research use"
    if name.startswith("pixelclip-"):
        return "not stated in the files"
    tag = name.partition("/")[2]
    if tag.startswith("dfn"):
        return "Apple AMLR (research)"
    if tag.startswith("metaclip"):
        return "CC BY-NC 4.0"
    known = ("openai", "laion", "datacomp", "commonpool")
    return "MIT" if tag.startswith(known) else "unknown"


def unknown_model(name: str) -> ModelError:
    """The error for a name that is no model, with the nearest names."""
    everything = [*LOCAL, *PUBLISHED, *open_clip_names()]
    lowered = {known.lower(): known for known in everything}
    near = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.4)
    hint = ", ".join(lowered[n] for n in near) if near else "mini, pixelclip-vit-b16"
    return ModelError(
        f"unknown model {name!r}; nearest: {hint} (all: pixelclip models); for weights of your"
        " own, give an existing file or folder"
    )
