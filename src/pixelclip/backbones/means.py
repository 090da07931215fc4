"""A model as it is asked for, and what tells it from every other once it is loaded."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from pixelclip.backbones import Backbone, load_backbone, weights_hash

# Of `Segmenter.description()`: weights are told by their hash, wherever they lie; a photo that is
# refused for its size has no result to tell.
_FREE = {"weights", "max_pixels"}
_TELLING = {"family", "config", "activation", "mean", "std"}  # of a card


@dataclass(frozen=True)
class Means:
    """What photos are segmented with; goes to worker processes.

    Attributes:
        model: name, weight file or run directory.
        checkpoint: weights that replace the model's.
        device: auto, cpu, cuda, cuda:N or mps.
        attention: last block of a ViT.
    """

    model: str
    checkpoint: Path | None = None
    device: str = "auto"
    attention: str = "pixelclip"

    def load(self) -> Backbone:
        """The model.

        Raises:
            ConfigError: the device or the attention is not available.
            ModelError: it cannot be loaded.
        """
        return load_backbone(
            self.model, checkpoint=self.checkpoint, device=self.device, attention=self.attention
        )


def fingerprint(backbone: Backbone) -> str:
    """A hash of the weights of both towers, as a run's `run.json` has it."""
    return weights_hash(backbone.visual)[:32] + backbone.text_hash[:32]


def all_that_tells(backbone: Backbone) -> str:
    """A hash of all that decides a model's features: weights, card, numbers of its parts.

    Numbers are what modules keep as `attention`, `settings` or `config`: those of a rival, of the
    masks it averages in, of the tower that guides it and of the model below it; a last block; and
    mini's, which a rival may change.
    """
    numbers = [
        (name, key, value.model_dump(mode="json") if isinstance(value, BaseModel) else value)
        for name, module in backbone.named_modules()
        for key in ("attention", "settings", "config")
        if isinstance(value := getattr(module, key, None), BaseModel | str)
    ]
    card = backbone.card.model_dump(mode="json", include=_TELLING)
    return _hash([fingerprint(backbone), card, numbers])


def identity_of(model: str, described: Mapping[str, object], **more: object) -> str:
    """A hash of all that decides what comes of a photo.

    Args:
        model: hash by `all_that_tells`.
        described: `Segmenter.description()`.
        more: what else decides; names of the description that do not are given as None.
    """
    known = {name: value for name, value in described.items() if name not in _FREE}
    return _hash({**known, "model": model, **more})


def _hash(what: object) -> str:
    return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()
