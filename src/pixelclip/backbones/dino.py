"""Dense features of timm's image towers: DINO, DINOv2, DINOv3 and any other that has a map.

They have no text tower, so they are no `Backbone`: they cut photos into regions (`masks.kmeans`)
and lend their features to methods that combine them with a CLIP's.
"""

import difflib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

import timm
import torch
from jaxtyping import Float
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from pixelclip.backbones.pixels import channel_buffer, normalise_and_pad
from pixelclip.backbones.sources import NotInRepository, download
from pixelclip.checkpoint import Share, Spread, State, check_fit, read_json, read_state
from pixelclip.device import choose_device
from pixelclip.errors import ModelError

DINO = "vit_small_patch16_224.dino"  # the authors' (behaviour.md 19a)
DINOS = {
    (384, 16): DINO,
    (384, 8): "vit_small_patch8_224.dino",
    (768, 16): "vit_base_patch16_224.dino",
    (768, 8): "vit_base_patch8_224.dino",
}  # by feature size and pixels per cell
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # as `timm.models.save_for_hf` names them
LARGEST = (
    16_384  # of any number in a file's architecture: a claim costs memory before it is refused
)
DEEPEST = 200
MOST_GROWTH = 8  # times, of a file's values when timm resizes its table of positions
UNFIT = (TypeError, ValueError, RuntimeError, AssertionError, ArithmeticError, AttributeError,
         LookupError)  # fmt: skip # what timm raises where an architecture or an input will not do

_Bounded = Field(ge=-LARGEST, le=LARGEST)
_Depth = Annotated[int, Field(ge=1, le=DEEPEST)]
Value = bool | Annotated[int, _Bounded] | Annotated[float, _Bounded] | str | None


class TimmConfig(BaseModel):
    """What is used of a model's description, timm's own or the `config.json` in a folder.

    Attributes:
        architecture: timm's name of it, without a tag.
        model_args: how it differs from that.
        mean: pixel mean per RGB channel, pixels in [0, 1].
        std: pixel standard deviation per RGB channel.
        classifier: names of layers that features do not need.
    """

    architecture: str
    model_args: dict[str, Value | list[Value]] = {}
    mean: tuple[Share, Share, Share]
    std: tuple[Spread, Spread, Spread]
    classifier: tuple[str, ...] = ()


class _Found(NamedTuple):
    """A model that was found: what it is, and the file of its weights."""

    config: TimmConfig
    weights: Path


class DenseTimm(nn.Module):
    """One of timm's image towers, frozen; `dense` gives a feature per patch or cell.

    Attributes:
        stride: pixels per cell.
        dim: feature size D.
        config: what the weights do not say.
        origin: where the weights come from.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, config: TimmConfig, origin: str) -> None:
        super().__init__()
        self.tower = tower
        self.config = config
        self.origin = origin
        self.register_buffer("mean", channel_buffer(config.mean), persistent=False)
        self.register_buffer("std", channel_buffer(config.std), persistent=False)
        self.eval()
        self.requires_grad_(False)
        self.stride, self.dim = _probed(self, config.architecture)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    def dense(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """The last layer's features with its norm: patch tokens, or a convolution's map.

        h = ceil(H / stride), w = ceil(W / stride); class and register tokens are left out. Not
        normalised to unit length. Positions are interpolated as timm does, with antialiasing;
        DINO's own code (facebookresearch/dino) does without.

        Args:
            images: RGB in [0, 1], of any height and width.
        """
        pixels = normalise_and_pad(images, self.mean, self.std, self.stride)
        return self.last_map(pixels)

    def last_map(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """The same for normalised pixels that fill whole cells."""
        maps = self.tower.forward_intermediates(  # type: ignore[operator]  # nn.Module is untyped
            pixels, indices=1, norm=True, intermediates_only=True
        )
        return maps[-1]


def load_dense(
    name: str = DINO, *, checkpoint: str | Path | None = None, device: str = "auto"
) -> DenseTimm:
    """A timm model for dense features: evaluation mode, frozen, on `device`.

    Args:
        name: timm's name, as `vit_small_patch14_reg4_dinov2.lvd142m` (its weights come from the
            hub, once), `hf-hub:org/name`, or a folder that timm has saved.
        checkpoint: weight file that replaces the named model's, or a folder that timm has saved,
            which says itself of which model it is.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        ModelError: the name is unknown, the weights are missing or do not fit, or the model has
            no dense features.
        ConfigError: the device is not available.
    """
    where = choose_device(device)
    path = None if checkpoint is None else Path(checkpoint)
    if not name.strip():
        raise ModelError(f"no model name; as {DINO}")
    if path is not None and path.is_dir():
        found = _in_folder(path)
    elif Path(name).is_dir():
        found = _in_folder(Path(name), path)
    elif name.startswith("hf-hub:"):
        found = _in_repository(name, path)
    else:
        found = _registered(name, path)
    state = read_state(found.weights)
    with torch.device("meta"):  # sizes that the file does not have cost no memory
        _fitting(_built(found.config), state, found)
    with torch.random.fork_rng(devices=[]):  # layers draw weights that are then replaced
        tower = _built(found.config)
    tower.load_state_dict(_fitting(tower, state, found))
    return DenseTimm(tower, found.config, str(found.weights)).to(where)


def dino_of(checkpoint: str | Path) -> str:
    """Which of DINO's ViTs a weight file is of, by its first layer; ViT-S/16 if it is none of them.

    Raises:
        ModelError: it cannot be read.
    """
    first = read_state(Path(checkpoint)).get("patch_embed.proj.weight")
    if first is None or first.ndim != 4:
        return DINO
    return DINOS.get((first.shape[0], first.shape[-1]), DINO)


def _in_folder(folder: Path, checkpoint: Path | None = None) -> _Found:
    """A model as `timm.models.save_for_hf` leaves it.

    Raises:
        ModelError: it is none.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} has no {CONFIG}; give a folder that timm has saved, or a file")
    config = _read_config(folder / CONFIG, str(folder))
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    weights = checkpoint or found
    if weights is None:
        raise ModelError(f"{folder} has no weights ({' or '.join(WEIGHTS)})")
    return _Found(config, weights)


def _in_repository(name: str, checkpoint: Path | None) -> _Found:
    """`hf-hub:org/name`: the same two files in a repository of the hub."""
    repo = name.removeprefix("hf-hub:")
    config = _read_config(_download(repo, CONFIG), name)
    return _Found(config, checkpoint or _weights_of(repo))


def _weights_of(repo: str) -> Path:
    try:
        return _download(repo, WEIGHTS[0])
    except NotInRepository:
        return _download(repo, WEIGHTS[1])


def _download(repo: str, filename: str) -> Path:
    """`sources.download`, whose advice is for CLIPs, with other advice.

    Raises:
        ModelError: no network, no such repository or file.
    """
    try:
        return download(repo, filename)
    except NotInRepository:
        raise
    except ModelError as error:
        what = str(error).partition(";")[0]
        raise ModelError(
            f"{what}; give a weight file of it, or a folder that timm has saved, or take mini,"
            " which needs none"
        ) from error


def _read_config(path: Path, origin: str) -> TimmConfig:
    """The description beside weights; its older form has everything on one level.

    Raises:
        ModelError: it is missing or is none.
    """
    content = read_json(path)
    pixels = content.get("pretrained_cfg", content)
    values = dict(pixels) if isinstance(pixels, dict) else {}
    values |= {key: content[key] for key in ("architecture", "model_args") if key in content}
    return _checked_config(values, f"{origin}/{CONFIG}")


def _checked_config(values: Mapping[str, object], origin: str) -> TimmConfig:
    """The part of a description that is used.

    Raises:
        ModelError: it is not usable; the message names the field.
    """
    classifier = values.get("classifier") or ()
    parts = (classifier,) if isinstance(classifier, str) else classifier
    try:
        config = TimmConfig.model_validate({**values, "classifier": parts})
        depths = {k: v for k, v in config.model_args.items() if k.startswith("depth")}
        TypeAdapter(dict[str, _Depth | list[_Depth]]).validate_python(depths)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][:2]))
        raise ModelError(f"{origin} is not usable: {where}: {first['msg'].lower()}") from error
    if not timm.is_model(config.architecture):
        raise _unknown(config.architecture)
    # `checkpoint_path` would open a file, with pickled code in it by the older timm.
    if foreign := config.model_args.keys() & inspect.signature(timm.create_model).parameters:
        raise ModelError(f"{origin}: model_args must not hold {', '.join(sorted(foreign))}")
    return config


def _registered(name: str, checkpoint: Path | None) -> _Found:
    """A model of timm's list, with its weights on the hub unless there are others.

    Raises:
        ModelError: there is none of that name, or no weights for it.
    """
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise _unknown(name)
    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # of its tag
        raise _unknown(name) from error
    config = _checked_config(
        {**known.to_dict(), "architecture": architecture}, f"timm's description of {name}"
    )
    if checkpoint is not None:
        return _Found(config, checkpoint)
    if not known.hf_hub_id:
        raise ModelError(f"timm has no weights for {name}; give --checkpoint FILE")
    if known.hf_hub_filename:
        return _Found(config, _download(known.hf_hub_id, known.hf_hub_filename))
    return _Found(config, _weights_of(known.hf_hub_id))


def _unknown(name: str) -> ModelError:
    """The error for a name that is no model, with the nearest names."""
    everything = timm.list_pretrained()
    near = difflib.get_close_matches(name.lower(), everything, n=3, cutoff=0.5)
    hint = f"nearest: {', '.join(near)}" if near else f"a known one: {DINO}"
    return ModelError(
        f"timm has no model {name!r}; {hint}; for weights of your own, give an existing folder"
        " that timm has saved"
    )


def _built(config: TimmConfig) -> nn.Module:
    """The model with random weights and without its classifier.

    A ViT takes photos of other sizes than its own only if told so; most others need no such word.

    Raises:
        ModelError: the architecture cannot be built.
    """
    options = {key: value for key, value in config.model_args.items() if value is not None}
    options |= {"num_classes": 0, "pretrained": False}
    try:
        try:
            return timm.create_model(config.architecture, **options, dynamic_img_size=True)
        except TypeError:
            return timm.create_model(config.architecture, **options)
    except UNFIT as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"cannot build {config.architecture}: {reason[0][:160]}") from error


def _fitting(tower: nn.Module, state: State, found: _Found) -> State:
    """Tensors under timm's names, all that the model has; what belongs to a classifier is left out.

    Raises:
        ModelError: they do not fit, or are damaged.
    """
    expected = tower.state_dict()
    if state.keys() != expected.keys() and _values(expected) <= MOST_GROWTH * _values(state):
        state = _converted(tower, state)
    heads = tuple(f"{layer}." for layer in found.config.classifier)
    state = {k: v for k, v in state.items() if k in expected or not (heads and k.startswith(heads))}
    check_fit(expected, state, f"{found.weights} ({found.config.architecture})")
    broken = [key for key, tensor in state.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise ModelError(
            f"{found.weights} is damaged: {broken[0]} holds values that are no numbers"
        )
    return state


def _values(state: State) -> int:
    """Numbers in all tensors."""
    return sum(tensor.numel() for tensor in state.values())


def _converted(tower: nn.Module, state: State) -> State:
    """The tensors under timm's names, where timm knows those that the authors of a model gave."""
    convert = getattr(sys.modules[type(tower).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        converted: State = convert(dict(state), tower)
    except UNFIT:  # it is of something else, and `check_fit` says of what
        return state
    return converted


def _probed(model: DenseTimm, architecture: str) -> tuple[int, int]:
    """Pixels per cell and feature size, tried on an input of 2 x 3 cells.

    Raises:
        ModelError: it gives no map of that shape, or one of no numbers.
    """
    try:
        stride = int(model.tower.feature_info[-1]["reduction"])  # type: ignore[index]
        with torch.no_grad():
            cells = model.last_map(torch.zeros(1, 3, 2 * stride, 3 * stride))
        if cells.shape[2:] != (2, 3):
            raise ValueError(f"a map of {tuple(cells.shape)}")
        if not bool(cells.isfinite().all()):
            raise ModelError(f"{model.origin} is damaged: its features are no numbers")
    except UNFIT as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{architecture} has no dense features for photos of any size ({reason[0][:160]});"
            f" take a ViT or a convolutional network, as {DINO}"
        ) from error
    return stride, int(cells.shape[1])
