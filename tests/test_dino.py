"""Dense features of timm's towers, and what may be wrong with their files."""

import json
import resource
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from pixelclip.backbones import weights_hash
from pixelclip.backbones.dino import DINO, dino_of, load_dense
from pixelclip.errors import ConfigError, ModelError
from tests.towers import SMALL_VIT, TOWERS, save_tower, tower

IMAGES = torch.rand(2, 3, 50, 75, generator=torch.Generator().manual_seed(0))


def slow_features(kind: str) -> torch.Tensor:
    """Position by position from timm's own forward pass; class and register tokens come first."""
    options = {"dynamic_img_size": True} if kind.startswith("dino") else {}
    model = tower(kind, **options)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    stride = {"dinov2": 14, "dino": 16, "dinov3": 16}.get(kind, 32)
    height, width = -(-50 // stride), -(-75 // stride)
    pixels = F.pad((IMAGES - mean) / std, (0, width * stride - 75, 0, height * stride - 50))
    with torch.no_grad():
        cells = model.forward_features(pixels)
    if cells.ndim == 4:
        return cells
    result = torch.empty(2, cells.shape[2], height, width)
    for row in range(height):
        for column in range(width):
            result[:, :, row, column] = cells[:, model.num_prefix_tokens + row * width + column]
    return result


@pytest.mark.parametrize("kind", TOWERS)
def test_dense_features_are_the_last_layers(kind, tmp_path):
    loaded = load_dense(str(save_tower(tmp_path, kind)), device="cpu")
    found, expected = loaded.dense(IMAGES), slow_features(kind)
    assert found.shape[1] == loaded.dim
    assert found.std(dim=(2, 3)).mean() > 0.01  # cells differ
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_prefix_tokens_are_there_to_be_dropped():
    assert [tower(kind).num_prefix_tokens for kind in ("dino", "dinov2", "dinov3")] == [1, 5, 5]


def test_file_and_folder_give_the_same_model(tmp_path):
    folder = save_tower(tmp_path / "saved", "resnet")
    pickled = save_tower(tmp_path / "pickled", "resnet", safe=False)
    assert (pickled / "pytorch_model.bin").is_file()
    by_folder = load_dense(str(folder), device="cpu")
    for other in (
        load_dense(str(pickled), device="cpu"),
        load_dense(checkpoint=folder, device="cpu"),  # the folder says which model it is
        load_dense(str(folder), checkpoint=pickled / "pytorch_model.bin", device="cpu"),
    ):
        assert weights_hash(other) == weights_hash(by_folder)
        assert not other.training
        assert not any(p.requires_grad for p in other.parameters())


def test_a_plain_state_dict_loads_under_timms_name(tmp_path):
    model = timm.create_model("resnet18")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "resnet.pth")
    loaded = load_dense("resnet18", checkpoint=tmp_path / "resnet.pth", device="cpu")
    assert torch.equal(loaded.tower.layer4[1].conv2.weight, model.layer4[1].conv2.weight)
    assert not any(name.startswith("fc.") for name in loaded.tower.state_dict())


def test_names_of_the_models_authors_are_understood(tmp_path):
    """Meta's DINOv2 files call the register tokens otherwise and hold a mask token."""
    folder = save_tower(tmp_path, "dinov2")
    state = load_file(folder / "model.safetensors")
    original = {key.replace("reg_token", "register_tokens"): value for key, value in state.items()}
    original["mask_token"] = torch.zeros(1, 24)
    original["cls_token"] = state["cls_token"]
    original["pos_embed"] = torch.cat([torch.zeros(1, 1, 24), state["pos_embed"]], dim=1)
    torch.save(original, tmp_path / "original.pth")
    loaded = load_dense(str(folder), checkpoint=tmp_path / "original.pth", device="cpu")
    torch.testing.assert_close(loaded.tower.reg_token, state["reg_token"])
    torch.testing.assert_close(loaded.tower.pos_embed, state["pos_embed"], rtol=1e-5, atol=1e-5)


def test_loading_moves_no_generator(tmp_path):
    folder = save_tower(tmp_path, "dino")
    before = torch.get_rng_state()
    load_dense(str(folder), device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def write_config(folder: Path, **changes: object) -> Path:
    save_tower(folder, "dino")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_small_patch16_224.dono", r"no model.*nearest: vit_small_patch16_224\.dino"),
        ("nosuchmodel", r"timm has no model 'nosuchmodel'"),
        ("", "no model name"),
        ("vit_small_patch16_224.dino", r"no network.*give a weight file of it, or a folder"),
        ("hf-hub:timm/dino", r"cannot fetch timm/dino/config.json: no network"),
        ("hf-hub:/", r"cannot fetch|has no"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(name, message):
    with pytest.raises(ModelError, match=message) as caught:
        load_dense(name, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "nosuchmodel"}, "timm has no model 'nosuchmodel'"),
        ({"architecture": 3}, "architecture"),
        ({"pretrained_cfg": None}, "mean"),
        ({"pretrained_cfg": {"mean": [2, 0, 0], "std": [1, 1, 1]}}, "mean"),
        ({"model_args": {"embed_dim": 10**9}}, "model_args"),
        ({"model_args": {"depth": 10_000}}, "depth"),
        ({"model_args": {"embed_dim": 25, "num_heads": 2}}, "cannot build"),
        ({"model_args": {"nonsense": 1}}, "cannot build"),
        ({"model_args": {"checkpoint_path": "x.pth"}}, "must not hold checkpoint_path"),
        ({"model_args": SMALL_VIT | {"depth": 3}}, "does not fit this model: missing blocks.2"),
    ],
)
def test_a_strange_description_is_refused(changes, message, tmp_path):
    with pytest.raises(ModelError, match=message) as caught:
        load_dense(str(write_config(tmp_path, **changes)), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "sizes",
    [
        {"embed_dim": 4096, "num_heads": 2, "depth": 2},  # 1.6 GB
        {**SMALL_VIT, "img_size": 4096, "patch_size": 1},  # 1.6 GB
    ],
)
def test_sizes_that_a_file_does_not_have_cost_no_memory(sizes, tmp_path):
    folder = write_config(tmp_path, model_args=sizes)
    state = load_file(folder / "model.safetensors")
    state["mask_token"] = torch.zeros(1, 24)  # so that timm is asked to convert
    save_file(state, folder / "model.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match="does not fit this model"):
        load_dense(str(folder), device="cpu")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_weights_that_are_missing_or_do_not_fit_are_refused(tmp_path):
    folder = save_tower(tmp_path / "dino", "dino")
    other = save_tower(tmp_path / "convnext", "convnext") / "model.safetensors"
    with pytest.raises(ModelError, match="does not fit this model"):
        load_dense(str(folder), checkpoint=other, device="cpu")
    with pytest.raises(ModelError, match="no such weight file"):
        load_dense(checkpoint=tmp_path / "nothing.pth", device="cpu")
    state = load_file(folder / "model.safetensors")
    state["norm.bias"][3] = torch.nan
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"norm\.bias holds values that are no numbers"):
        load_dense(str(folder), device="cpu")
    state["norm.bias"][3] = 3e38
    state["norm.weight"][:] = 3e38
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match="its features are no numbers"):
        load_dense(str(folder), device="cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        load_dense(str(folder), device="cpu")
    with pytest.raises(ModelError, match="has no config"):
        load_dense(str(tmp_path), device="cpu")


def test_a_model_for_one_size_only_is_refused(tmp_path):
    torch.save(timm.create_model("resmlp_12_224").state_dict(), tmp_path / "mlp.pth")
    with pytest.raises(ModelError, match="no dense features for photos of any size"):
        load_dense("resmlp_12_224", checkpoint=tmp_path / "mlp.pth", device="cpu")


def test_an_unknown_device_is_refused():
    with pytest.raises(ConfigError, match="unknown device"):
        load_dense(device="tpu")


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_224",
        "vit_small_patch8_224",
        "vit_base_patch16_224",
        "vit_base_patch8_224",
    ],
)
def test_a_file_tells_which_of_dinos_models_it_is_of(name, tmp_path):
    model = timm.create_model(f"{name}.dino", depth=1, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "dino.pth")
    assert dino_of(tmp_path / "dino.pth") == f"{name}.dino"
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    assert dino_of(tmp_path / "other.pth") == DINO


def test_a_folder_of_something_else_is_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json; give a folder that timm has saved"):
        load_dense(str(tmp_path), device="cpu")
