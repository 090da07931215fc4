"""Our checkpoints: what is in them, what other tools make of them, what a failure leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pixelclip.backbones import (
    Backbone,
    build_backbone,
    exported_state,
    load_backbone,
    save_backbone,
)
from pixelclip.checkpoint import FORMAT_VERSION, ModelCard, read_card, read_state, write_checkpoint
from pixelclip.errors import ModelError

CARD = ModelCard(
    name="mine",
    family="vit",
    config={"embed_dim": 8, "vision_cfg": {"patch_size": 16, "layers": 2, "mlp_ratio": 4.0}},
    activation="quickgelu",
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
    short_side=448,
    square=224,
    templates="single",
    licence="MIT",
)
STATE = {"weight": torch.arange(6.0).reshape(2, 3), "scale": torch.tensor(2.5)}


@pytest.fixture(params=["tiny_vit", "tiny_convnext"])
def tiny(request) -> Backbone:
    return request.getfixturevalue(request.param)


def write_metadata(path: Path, **metadata: str) -> Path:
    save_file(STATE, path, metadata=metadata)
    return path


def test_card_comes_back_as_written(tmp_path):
    write_checkpoint(tmp_path / "model.safetensors", STATE, CARD)
    assert read_card(tmp_path / "model.safetensors") == CARD


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_tensors_come_back_to_the_last_bit(tmp_path, dtype):
    state = {"weight": torch.randn(5, 7).mul(100).to(dtype), "scalar": torch.ones((), dtype=dtype)}
    write_checkpoint(tmp_path / "model.safetensors", state, CARD)
    found = read_state(tmp_path / "model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], state[k]) and found[k].dtype == dtype for k in state)


def test_transposed_tensor_comes_back_equal(tmp_path):
    weight = torch.randn(4, 6).T
    write_checkpoint(tmp_path / "model.safetensors", {"weight": weight}, CARD)
    assert torch.equal(read_state(tmp_path / "model.safetensors")["weight"], weight)


def test_metadata_is_readable_by_plain_safetensors(tmp_path):
    write_checkpoint(tmp_path / "model.safetensors", STATE, CARD)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("pixelclip", FORMAT_VERSION)
    assert json.loads(metadata["card"])["activation"] == "quickgelu"


def test_checkpoint_of_a_clip_loads_into_plain_open_clip(tiny, tmp_path):
    path = save_backbone(tiny, tmp_path / "model.safetensors")
    clip = CLIP(**tiny.card.config, quick_gelu=tiny.card.activation == "quickgelu").eval()
    clip.load_state_dict(load_file(path), strict=True)
    pixels = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (tiny.card.mean, tiny.card.std))
    ours, theirs = tiny.pooled(pixels), clip.encode_image((pixels - mean) / std)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_open_clips_own_loader_reads_our_checkpoint(tiny_vit, tmp_path):
    path = save_backbone(tiny_vit, tmp_path / "model.safetensors")
    clip = CLIP(**tiny_vit.card.config, quick_gelu=True)
    keys = open_clip.load_checkpoint(clip, str(path), strict=True)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])


def test_folder_gets_a_model_file(tiny_vit, tmp_path):
    assert save_backbone(tiny_vit, tmp_path / "a" / "run") == tmp_path / "a/run/model.safetensors"


def test_saving_again_replaces_the_file(tiny_vit, tiny_convnext, tmp_path):
    save_backbone(tiny_convnext, tmp_path)
    save_backbone(tiny_vit, tmp_path)
    assert load_backbone(str(tmp_path), device="cpu").card == tiny_vit.card
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_others_may_read_a_checkpoint(tmp_path):
    write_checkpoint(tmp_path / "model.safetensors", STATE, CARD)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}], ids=["none", "pt"])
def test_other_safetensors_file_has_no_card(tmp_path, metadata):
    assert read_card(write_metadata(tmp_path / "other.safetensors", **metadata)) is None


def test_pickled_file_has_no_card(tmp_path):
    torch.save(STATE, tmp_path / "other.pth")
    assert read_card(tmp_path / "other.pth") is None


@pytest.mark.parametrize("version", ["2", "0", ""])
def test_other_version_says_which_one_is_read(tmp_path, version):
    card = CARD.model_dump_json()
    path = tmp_path / "model.safetensors"
    write_metadata(path, format="pixelclip", version=version, card=card)
    message = f"has checkpoint version {version}; this program reads version 1: update pixelclip"
    with pytest.raises(ModelError, match=message):
        read_card(path)


def card_of(**config: object) -> str:
    """A card with this architecture."""
    return CARD.model_copy(update={"config": {"embed_dim": 8, **config}}).model_dump_json()


BROKEN_CARDS = {
    "not json": ("{", "broken card: card: Invalid JSON"),
    "missing": ("", "broken card: card: Invalid JSON"),
    "no name": (CARD.model_dump_json(exclude={"name"}), "broken card: name: Field required"),
    "strange field": ('{"colour": 1, ' + CARD.model_dump_json()[1:], "broken card: colour: Extra"),
    "two means": (
        CARD.model_copy(update={"mean": (0.5, 0.5)}).model_dump_json(warnings=False),
        r"broken card: mean\.2: Field required",
    ),
    "unknown family": (
        CARD.model_copy(update={"family": "resnet"}).model_dump_json(),
        "unknown family 'resnet'; available: ",
    ),
}


@pytest.mark.parametrize(("card", "message"), BROKEN_CARDS.values(), ids=BROKEN_CARDS)
def test_broken_card_says_what_is_wrong(tmp_path, card, message):
    path = tmp_path / "model.safetensors"
    write_metadata(path, format="pixelclip", version=FORMAT_VERSION, card=card)
    with pytest.raises(ModelError, match=message):
        load_backbone(str(path), device="cpu")


UNBUILDABLE = {
    "no towers": card_of(),
    "towers that are no settings": card_of(vision_cfg=3, text_cfg="x"),
    "no heads": card_of(vision_cfg={"patch_size": 16, "head_width": 0}, text_cfg={}),
    "trunk unknown to timm": card_of(
        vision_cfg={"timm_model_name": "convnext_unheard_of"}, text_cfg={}
    ),
    "ResNet": card_of(vision_cfg={"layers": [1, 1, 1, 1], "width": 8}, text_cfg={}),
    "foreign text tower": card_of(
        vision_cfg={"layers": 1, "width": 64, "image_size": 64}, text_cfg={"hf_model_name": "x/y"}
    ),
    "trunk that is no ConvNeXt": card_of(
        vision_cfg={"timm_model_name": "resnet18", "image_size": 64}, text_cfg={}
    ),
    "image tower without a first norm": card_of(
        vision_cfg={"layers": 1, "width": 64, "no_ln_pre": True, "image_size": 64}, text_cfg={}
    ),
}


@pytest.mark.parametrize("card", UNBUILDABLE.values(), ids=UNBUILDABLE)
def test_card_of_an_architecture_we_have_not_is_an_error(tmp_path, card):
    path = tmp_path / "model.safetensors"
    write_metadata(path, format="pixelclip", version=FORMAT_VERSION, card=card)
    with pytest.raises(ModelError, match=r"mine.* cannot segment here|cannot build mine"):
        load_backbone(str(path), device="cpu")


def test_card_that_asks_for_pretrained_weights_downloads_nothing(tiny_convnext, monkeypatch):
    asked = []
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **k: asked.append(k.get("pretrained")) or create(*a, **k)
    )
    vision = {**tiny_convnext.card.config["vision_cfg"], "timm_model_pretrained": True}
    config = {**tiny_convnext.card.config, "vision_cfg": vision}
    build_backbone(tiny_convnext.card.model_copy(update={"config": config}))
    assert not any(asked)


def test_message_of_a_broken_card_is_one_line(tmp_path):
    path = tmp_path / "model.safetensors"
    write_metadata(path, format="pixelclip", version=FORMAT_VERSION, card="[1]")
    with pytest.raises(ModelError) as caught:
        read_card(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_path_under_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ModelError, match=r"cannot write .*model\.safetensors: "):
        write_checkpoint(tmp_path / "file" / "model.safetensors", STATE, CARD)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_folder_in_the_place_of_the_file_is_kept(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ModelError, match="cannot write"):
        write_checkpoint(tmp_path / "model.safetensors", STATE, CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


SMALL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from pixelclip.checkpoint import ModelCard, write_checkpoint
from pixelclip.errors import ModelError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
card = ModelCard(name="mine", family="vit", mean=(0, 0, 0), std=(1, 1, 1))
try:
    write_checkpoint(Path(sys.argv[1]), {"weight": torch.zeros(100_000)}, card)
except ModelError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files by setrlimit")
def test_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    # A child whose files may not exceed 4 kB: writing fails half way, as on a full disk.
    path = tmp_path / "model.safetensors"
    write_checkpoint(path, STATE, CARD)
    command = [sys.executable, "-c", SMALL_DISK, str(path)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.stdout.startswith(f"cannot write {path}: "), child.stderr
    assert read_card(path) == CARD
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_exported_names_are_those_of_open_clip(tiny):
    clip = CLIP(**tiny.card.config)
    assert exported_state(tiny).keys() == clip.state_dict().keys()
