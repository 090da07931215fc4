"""One interface to every image and text tower: `load_backbone(name)`.

Adding a family: a module whose visual part is an `nn.Module` with `stride`, `dim`, a dense
`forward` and `pooled`, and one line in `BACKBONES`.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pixelclip.checkpoint import (
    ModelCard,
    State,
    check_fit,
    read_card,
    write_checkpoint,
)
from pixelclip.device import choose_device
from pixelclip.errors import ConfigError, ModelError

__all__ = ["BACKBONES", "Backbone", "load_backbone", "save_backbone"]


@runtime_checkable
class Visual(Protocol):
    """What `Backbone.visual` offers beside its forward, which is dense."""

    stride: int
    dim: int

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """Dense features, not normalised."""

    def pooled(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """One embedding per image, not normalised."""


@runtime_checkable
class Text(Protocol):
    """What `Backbone.text` offers."""

    dim: int

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens."""

    @property
    def temperature(self) -> float:
        """Factor on cosines before a softmax over classes, as the model was trained."""

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "N L"]:
        """Token ids up to the longest text."""

    def embed(self, tokens: Int[Tensor, "N L"]) -> Float[Tensor, "N L E"]:
        """Token embeddings."""

    def __call__(
        self, tokens: Int[Tensor, "N L"], embeddings: Float[Tensor, "N L E"] | None = None
    ) -> Float[Tensor, "N D"]:
        """Text features, not normalised."""


class Backbone(nn.Module):
    """An image tower that gives a feature per cell, and the text tower it is aligned with.

    Attributes:
        visual: forward is dense; a momentum teacher is `copy.deepcopy(backbone.visual)`.
        text: frozen everywhere.
        card: name, architecture, pixel statistics and defaults.
        origin: where the weights come from: a name, a hub file or a path.
    """

    origin: str = "random"

    def __init__(self, visual: nn.Module, text: nn.Module, card: ModelCard):
        super().__init__()
        self.visual = visual
        self.text = text
        self.card = card
        self.eval()
        self.requires_grad_(False)

    @property
    def stride(self) -> int:
        """Pixels per feature cell."""
        return int(self.visual.stride)  # type: ignore[arg-type]  # nn.Module is untyped

    @property
    def dim(self) -> int:
        """Feature size D."""
        return int(self.visual.dim)  # type: ignore[arg-type]

    @property
    def temperature(self) -> float:
        """Factor on cosines before a softmax over classes, for confidences."""
        return float(self.text.temperature)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return next(self.visual.parameters()).dtype

    @cached_property
    def text_hash(self) -> str:
        """Hash of the text tower, which is frozen: the same towers encode texts the same."""
        return weights_hash(self.text)

    def dense(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """Dense features, not normalised; h = ceil(H / stride), w = ceil(W / stride).

        Args:
            images: RGB in [0, 1]; normalised and padded inside.
        """
        return self.visual(images)

    def pooled(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """The model's ordinary image embedding, not normalised."""
        return self.visual.pooled(images)  # type: ignore[operator]


def _open_clip(card: ModelCard, attention: str) -> Backbone:
    from pixelclip.backbones.open_clip_models import build

    return build(card, attention)


def _mini(card: ModelCard, attention: str) -> Backbone:
    from pixelclip.backbones.mini import build

    return build(card, attention)


BACKBONES: dict[str, Callable[[ModelCard, str], Backbone]] = {
    "vit": _open_clip,
    "convnext": _open_clip,
    "mini": _mini,
}


PROMPTS = "prompts."  # what a run learned beside the image tower; not needed to segment
PACKAGED = "text.bert."  # frozen and in a package: not part of checkpoints


def build_backbone(card: ModelCard, attention: str = "pixelclip") -> Backbone:
    """A backbone of that card with weights yet to be filled in.

    Raises:
        ModelError: the card names an unknown family.
    """
    if card.family not in BACKBONES:
        raise ModelError(f"unknown family {card.family!r}; available: {', '.join(BACKBONES)}")
    return BACKBONES[card.family](card, attention)


def load_backbone(
    name: str = "mini",
    *,
    checkpoint: str | Path | None = None,
    device: str = "auto",
    attention: str = "pixelclip",
) -> Backbone:
    """The model of that name, ready to use: evaluation mode, frozen, on `device`.

    Args:
        name: `mini`, `pixelclip-vit-b16`, `ViT-B-16/openai`, `hf-hub:org/repo`, a weight file,
            a run directory; `pixelclip models` lists the names.
        checkpoint: weight file or run directory that replaces the weights of the named model,
            which are then neither needed nor downloaded.
        device: auto, cpu, cuda, cuda:N or mps.
        attention: what the last block of a ViT does: pixelclip, plain, maskclip, sclip, naclip
            or clearclip.

    Raises:
        ModelError: the name is unknown, or the weights are missing or do not fit.
        ConfigError: the device or the attention is not available.
    """
    from pixelclip.backbones import sources

    where = choose_device(device)
    source = sources.resolve(name, weights_wanted=checkpoint is None)
    if attention != "pixelclip" and source.card.family != "vit":
        from pixelclip.backbones.vit import check_attention

        check_attention(attention)
        raise ConfigError(f"--attention {attention} needs a ViT; {name} is a {source.card.family}")
    card = source.card
    if checkpoint is None:
        state, origin = source.read(), source.origin
    else:
        path = sources.weight_file(Path(checkpoint))
        card = _checked_card(card, read_card(path), path)
        state, origin = sources.read_any(path, card), str(path)
    backbone = build_backbone(card, attention)
    if state is not None:
        _fill(backbone, _completed(backbone, state), origin)
        backbone.origin = origin
        if card.base and backbone.text_hash != card.text_hash:
            raise ModelError(f"{origin} was trained with another text tower than {card.base} has")
    return backbone.to(where)


def _completed(backbone: Backbone, state: State) -> State:
    """The image tower of a run, completed with the text tower of the model it started from."""
    state = {key: value for key, value in state.items() if not key.startswith(PROMPTS)}
    missing = {key for key in exported_state(backbone) if not key.startswith("visual.")} - set(
        state
    )
    if not backbone.card.base or not missing:
        return state
    from pixelclip.backbones import sources

    base = sources.resolve(backbone.card.base).read() or {}
    return state | {key: base[key] for key in missing if key in base}


def _checked_card(card: ModelCard, found: ModelCard | None, path: Path) -> ModelCard:
    """Card for `path` in the place of the named model's weights.

    Raises:
        ModelError: the checkpoint is of another architecture or activation.
    """
    if found is None:
        return card
    for field in ("family", "activation", "config"):
        ours, theirs = getattr(card, field), getattr(found, field)
        if ours != theirs:
            detail = f"{theirs}, not {ours}" if field != "config" else "another architecture"
            raise ModelError(
                f"{path} does not fit {card.name}: its {field} is {detail};"
                f" use --model {path} alone"
            )
    return found


def _fill(backbone: Backbone, state: State, origin: object) -> None:
    """Load tensors under open_clip's names (or mini's own), strictly."""
    expected = exported_state(backbone)
    dead = ("attn_mask", "input_resolution", "context_length", "vocab_size")
    found = {key: value for key, value in state.items() if key not in dead}
    check_fit(expected, found, origin)
    broken = [key for key, tensor in found.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise ModelError(f"{origin} is damaged: {broken[0]} holds values that are no numbers")
    with torch.no_grad():
        for key, tensor in expected.items():
            tensor.copy_(found[key])


def exported_state(backbone: Backbone) -> State:
    """The weights under the names in which they are stored.

    For a CLIP these are open_clip's own names, so that other tools read our checkpoints. The text
    tower that comes from a package is left out, and so are counters that evaluation never reads.
    """
    return {
        key.replace("visual.tower.", "visual.", 1).removeprefix("text."): value
        for key, value in backbone.state_dict(keep_vars=False).items()
        if not key.startswith(PACKAGED) and not key.endswith(".num_batches_tracked")
    }


def save_backbone(
    backbone: Backbone,
    path: str | Path,
    *,
    card: ModelCard | None = None,
    prompts: State | None = None,
) -> Path:
    """Write a checkpoint that `load_backbone(str(path))` reads.

    Args:
        backbone: its weights and card are stored.
        path: a file that ends in .safetensors, or a folder for `model.safetensors`.
        card: instead of the backbone's own; where it names a base, the text tower is left out.
        prompts: learned beside the image tower, by name.

    Raises:
        ModelError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        target = target / "model.safetensors"
    card = card or backbone.card
    state = exported_state(backbone)
    if card.base:
        state = {key: value for key, value in state.items() if key.startswith("visual.")}
    state |= {PROMPTS + name: value for name, value in (prompts or {}).items()}
    write_checkpoint(target, state, card)
    return target


def weights_hash(module: nn.Module) -> str:
    """Hash of a module's tensors, names included."""
    digest = hashlib.blake2b(type(module).__name__.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        values = tensor.detach().cpu().flatten()  # in one order, whatever the memory format
        digest.update(values.numpy().tobytes() if tensor.ndim else str(tensor.item()).encode())
    return digest.hexdigest()
