"""Files that hold no weights, half of them, or something worse."""

import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch

from pixelclip.backbones import exported_state, load_backbone
from pixelclip.backbones.sources import resolve
from pixelclip.errors import ModelError
from tests.weights import authors_state


class Trap:
    """Would make a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_zipped(path: Path, content: object) -> None:
    torch.save(content, path)


def write_legacy(path: Path, content: object) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_pickle(path: Path, content: object) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("write", [write_zipped, write_legacy, write_pickle])
def test_pickle_that_wants_to_run_code_is_refused_and_does_not_run(tmp_path, write):
    trap = tmp_path / "sprung"
    write(tmp_path / "evil.pth", {"weight": torch.zeros(2), "trap": Trap(trap)})
    with pytest.raises(ModelError, match="was refused: it holds more than tensors and would run"):
        resolve(str(tmp_path / "evil.pth"))
    assert not trap.exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("write", [write_zipped, write_legacy])
def test_truncated_file_is_called_damaged(tmp_path, tiny_vit, write, share):
    path = tmp_path / "half.pth"
    write(path, authors_state(tiny_vit))
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(ModelError, match=r"half\.pth is not a weight file, or is damaged"):
        resolve(str(path))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_safetensors_file_is_called_unreadable(run_dir, share):
    path = run_dir / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(ModelError, match="is not a readable safetensors file"):
        load_backbone(str(run_dir))


def test_zip_file_with_a_broken_directory_is_called_damaged(tmp_path):
    path = tmp_path / "broken.pth"
    torch.save({"weight": torch.zeros(9)}, path)
    content = bytearray(path.read_bytes())
    place = content.rfind(b"PK\x01\x02")
    content[place : place + 4] = b"????"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="is not a weight file, or is damaged"):
        resolve(str(path))


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html><title>404</title></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 523\n",
        b"plain text",
    ],
    ids=["web page", "git-lfs pointer", "text"],
)
def test_file_that_holds_no_pickle_is_not_called_dangerous(tmp_path, content):
    (tmp_path / "page.pth").write_bytes(content)
    with pytest.raises(ModelError, match="is not a weight file, or is damaged"):
        resolve(str(tmp_path / "page.pth"))


def test_torchscript_archive_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; OpenAI's files are of its making
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "jit.pt"))
    with pytest.raises(ModelError, match="is a TorchScript archive, which holds code; save its"):
        resolve(str(tmp_path / "jit.pt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], r"holds no state dict \(found list\)"), ({"epoch": 3}, "holds no tensors")],
    ids=["list", "numbers"],
)
def test_file_without_tensors_says_what_it_holds(tmp_path, content, message):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ModelError, match=message):
        resolve(str(tmp_path / "odd.pt"))


def test_weights_without_a_card_ask_for_their_model(tmp_path, tiny_vit):
    torch.save(exported_state(tiny_vit), tmp_path / "bare.pt")
    with pytest.raises(ModelError, match="does not say which model it is of; name it too, as in"):
        resolve(str(tmp_path / "bare.pt"))
