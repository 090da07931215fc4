"""The authors' checkpoints: recognised, stripped of what is dead, converted once."""

import gzip
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pixelclip.backbones import Backbone, exported_state, load_backbone, save_backbone
from pixelclip.backbones.catalog import PUBLISHED
from pixelclip.backbones.sources import CLIP_PREFIX, resolve
from pixelclip.checkpoint import cache_dir, read_state
from pixelclip.errors import ModelError
from tests.weights import State, assert_same, authors_state, put_in_hub, wrapped

GOLDEN = Path(__file__).parent / "golden"
AUTHORS_REPO = "hsshin98/PixelCLIP"


@pytest.mark.parametrize("wrap", [wrapped, lambda state: state], ids=["detectron2", "plain"])
@pytest.mark.parametrize("of_authors", [True, False], ids=["authors", "open_clip"])
def test_pickled_checkpoint_replaces_the_weights(tiny_vit, run_dir, tmp_path, wrap, of_authors):
    state = authors_state(tiny_vit) if of_authors else exported_state(tiny_vit)
    torch.save(wrap(state), tmp_path / "model.pth")
    again = load_backbone(str(run_dir), checkpoint=tmp_path / "model.pth", device="cpu")
    assert_same(again, tiny_vit)


def test_authors_tensors_in_a_safetensors_file_replace_the_weights(tiny_vit, run_dir, tmp_path):
    save_file(authors_state(tiny_vit), tmp_path / "authors.safetensors")
    again = load_backbone(str(run_dir), checkpoint=tmp_path / "authors.safetensors", device="cpu")
    assert_same(again, tiny_vit)


@pytest.mark.parametrize("times", [1, 2], ids=["first load", "second load"])
def test_authors_checkpoint_of_another_activation_is_an_error(
    tiny_vit, run_dir, tmp_path, own_cache, times
):
    torch.save(authors_state(tiny_vit), tmp_path / "authors.pth")
    if times == 2:
        load_backbone(str(run_dir), checkpoint=tmp_path / "authors.pth", device="cpu")
    card = tiny_vit.card.model_copy(update={"activation": "gelu"})
    gelu = save_backbone(Backbone(tiny_vit.visual, tiny_vit.text, card), tmp_path / "gelu")
    with pytest.raises(ModelError, match="trained with quickgelu, but tiny-vit computes gelu"):
        load_backbone(str(gelu), checkpoint=tmp_path / "authors.pth")


def official_keys(architecture: str) -> dict[str, list[int]]:
    keys = json.loads(gzip.decompress((GOLDEN / "official_keys.json.gz").read_bytes()))
    return keys["vit_b_16" if architecture == "ViT-B-16" else architecture]


def official_state(name: str) -> State:
    """Every tensor of a published file, each filled with a number of its own.

    A tensor is one stored number, expanded: the file is small and the shapes are full size.
    """
    shapes = official_keys(PUBLISHED[name].architecture)
    if name.endswith("-dino"):
        shapes = {**shapes, "dino.cls_token": [1, 1, 384], "dino.norm.weight": [384]}
    return {
        key: torch.tensor(float(number)).expand(shape)
        for number, (key, shape) in enumerate(shapes.items())
    }


def serve_official(name: str, folder: Path, content: object) -> None:
    """Put a published model into the hub's cache."""
    path = folder / "weights.pth"
    torch.save(content, path)
    key = PUBLISHED[name].filename.replace("/", "__").replace(".", "_dot_")
    put_in_hub(AUTHORS_REPO, **{key: path})


@pytest.mark.shared
def test_golden_keys_are_the_reference(shared_dir):
    text = (shared_dir / "reference" / "official_checkpoint_keys.json").read_text()
    content = json.loads(text)
    assert official_keys("ViT-B-16") == content["vit_b_16"]["tensors"]
    assert official_keys("convnext_base_w_320") == content["convnext_base_w_320"]["tensors"]


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_file_is_stripped_to_its_clip(name, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="pixelclip")
    state = official_state(name)
    serve_official(name, tmp_path, wrapped(state) if "dino" in name else state)
    expected = {k.removeprefix(CLIP_PREFIX): v for k, v in state.items() if CLIP_PREFIX in k}
    found = resolve(name).read()
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.shape == expected[key].shape
        assert (tensor.flatten()[0], tensor.flatten()[-1]) == (expected[key].min(),) * 2
    dropped = len(state) - len(expected)
    assert f"{len(expected)} tensors used, {dropped} not needed and dropped" in caplog.text


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("name", ["pixelclip-vit-b16", "pixelclip-convnext-b"])
def test_published_model_fits_at_full_size(name, tmp_path):
    state = official_state(name)
    serve_official(name, tmp_path, state)
    backbone = load_backbone(name, device="cpu")
    assert backbone.card.name == name
    for key, tensor in exported_state(backbone).items():
        assert torch.equal(tensor, state[CLIP_PREFIX + key]), key


@pytest.mark.parametrize(
    ("name", "activation", "square", "stride"),
    [("pixelclip-vit-b16", "quickgelu", 320, 16), ("pixelclip-convnext-b", "gelu", 640, 32)],
)
def test_published_card_has_the_authors_settings(name, activation, square, stride):
    card = resolve(name).card
    assert (card.activation, card.square) == (activation, square)
    assert card.config["vision_cfg"].get("patch_size", 32) == stride


@pytest.mark.parametrize("name", ["pixelclip-vit-b16", "pixelclip-convnext-b-dino"])
def test_published_file_is_known_by_its_keys(name, tmp_path):
    torch.save(official_state(name), tmp_path / "mine.pth")
    found = resolve(str(tmp_path / "mine.pth")).card
    expected = resolve(name).card
    assert (found.config, found.activation) == (expected.config, expected.activation)
    assert found.name == str(tmp_path / "mine.pth")


def test_strange_tensor_in_an_authors_file_is_an_error(tiny_vit, run_dir, tmp_path):
    state = {**authors_state(tiny_vit), "backbone.stem.weight": torch.zeros(3)}
    torch.save(state, tmp_path / "authors.pth")
    with pytest.raises(ModelError, match=r"without a place: backbone\.stem\.weight"):
        load_backbone(str(run_dir), checkpoint=tmp_path / "authors.pth")


def break_contents(path: Path) -> None:
    """Other bytes, same size and time: what still loads is not read from here."""
    stat = path.stat()
    path.write_bytes(b"?" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_second_load_reads_the_converted_copy(tiny_vit, run_dir, tmp_path, own_cache):
    path = tmp_path / "authors.pth"
    torch.save(authors_state(tiny_vit), path)
    load_backbone(str(run_dir), checkpoint=path, device="cpu")
    break_contents(path)
    assert_same(load_backbone(str(run_dir), checkpoint=path, device="cpu"), tiny_vit)


def test_second_load_by_file_reads_the_converted_copy(tiny_vit, tmp_path, own_cache):
    path = tmp_path / "authors.pth"
    torch.save(authors_state(tiny_vit), path)
    first = {key: value.clone() for key, value in resolve(str(path)).read().items()}  # mapped
    break_contents(path)
    second = resolve(str(path)).read()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_damaged_converted_copy_is_made_again(tiny_vit, run_dir, tmp_path, own_cache):
    path = tmp_path / "authors.pth"
    torch.save(authors_state(tiny_vit), path)
    load_backbone(str(run_dir), checkpoint=path, device="cpu")
    (converted,) = cache_dir().rglob("*.safetensors")
    os.truncate(converted, 100)
    assert_same(load_backbone(str(run_dir), checkpoint=path, device="cpu"), tiny_vit)


def test_changed_file_is_converted_again(tiny_vit, run_dir, tmp_path, own_cache):
    path = tmp_path / "authors.pth"
    state = authors_state(tiny_vit)
    torch.save(state, path)
    load_backbone(str(run_dir), checkpoint=path, device="cpu")
    state[f"{CLIP_PREFIX}visual.proj"] = state[f"{CLIP_PREFIX}visual.proj"] + 1
    torch.save(state, path)
    os.utime(path, (1, 1))
    again = load_backbone(str(run_dir), checkpoint=path, device="cpu")
    assert torch.equal(again.visual.tower.proj, tiny_vit.visual.tower.proj + 1)


def test_converted_copy_holds_no_dead_tensors(tiny_vit, run_dir, tmp_path, own_cache):
    torch.save(authors_state(tiny_vit), tmp_path / "authors.pth")
    load_backbone(str(run_dir), checkpoint=tmp_path / "authors.pth", device="cpu")
    (converted,) = cache_dir().rglob("*.safetensors")
    assert read_state(converted).keys() == exported_state(tiny_vit).keys()


@pytest.mark.usefixtures("no_cache")
def test_cache_that_cannot_be_written_is_passed_over(tiny_vit, run_dir, tmp_path):
    torch.save(authors_state(tiny_vit), tmp_path / "authors.pth")
    again = load_backbone(str(run_dir), checkpoint=tmp_path / "authors.pth", device="cpu")
    assert_same(again, tiny_vit)


def test_tensors_that_share_memory_are_converted(tiny_vit, run_dir, tmp_path, own_cache):
    state = authors_state(tiny_vit)
    norms = [key for key in state if key.endswith("ln_1.bias") and CLIP_PREFIX + "visual" in key]
    for key in norms:
        state[key] = state[norms[0]]
    torch.save(state, tmp_path / "authors.pth")
    again = load_backbone(str(run_dir), checkpoint=tmp_path / "authors.pth", device="cpu")
    blocks = again.visual.tower.transformer.resblocks
    assert all(torch.equal(block.ln_1.bias, blocks[0].ln_1.bias) for block in blocks)
