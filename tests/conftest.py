"""What all tests share: fixed seeds, folders of their own, no network, tiny models."""

import os
import socket
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from timm.models import register_model

from pixelclip.backbones import Backbone, build_backbone, save_backbone
from pixelclip.backbones.catalog import make_card

SHARED = Path(os.environ.get("PIXELCLIP_SHARED", Path(__file__).parents[2] / "shared"))
TEXT_CONFIG = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


@register_model
def convnext_reference(**options: object) -> torch.nn.Module:
    """The tiny trunk of the reference values: open_clip's configuration cannot say its depths."""
    options = {key: value for key, value in options.items() if not key.startswith("pretrained")}
    return timm.create_model("convnext_base", depths=(1, 1, 2, 1), dims=(16, 32, 64, 96), **options)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "shared: reads the reference values in ../shared")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """The cache of converted weights and text features lies in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIXELCLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
        yield


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    """No address but this machine's is found, and the hub's cache is empty."""
    find = socket.getaddrinfo

    def find_here_only(host, *args, **kwargs):
        if host not in {"localhost", "127.0.0.1", "::1", None}:
            raise socket.gaierror(socket.EAI_NONAME, f"the tests have no network: {host}")
        return find(host, *args, **kwargs)

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", find_here_only)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the reference values and data."""
    if not SHARED.is_dir():
        pytest.skip(f"no reference values in {SHARED}; set PIXELCLIP_SHARED")
    return SHARED


def randomise(backbone: Backbone, seed: int = 0) -> Backbone:
    """Weights large enough that every part of the computation shows in the result."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in backbone.named_parameters():
        if name != "text.logit_scale":
            parameter.normal_(0, 0.3 if parameter.ndim == 1 else 0.15, generator=generator)
    return backbone


@pytest.fixture(scope="session")
def tiny_vit() -> Backbone:
    """A ViT of three layers with 16-pixel patches and LayerScale. Not to be changed: copy it."""
    vision = {"image_size": 64, "patch_size": 16, "layers": 3, "width": 32, "head_width": 16,
              "ls_init_value": 0.5}  # fmt: skip
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT_CONFIG}
    pixels = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
    return randomise(
        build_backbone(make_card("tiny-vit", config, activation="quickgelu", pixels=pixels))
    )


@pytest.fixture(scope="session")
def tiny_convnext() -> Backbone:
    """A ConvNeXt of five blocks. Not to be changed: copy it."""
    vision = {"timm_model_name": "convnext_reference", "timm_pool": "", "timm_proj": "linear",
              "image_size": 64}  # fmt: skip
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT_CONFIG}
    return randomise(
        build_backbone(make_card("tiny-convnext", config, activation="gelu", pixels={}))
    )


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PIXELCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_cache(tmp_path, monkeypatch) -> None:
    """A cache that cannot be written: it would lie under a file."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("PIXELCLIP_CACHE", str(tmp_path / "file" / "cache"))


@pytest.fixture
def run_dir(tmp_path, tiny_vit) -> Path:
    return save_backbone(tiny_vit, tmp_path / "run").parent
