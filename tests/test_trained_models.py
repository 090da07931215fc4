"""What a run leaves loads wherever its base came from, with the weights that were trained."""

import copy
from pathlib import Path

import pytest
import torch

from pixelclip.backbones import Backbone, exported_state, load_backbone, save_backbone, weights_hash
from pixelclip.checkpoint import read_card, read_state
from pixelclip.errors import ModelError
from pixelclip.segmenter import Segmenter
from pixelclip.training.run import newest_checkpoint
from pixelclip.training.start import train
from tests.tiny import photo
from tests.training import SMALL, write_photos
from tests.weights import open_clip_folder, put_in_hub

STEPS = {**SMALL, "learning_rate": 0.01}


@pytest.fixture(params=["tiny_vit", "tiny_convnext"])
def tiny(request) -> Backbone:
    return request.getfixturevalue(request.param)


@pytest.fixture
def inputs(tmp_path) -> tuple[Path, Path]:
    return write_photos(tmp_path / "inputs")


@pytest.fixture
def train_from(inputs, tmp_path):
    """Train two steps from a model; gives the run directory."""

    def call(model: object, name: str = "trained", **options: object) -> Path:
        photos, masks = inputs
        train(photos, tmp_path / name, masks=masks, model=str(model), device="cpu",
              **{**STEPS, **options})  # fmt: skip
        return tmp_path / name

    return call


def in_hub(folder: Path, repo: str, backbone: Backbone) -> None:
    files = open_clip_folder(folder, backbone, "open_clip_model.safetensors")
    put_in_hub(repo, **{path.name.replace(".", "_dot_"): path for path in files.iterdir()})


def text_state(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {k: v for k, v in exported_state(backbone).items() if not k.startswith("visual.")}


def assert_trained(run: Path, base: Backbone) -> Backbone:
    """The run's model: its checkpoint's weights where those changed, else the base's."""
    loaded = load_backbone(str(run), device="cpu")
    weights = newest_checkpoint(run)["weights"]
    now, before = loaded.visual.state_dict(), base.visual.state_dict()
    moved = 0
    for name, tensor in now.items():
        stored = weights.get(f"visual.{name}", before[name])
        assert torch.equal(tensor, stored), name
        moved += not torch.equal(tensor, before[name])
    assert moved > 3
    ours, theirs = text_state(loaded), text_state(base)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert weights_hash(loaded.text) == weights_hash(base.text)
    return loaded


def test_run_from_a_file_holds_the_text_tower(tiny, train_from, tmp_path):
    run = train_from(save_backbone(tiny, tmp_path / "base.safetensors"))
    state = read_state(run / "model.safetensors")
    assert set(exported_state(tiny)) | {"prompts.tokens"} == set(state)
    assert_trained(run, tiny)
    assert (read_card(run / "model.safetensors").base, loaded_name(run)) == ("", "trained")


def loaded_name(run: Path) -> str:
    return load_backbone(str(run), device="cpu").card.name


def test_run_from_the_hub_gets_its_text_tower_there(tiny, train_from, tmp_path):
    in_hub(tmp_path / "theirs", "org/base", tiny)
    run = train_from("hf-hub:org/base")
    state = read_state(run / "model.safetensors")
    assert {key for key in state if not key.startswith("visual.")} == {"prompts.tokens"}
    card = read_card(run / "model.safetensors")
    assert (card.base, card.text_hash) == ("hf-hub:org/base", tiny.text_hash)
    assert_trained(run, tiny)


def test_another_text_tower_under_the_same_name_is_refused(tiny_vit, train_from, tmp_path,
                                                           monkeypatch):  # fmt: skip
    in_hub(tmp_path / "theirs", "org/base", tiny_vit)
    run = train_from("hf-hub:org/base")
    other = copy.deepcopy(tiny_vit)
    with torch.no_grad():
        next(other.text.parameters()).view(-1)[0] += 1e-3
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "other-hub"))
    in_hub(tmp_path / "changed", "org/base", other)
    with pytest.raises(ModelError, match="trained with another text tower than hf-hub:org/base"):
        load_backbone(str(run), device="cpu")


def test_a_base_that_is_gone_is_named(tiny_vit, train_from, tmp_path, monkeypatch):
    in_hub(tmp_path / "theirs", "org/base", tiny_vit)
    run = train_from("hf-hub:org/base")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "other-hub"))
    with pytest.raises(ModelError, match=r"cannot fetch org/base/open_clip_config\.json"):
        load_backbone(str(run), device="cpu")


def test_other_weights_of_a_public_model_bring_their_text_tower(tiny_vit, train_from, tmp_path):
    in_hub(tmp_path / "theirs", "org/base", tiny_vit)
    changed = copy.deepcopy(tiny_vit)
    for parameter in changed.parameters():
        parameter.mul_(0.9)
    path = save_backbone(changed, tmp_path / "changed.safetensors")
    run = train_from("hf-hub:org/base", checkpoint=path)
    assert read_card(run / "model.safetensors").base == ""
    assert_trained(run, changed)


@pytest.mark.parametrize("public", [True, False], ids=["hub", "file"])
def test_a_run_is_a_base_too(public, tiny_vit, train_from, tmp_path):
    model: object = "hf-hub:org/base"
    if public:
        in_hub(tmp_path / "theirs", "org/base", tiny_vit)
    else:
        model = save_backbone(tiny_vit, tmp_path / "base.safetensors")
    first = train_from(model)
    second = train_from(first, "second")
    assert read_card(second / "model.safetensors").base == ("hf-hub:org/base" if public else "")
    assert_trained(second, load_backbone(str(first), device="cpu"))


def test_a_run_that_was_pushed_is_a_base_too(tiny_vit, train_from, tmp_path):
    in_hub(tmp_path / "theirs", "org/base", tiny_vit)
    first = train_from("hf-hub:org/base")
    put_in_hub("org/first", model_dot_safetensors=first / "model.safetensors")
    second = train_from("hf-hub:org/first", "second")
    assert read_card(second / "model.safetensors").base == "hf-hub:org/base"
    assert_trained(second, load_backbone(str(first), device="cpu"))


def test_mini_is_trained_and_segments(train_from, tmp_path):
    run = train_from("mini", batch_size=2, input_size=64, clip_multiplier=1.0)
    loaded = assert_trained(run, load_backbone("mini", device="cpu"))
    assert loaded.card.family == "mini"
    labels = Segmenter(str(run), ["sky", "grass"], device="cpu")(photo(60, 40)).labels
    assert labels.shape == (40, 60)


@pytest.mark.parametrize("vectors", ["prompts", "words", "free"])
def test_what_was_learned_beside_the_tower_is_kept(vectors, tiny_vit, train_from, tmp_path):
    model = save_backbone(tiny_vit, tmp_path / "base.safetensors")
    run = train_from(model, class_vectors=vectors)
    names = {"prompts": {"prompts.tokens"}, "words": set(), "free": {"prompts.vectors"}}
    state = read_state(run / "model.safetensors")
    assert {key for key in state if key.startswith("prompts.")} == names[vectors]
    assert_trained(run, tiny_vit)
