"""Mask sources by name. To add one: a module with settings and a callable, and a line here."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from pydantic import BaseModel

from pixelclip.config import parse_value, validated
from pixelclip.errors import ConfigError, ModelError
from pixelclip.masks.runs import PhotoMasks


@runtime_checkable
class MaskSource(Protocol):
    """Makes class-agnostic masks; every worker process makes its own from the settings.

    Attributes:
        batch_size: photos it likes to be given at once.
    """

    batch_size: int

    def __call__(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> list[PhotoMasks]:
        """The masks of upright photos, each in the photo's own pixels.

        A photo's masks do not depend on the others it comes with.

        Raises:
            DataError: no masks can be made of one of the photos.
        """
        ...


class SourceKind(NamedTuple):
    """A source before it is set up.

    Attributes:
        settings: a frozen pydantic model, every field documented; `checkpoint`, if it has one,
            is a path that the user gave.
        make: settings and a device (`auto`, `cpu`, `cuda`, ...) to the source.
        is_light: its models are small or none, so that a process per core is the quickest; others
            keep all cores, or the GPU, busy by themselves.
    """

    settings: type[BaseModel]
    make: Callable[..., MaskSource]
    is_light: bool = False


def _superpixels() -> SourceKind:
    from pixelclip.masks.superpixels import Superpixels, SuperpixelSettings

    return SourceKind(SuperpixelSettings, Superpixels, is_light=True)


def _dino() -> SourceKind:
    from pixelclip.masks.kmeans import DinoMasks, DinoSettings

    return SourceKind(DinoSettings, DinoMasks)


def _mini() -> SourceKind:
    from pixelclip.masks.kmeans import MiniMasks, MiniSettings

    return SourceKind(MiniSettings, MiniMasks, is_light=True)


def _sam() -> SourceKind:
    from pixelclip.masks.sam import SamMasks, SamSettings

    return SourceKind(SamSettings, SamMasks)


MASK_SOURCES: dict[str, Callable[[], SourceKind]] = {
    "superpixels": _superpixels,
    "dino": _dino,
    "mini": _mini,
    "sam": _sam,
}


def find_source(name: str) -> SourceKind:
    """The source of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in MASK_SOURCES:
        raise ConfigError(f"unknown source {name!r}; available: {', '.join(MASK_SOURCES)}")
    return MASK_SOURCES[name]()


def source_settings(name: str, values: Mapping[str, object]) -> BaseModel:
    """Settings of a source from values by field; texts are read as TOML where they are some.

    Raises:
        ConfigError: the source is unknown, or a value is not allowed.
    """
    settings = find_source(name).settings
    parsed = {key: parse_value(value) for key, value in values.items()}
    return validated(settings, parsed, f"source {name}: ")


def described(settings: BaseModel) -> dict[str, object]:
    """Settings as a manifest has them: of files not the path, but a hash of their content.

    Raises:
        ModelError: a checkpoint cannot be read.
    """
    values = settings.model_dump(mode="json")
    checkpoint = values.pop("checkpoint", None)
    if checkpoint is not None:
        values["checkpoint_sha256"] = _sha256(Path(checkpoint))
    model = values.get("model")
    if isinstance(model, str) and Path(model).exists():
        values["model_sha256"] = _sha256(Path(model))
        del values["model"]
    return values


def _sha256(path: Path) -> str:
    """Of a file, or of the files in a folder and their names."""
    digest = hashlib.sha256()
    try:
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        for file in files:
            if path.is_dir():
                digest.update(file.name.encode("utf-8", "surrogateescape"))
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()
