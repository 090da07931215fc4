"""Every way to name a model, and what is said when there is none."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from pixelclip.backbones import Backbone, exported_state, load_backbone, save_backbone
from pixelclip.backbones.sources import resolve
from pixelclip.errors import ModelError
from tests.weights import COMMIT, assert_same, open_clip_folder, put_in_hub


@pytest.fixture(params=["tiny_vit", "tiny_convnext"])
def tiny(request) -> Backbone:
    return request.getfixturevalue(request.param)


# Where models come from


@pytest.mark.parametrize("as_file", [False, True], ids=["run directory", "file"])
def test_saved_backbone_loads_equal(tiny, tmp_path, as_file):
    path = save_backbone(tiny, tmp_path / "run")
    again = load_backbone(str(path if as_file else path.parent), device="cpu")
    assert again.card == tiny.card
    assert_same(again, tiny)


WEIGHT_NAMES = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]


@pytest.mark.parametrize("weights", WEIGHT_NAMES)
def test_folder_of_open_clip_loads_equal(tiny, tmp_path, weights):
    folder = open_clip_folder(tmp_path / "theirs", tiny, weights)
    again = load_backbone(str(folder), device="cpu")
    assert (again.card.mean, again.card.std) == (tiny.card.mean, tiny.card.std)
    assert again.card.activation == tiny.card.activation
    assert_same(again, tiny)


@pytest.mark.parametrize("weights", WEIGHT_NAMES)
def test_cached_hub_repository_loads_equal_without_network(tiny, tmp_path, weights):
    folder = open_clip_folder(tmp_path / "theirs", tiny, weights)
    files = {path.name.replace(".", "_dot_"): path for path in folder.iterdir()}
    put_in_hub("org/tiny", **files)
    again = load_backbone("hf-hub:org/tiny", device="cpu")
    assert again.card.name == "hf-hub:org/tiny"
    assert_same(again, tiny)


def test_repository_known_to_lack_safetensors_loads_without_network(tiny_vit, tmp_path):
    folder = open_clip_folder(tmp_path / "theirs", tiny_vit, WEIGHT_NAMES[1])
    put_in_hub("org/tiny", **{path.name.replace(".", "_dot_"): path for path in folder.iterdir()})
    # The hub's client leaves this note when the repository answered that it has no such file.
    note = Path(constants.HF_HUB_CACHE) / "models--org--tiny/.no_exist" / COMMIT / WEIGHT_NAMES[0]
    note.parent.mkdir(parents=True)
    note.touch()
    assert_same(load_backbone("hf-hub:org/tiny", device="cpu"), tiny_vit)


@pytest.mark.parametrize("weights", WEIGHT_NAMES)
def test_tag_of_open_clip_is_read_from_the_hub_cache(tmp_path, tiny_vit, weights):
    folder = open_clip_folder(tmp_path / "theirs", tiny_vit, weights)
    put_in_hub(
        "timm/vit_base_patch16_clip_224.openai",
        **{weights.replace(".", "_dot_"): folder / weights},
    )
    state = resolve("ViT-B-16/openai").read()
    assert torch.equal(state["visual.proj"], tiny_vit.visual.tower.proj)


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("ViT-B-16/openai", "quickgelu"),
        ("ViT-B-16-quickgelu/openai", "quickgelu"),
        ("ViT-B-16/laion2b_s34b_b88k", "gelu"),
        ("ViT-B-16/dfn2b", "quickgelu"),
        ("convnext_base_w_320/laion_aesthetic_s13b_b82k", "gelu"),
    ],
)
def test_activation_comes_from_the_tag(name, activation):
    assert resolve(name).card.activation == activation


# Weights in the place of the named ones


def test_checkpoint_replaces_the_weights(tiny_vit, run_dir, tmp_path):
    other = load_backbone(str(run_dir), device="cpu")
    for parameter in other.parameters():
        parameter.mul_(1.5)
    path = save_backbone(other, tmp_path / "other.safetensors")
    assert_same(load_backbone(str(run_dir), checkpoint=path, device="cpu"), other)


def test_named_weights_are_not_needed_beside_a_checkpoint(tiny_vit, tmp_path):
    folder = open_clip_folder(tmp_path / "theirs", tiny_vit, WEIGHT_NAMES[0])
    put_in_hub("org/tiny", open_clip_config_dot_json=folder / "open_clip_config.json")
    again = load_backbone("hf-hub:org/tiny", checkpoint=folder / WEIGHT_NAMES[0], device="cpu")
    assert_same(again, tiny_vit)


def test_architecture_alone_will_do_beside_a_checkpoint():
    assert resolve("ViT-B-16", weights_wanted=False).card.family == "vit"


def test_checkpoint_of_another_activation_is_an_error(tiny_vit, run_dir, tmp_path):
    changed = tiny_vit.card.model_copy(update={"activation": "gelu"})
    other = Backbone(tiny_vit.visual, tiny_vit.text, changed)
    path = save_backbone(other, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="its activation is gelu, not quickgelu; use --model"):
        load_backbone(str(run_dir), checkpoint=path)


def test_checkpoint_of_another_architecture_is_an_error(tiny_convnext, run_dir, tmp_path):
    path = save_backbone(tiny_convnext, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"does not fit tiny-vit: its family is convnext, not vit"):
        load_backbone(str(run_dir), checkpoint=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("visual.proj"), r"does not fit this model: missing visual\.proj$"),
        (
            lambda state: state.update({"visual.proj": torch.zeros(24, 32)}),
            r"misshapen: visual\.proj is \(24, 32\) but should be \(32, 24\)$",
        ),
        (
            lambda state: state.update({f"extra.{i}": torch.zeros(1) for i in range(5)}),
            r"without a place: extra\.0, extra\.1, extra\.2 and 2 more$",
        ),
    ],
    ids=["missing", "misshapen", "unknown"],
)
def test_tensors_that_do_not_fit_are_named(tiny_vit, run_dir, tmp_path, change, message):
    state = exported_state(tiny_vit)
    change(state)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ModelError, match=message):
        load_backbone(str(run_dir), checkpoint=tmp_path / "other.pt")


# Names that are none


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("pixelclip-vit", "pixelclip-vit-b16"),
        ("pixelclip_convnext_b", "pixelclip-convnext-b"),
        ("minni", "mini"),
        ("vit-b-16/openai", "ViT-B-16/openai"),
    ],
)
def test_unknown_name_gives_the_nearest(name, nearest):
    with pytest.raises(ModelError) as caught:
        resolve(name)
    message = str(caught.value)
    assert message.startswith(f"unknown model {name.partition('/')[0]!r}; nearest: ")
    assert nearest in message.partition("nearest: ")[2].partition(" (all")[0].split(", ")


def test_unknown_tag_lists_the_right_ones():
    with pytest.raises(ModelError, match=r"ViT-B-16 has no weights 'opena'; available: openai, "):
        resolve("ViT-B-16/opena")


def test_architecture_without_a_tag_asks_for_one():
    with pytest.raises(ModelError, match="ViT-B-16 is an architecture: name its weights too"):
        resolve("ViT-B-16")


@pytest.mark.parametrize("offline", [True, False], ids=["offline mode", "no name server"])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("pixelclip-vit-b16", "hsshin98/PixelCLIP/weights/pixelclip_vit_base.pth"),
        ("hf-hub:org/tiny", "org/tiny/open_clip_config.json"),
    ],
)
def test_missing_network_says_what_helps(monkeypatch, name, file, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(ModelError) as caught:
        load_backbone(name)
    assert str(caught.value) == (
        f"cannot fetch {file}: no network and not in the cache; give --checkpoint FILE, or use"
        " --model mini, which needs none"
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is not a run directory: it has no model.safetensors"),
        ({"open_clip_config.json": "{"}, "cannot read .*open_clip_config.json"),
        ({"open_clip_config.json": "[]"}, "does not hold a JSON object"),
    ],
    ids=["empty", "broken json", "list"],
)
def test_folder_that_is_no_model_says_why(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=message):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "open_clip_config.json has no model_cfg"),
        ({"model_cfg": {"embed_dim": 8}}, "cannot segment here: its configuration lacks"),
        (
            {"model_cfg": {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"hf_model_name": "x"}}},
            "cannot segment here: its text tower is not CLIP's own",
        ),
        (
            {"model_cfg": {"vision_cfg": {"patch_size": 16}, "text_cfg": {"width": 32}}},
            "cannot build|is not usable|sizes are not whole numbers",
        ),
    ],
    ids=["no model", "no towers", "foreign text tower", "no embedding size"],
)
def test_hub_configuration_that_cannot_be_used_says_why(tmp_path, tiny_vit, config, message):
    folder = open_clip_folder(tmp_path / "theirs", tiny_vit, WEIGHT_NAMES[0])
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load_backbone(str(folder))


@pytest.mark.parametrize("name", ["missing.pth", "folder/missing.safetensors"])
def test_missing_file_is_named(name):
    with pytest.raises(ModelError, match=f"^no such weight file: {name}$"):
        resolve(name)


def test_missing_checkpoint_is_named(run_dir, tmp_path):
    with pytest.raises(ModelError, match="no such weight file"):
        load_backbone(str(run_dir), checkpoint=tmp_path / "missing.pth")
