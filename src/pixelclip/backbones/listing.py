"""The table behind `pixelclip models`."""

import json
from importlib.resources import files
from typing import TypedDict

from huggingface_hub import try_to_load_from_cache
from open_clip.pretrained import get_pretrained_cfg

from pixelclip.backbones import catalog
from pixelclip.backbones.sources import HUB_FILES


class ModelRow(TypedDict):
    """One model that can be loaded by name."""

    name: str
    parameters: int
    licence: str
    cached: bool


def list_models() -> list[ModelRow]:
    """Every model with a name: ours, the authors', open_clip's."""
    text = files("pixelclip").joinpath("data/parameters.json").read_text("utf-8")
    sizes: dict[str, int] = json.loads(text)
    rows = [_row(name, sizes["mini"], cached=True) for name in catalog.LOCAL]
    for name, published in catalog.PUBLISHED.items():
        cached = _is_cached(catalog.PUBLISHED_REPO, (published.filename,))
        rows.append(_row(name, sizes[published.architecture], cached=cached))
    for name in catalog.open_clip_names():
        architecture, _, tag = name.partition("/")
        hub = str(get_pretrained_cfg(architecture, tag).get("hf_hub", ""))
        repo, _, filename = hub.rpartition("/")
        cached = bool(repo) and _is_cached(repo, (filename,) if filename else HUB_FILES)
        rows.append(_row(name, sizes.get(architecture, 0), cached=cached))
    return rows


def _row(name: str, parameters: int, *, cached: bool) -> ModelRow:
    licence = catalog.licence(name)
    return ModelRow(name=name, parameters=parameters, licence=licence, cached=cached)


def _is_cached(repo: str, filenames: tuple[str, ...]) -> bool:
    return any(isinstance(try_to_load_from_cache(repo, name), str) for name in filenames)
