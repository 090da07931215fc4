"""Reading and writing weight files: ours, open_clip's, the authors'.

Nothing in a file is ever run: safetensors, or `torch.load` with `weights_only=True`.
The format of ours is specified in `docs/formats.md`.
"""

import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixelclip.errors import ModelError
from pixelclip.files import replacing

State = dict[str, Tensor]

Share = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(gt=0, le=1)]

FORMAT_VERSION = "1"


class ModelCard(BaseModel):
    """What a weight file needs beside its tensors to be built again.

    Attributes:
        name: what `--model` was, or the name of the run.
        family: key of `BACKBONES`: vit, convnext or mini.
        config: architecture: open_clip's model configuration; for mini, `MiniConfig`.
        activation: quickgelu or gelu; a wrong one costs accuracy in silence, so it is checked.
        mean: pixel mean per RGB channel, pixels in [0, 1].
        std: pixel standard deviation per RGB channel.
        short_side: network input used by default, in pixels, for the photo's shorter side.
        square: network input of the authors' protocol, in pixels (behaviour.md 9).
        templates: name of the built-in template set used by default.
        licence: of the weights, as far as known.
        base: model whose text tower belongs to these weights, where the file leaves it out.
        text_hash: of that text tower.
        training: how the weights were trained, if here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    family: str
    config: dict[str, object] = {}
    activation: Literal["gelu", "quickgelu"] = "gelu"
    mean: tuple[Share, Share, Share]
    std: tuple[Spread, Spread, Spread]
    short_side: int = Field(336, ge=16, le=8192)
    square: int = Field(320, ge=16, le=8192)
    templates: str = "imagenet-select"
    licence: str = "unknown"
    base: str = ""
    text_hash: str = ""
    training: dict[str, object] = {}


def cache_dir() -> Path:
    """Folder for converted weights and text features: `PIXELCLIP_CACHE` or the user's cache."""
    if folder := os.environ.get("PIXELCLIP_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pixelclip"


def write_safetensors(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors under a temporary name, then rename: readers never see half a file."""
    with replacing(path) as part:
        save_file(_apart(state), part, metadata=metadata)


def _apart(state: Mapping[str, Tensor]) -> State:
    """The tensors on the CPU, none sharing memory with another, which safetensors refuses."""
    apart: State = {}
    taken: set[int] = set()
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in taken:
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        apart[key] = tensor
    return apart


def write_checkpoint(path: Path, state: Mapping[str, Tensor], card: ModelCard) -> None:
    """Write a checkpoint of ours: tensors and card in one safetensors file.

    Raises:
        ModelError: the file cannot be written.
    """
    metadata = {"format": "pixelclip", "version": FORMAT_VERSION, "card": card.model_dump_json()}
    try:
        write_safetensors(path, state, metadata)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot write {path}: {error}") from error


def read_card(path: Path) -> ModelCard | None:
    """The card of a checkpoint of ours, or None for any other weight file.

    Raises:
        ModelError: the file says it is ours, but its card cannot be used.
    """
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
    if metadata.get("format") != "pixelclip":
        return None
    if metadata.get("version") != FORMAT_VERSION:
        raise ModelError(
            f"{path} has checkpoint version {metadata.get('version')}; this program reads"
            f" version {FORMAT_VERSION}: update pixelclip"
        )
    try:
        return ModelCard.model_validate_json(metadata.get("card", ""))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "card"
        raise ModelError(f"{path} has a broken card: {where}: {first['msg']}") from error


def read_state(path: Path) -> State:
    """The tensors of a weight file, unwrapped from `state_dict`, `model` and `module.`.

    Raises:
        ModelError: the file is missing, broken, wants to run code, or holds no tensors.
    """
    if not path.is_file():
        raise ModelError(f"no such weight file: {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
    return _only_tensors(_load_pickle(path), path)


def _load_pickle(path: Path) -> object:
    """Load a `.pt` or `.pth` file without running anything in it."""
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped and _holds_code(path):
            raise ModelError(
                f"{path} is a TorchScript archive, which holds code; save its state_dict(), or"
                " name the model by its tag, as in ViT-B-16/openai"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch finds unusual, it still reads or refuses
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and "Unsupported operand" not in str(error):
            raise ModelError(
                f"{path} was refused: it holds more than tensors and would run code when loaded; "
                "ask its author for a state dict or a safetensors file"
            ) from error
        raise ModelError(f"{path} is not a weight file, or is damaged") from error
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle raises anything
        line = str(error).strip().splitlines()
        detail = f": {line[0][:160]}" if line else ""
        raise ModelError(f"{path} is not a weight file, or is damaged{detail}") from error


def _holds_code(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _only_tensors(content: object, path: Path) -> State:
    """Unwrap the usual containers and keep the tensors."""
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise ModelError(f"{path} holds no state dict (found {type(content).__name__})")
    state = {
        str(key).removeprefix("module."): value
        for key, value in content.items()
        if isinstance(value, Tensor)
    }
    if not state:
        raise ModelError(f"{path} holds no tensors")
    return state


def check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: object) -> None:
    """Compare names and shapes.

    Raises:
        ModelError: tensors are missing, have another shape, or have no place; they are named.
    """
    shapes = {key: tuple(value.shape) for key, value in expected.items()}
    missing = sorted(shapes.keys() - state.keys())
    unknown = sorted(state.keys() - shapes.keys())
    misshapen = [
        f"{key} is {tuple(state[key].shape)} but should be {shape}"
        for key, shape in shapes.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    problems = [
        f"{what} {_some(names)}"
        for what, names in (
            ("missing", missing),
            ("misshapen:", misshapen),
            ("without a place:", unknown),
        )
        if names
    ]
    if problems:
        raise ModelError(f"{path} does not fit this model: {'; '.join(problems)}")


def _some(names: list[str], limit: int = 3) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        ModelError: the file is missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return content
