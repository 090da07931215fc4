"""Models to the hub and from it: what is uploaded, what comes back, and what is refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import save_file

from pixelclip import cli
from pixelclip.backbones import Backbone, load_backbone, save_backbone
from pixelclip.backbones.sources import resolve
from pixelclip.checkpoint import ModelCard, read_card, read_state
from pixelclip.errors import ModelError
from pixelclip.hub import base_repository, pull, push
from tests.hub_server import TOKEN, Hub, running_hub
from tests.weights import assert_same, open_clip_folder, put_in_hub

# How huggingface_hub hands a file to httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SETTINGS = {"steps": 300, "batch_size": 8, "words": "/home/me/words.txt", "finetune": ["a|b"]}
TRAINING = {"from": "/home/me/secret/base.pt", "photos": 1234, "settings": SETTINGS}


@pytest.fixture
def trained(tmp_path, tiny_vit) -> Path:
    """A run directory as training leaves it, whose text tower is in the file."""
    card = tiny_vit.card.model_copy(update={"training": TRAINING, "licence": "MIT"})
    return save_backbone(tiny_vit, tmp_path / "trained", card=card).parent


@pytest.fixture
def without_text(tmp_path, tiny_vit) -> Path:
    """A run directory whose text tower has to come from a hub repository, which is cached."""
    folder = open_clip_folder(tmp_path / "base", tiny_vit, "open_clip_model.safetensors")
    put_in_hub("org/base", **{path.name.replace(".", "_dot_"): path for path in folder.iterdir()})
    card = tiny_vit.card.model_copy(
        update={"base": "hf-hub:org/base", "text_hash": tiny_vit.text_hash}
    )
    return save_backbone(tiny_vit, tmp_path / "without-text", card=card).parent


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine; its client in this process is told of it."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def command_line(hub: Hub, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_TOKEN": TOKEN,
           "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "pixelclip", *arguments],
        env={**os.environ, **own}, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


def front(page: str) -> dict[str, object]:
    return yaml.safe_load(page.split("---\n")[1])


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = read_state(one), read_state(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# There and back


def test_what_is_pushed_comes_back_and_loads(trained, tmp_path, tiny_vit):
    with running_hub() as hub:
        done = command_line(hub, tmp_path, "push", str(trained), "org/cats", "--private")
        assert done.stdout.splitlines()[-1] == f"{hub.url}/org/cats", done.stderr
        assert set(hub.repos["org/cats"]) == {"model.safetensors", "README.md"}
        assert hub.private == {"org/cats"}
        assert len(hub.commits) == 1
        done = command_line(hub, tmp_path, "pull", "org/cats", "-o", "cats")
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "cats").iterdir()) == [
        "README.md", "model.safetensors"
    ]  # fmt: skip
    assert_same(load_backbone(str(tmp_path / "cats"), device="cpu"), tiny_vit)
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".part")] == []


def test_a_second_push_replaces_the_first(trained, hub):
    push(trained, "org/cats")
    assert push(trained, "hf-hub:org/cats") == f"{hub.url}/org/cats"
    assert len(hub.commits) == 2


# The folder


def test_dry_run_writes_the_folder_and_sends_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    push(trained, "org/cats", dry_run=tmp_path / "dry")
    assert sorted(p.name for p in (tmp_path / "dry").iterdir()) == [
        "README.md", "model.safetensors"
    ]  # fmt: skip
    assert same_weights(trained / "model.safetensors", tmp_path / "dry/model.safetensors")
    page = (tmp_path / "dry/README.md").read_text()
    assert front(page) == {
        "license": "mit", "library_name": "pixelclip", "pipeline_tag": "image-segmentation"
    }  # fmt: skip
    assert "--model hf-hub:org/cats" in page
    assert "on `1234` photos" in page
    assert "in `300` steps" in page
    assert '| `finetune` | `["a\\|b"]` |' in page


def test_no_folder_of_this_machine_is_published(trained, tmp_path):
    push(trained, "org/cats", dry_run=tmp_path / "dry")
    for path in (tmp_path / "dry").iterdir():
        assert b"/home/me" not in path.read_bytes()
    card = read_card(tmp_path / "dry/model.safetensors")
    assert card.training["from"] == "base.pt"
    assert card.training["settings"]["words"] == "words.txt"


@pytest.mark.parametrize(
    ("base", "repository"),
    [
        ("ViT-B-16/openai", "timm/vit_base_patch16_clip_224.openai"),
        ("pixelclip-vit-b16", "hsshin98/PixelCLIP"),
        ("hf-hub:org/base", "org/base"),
        ("", None),
        ("ViT-B-16/no-such-tag", None),
    ],
)
def test_page_names_the_base_where_the_hub_has_it(base, repository):
    assert base_repository(base) == repository


def test_base_and_unusual_licence_are_in_the_metadata(without_text, tmp_path):
    path = without_text / "model.safetensors"
    card = read_card(path).model_copy(update={"licence": "for: research\nonly"})
    save_backbone(load_backbone(str(without_text), device="cpu"), without_text, card=card)
    push(without_text, "org/dogs", dry_run=tmp_path / "dry")
    metadata = front((tmp_path / "dry/README.md").read_text())
    assert metadata["base_model"] == "org/base"
    assert (metadata["license"], metadata["license_name"]) == ("other", "for: research\nonly")


# hf-hub: names


def test_pushed_repository_loads_by_its_name(trained, tmp_path, tiny_vit):
    push(trained, "org/cats", dry_run=tmp_path / "dry")
    put_in_hub("org/cats", model_dot_safetensors=tmp_path / "dry/model.safetensors")
    again = load_backbone("hf-hub:org/cats", device="cpu")
    assert (again.card.name, again.origin) == ("hf-hub:org/cats", "hf-hub:org/cats")
    assert_same(again, tiny_vit)


def test_pushed_repository_gets_its_text_tower_from_the_base(without_text, tiny_vit):
    put_in_hub("org/cats", model_dot_safetensors=without_text / "model.safetensors")
    assert not any("transformer.resblocks.0" in key and not key.startswith("visual")
                   for key in read_state(without_text / "model.safetensors"))  # fmt: skip
    assert_same(load_backbone("hf-hub:org/cats", device="cpu"), tiny_vit)


def test_open_clip_comes_first(trained, tmp_path, tiny_convnext):
    folder = open_clip_folder(tmp_path / "theirs", tiny_convnext, "open_clip_model.safetensors")
    files = {path.name.replace(".", "_dot_"): path for path in folder.iterdir()}
    put_in_hub("org/both", model_dot_safetensors=trained / "model.safetensors", **files)
    assert resolve("hf-hub:org/both").card.family == "convnext"


def test_repository_is_fetched_where_it_is_not_cached(trained, hub, tiny_vit):
    push(trained, "org/cats")
    assert_same(load_backbone("hf-hub:org/cats", device="cpu"), tiny_vit)


def test_weights_of_another_library_are_not_taken_for_ours(tmp_path, hub):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    hub.repos["org/theirs"] = {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()}
    with pytest.raises(ModelError, match=r"the model hub has no org/theirs/open_clip_config\.json"):
        resolve("hf-hub:org/theirs")
    with pytest.raises(ModelError, match="org/theirs is no model of pixelclip"):
        pull("org/theirs", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def foreign(folder: Path, backbone: Backbone, base: str) -> Path:
    """A file that names anything as its base."""
    card = ModelCard.model_validate({**backbone.card.model_dump(), "base": base, "text_hash": "0"})
    return save_backbone(backbone, folder, card=card)


@pytest.mark.parametrize("base", ["/etc/passwd", "../private", "private.pt", "private", "a/b/c",
                                  "hf-hub:../x", "private/run"])  # fmt: skip
def test_a_foreign_card_names_no_file_of_ours(base, tmp_path, tiny_vit, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private/run").mkdir(parents=True)
    path = foreign(tmp_path / "evil", tiny_vit, base)
    hub.repos["org/evil"] = {"model.safetensors": path.read_bytes()}
    for attempt in (lambda: load_backbone("hf-hub:org/evil"), lambda: pull("org/evil", Path("x"))):
        with pytest.raises(ModelError, match=r"broken card: base: .* is no public model"):
            attempt()
    assert not Path("x").exists()


# pull


def test_pull_asks_the_hub_for_the_newest(trained, tiny_vit, hub, tmp_path):
    push(trained, "org/cats")
    pull("org/cats", tmp_path / "first")
    changed = load_backbone(str(trained), device="cpu")
    for parameter in changed.parameters():
        parameter.mul_(0.5)
    save_backbone(changed, trained)
    push(trained, "org/cats")
    pull("org/cats", tmp_path / "second")
    assert_same(load_backbone(str(tmp_path / "second"), device="cpu"), changed)


def test_pull_takes_what_is_cached_without_network(trained, tmp_path, tiny_vit):
    put_in_hub("org/cats", model_dot_safetensors=trained / "model.safetensors",
               README_dot_md=trained / "model.safetensors")  # fmt: skip
    pull("org/cats", tmp_path / "new/cats")
    assert not (tmp_path / "new/cats/model.safetensors").is_symlink()
    shutil.rmtree(constants.HF_HUB_CACHE)
    assert_same(load_backbone(str(tmp_path / "new/cats"), device="cpu"), tiny_vit)


def test_pull_overwrites_nothing(trained, tmp_path):
    put_in_hub("org/cats", model_dot_safetensors=trained / "model.safetensors")
    before = (trained / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match="is there already and not empty; give another -o"):
        pull("org/cats", trained)
    assert (trained / "model.safetensors").read_bytes() == before


# What goes wrong


@pytest.mark.parametrize("name", ["cats", "org/cats/run", "org/..", "", "org/a b"])
def test_names_that_are_none(name, trained, tmp_path):
    for attempt in (lambda: push(trained, name), lambda: pull(name, tmp_path / "out")):
        with pytest.raises(ModelError, match="is no name of a repository: write OWNER/NAME"):
            attempt()


@pytest.fixture
def line(monkeypatch, capsys):
    """Exit code and the one line of a command."""

    def call(*arguments: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["pixelclip", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        lines = [text for text in capsys.readouterr().err.splitlines() if "pixelclip:" in text]
        assert len(lines) == 1
        return stop.value.code, lines[0].removeprefix("pixelclip: error: ")

    return call


def test_push_without_a_token_says_how_to_get_one(line, trained, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert line("push", trained, "org/cats") == (
        2,
        "no token for the model hub: log in with hf auth login, or set HF_TOKEN; --dry-run DIR"
        " only writes the files",
    )


def test_push_without_a_network_says_so(line, trained, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert line("push", trained, "org/cats") == (
        2, "cannot reach the model hub to push org/cats: no network"
    )  # fmt: skip


def test_push_to_a_hub_that_does_not_answer(line, trained, hub, monkeypatch):
    hub.shutdown()
    hub.server_close()
    code, text = line("push", trained, "org/cats")
    assert code == 2
    assert text.startswith("cannot push org/cats: ")


def test_push_with_a_wrong_token(line, trained, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert line("push", trained, "org/cats") == (
        2, "cannot push org/cats: the model hub does not accept the token"
    )  # fmt: skip


def test_push_without_rights(line, trained, hub):
    hub.refusal = 403
    assert line("push", trained, "org/cats") == (
        2, "cannot push org/cats: the token has no right to write there"
    )  # fmt: skip


def test_a_private_push_is_not_made_public(line, trained, hub):
    hub.repos["org/cats"] = {}
    assert line("push", trained, "org/cats", "--private") == (
        2, "org/cats is there already and public; give another name, or no --private"
    )  # fmt: skip
    assert hub.repos["org/cats"] == {}


def test_push_of_something_else(line, tmp_path, monkeypatch):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert line("push", tmp_path, "org/cats", "--dry-run", tmp_path / "dry") == (
        2, f"{tmp_path}/model.safetensors is no model of pixelclip; push takes a run directory"
    )  # fmt: skip


def test_pull_of_an_unknown_repository(line, hub, tmp_path):
    assert line("pull", "org/none", "-o", tmp_path / "out") == (
        2, "the model hub has no org/none/model.safetensors"
    )  # fmt: skip
