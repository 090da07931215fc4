"""Weight files as others write them, and the hub's cache with them in it."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from pixelclip.backbones import Backbone, exported_state
from pixelclip.backbones.sources import CLIP_PREFIX

COMMIT = "0123456789abcdef0123456789abcdef01234567"
State = dict[str, Tensor]


def put_in_hub(repo: str, **files: Path) -> None:
    """Lay files out as huggingface_hub does: blobs, and links to them in a snapshot.

    A keyword is the name in the repository with `__` for `/` and `_dot_` for a dot.
    """
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    for part in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "refs/main").write_text(COMMIT)
    for name, path in files.items():
        link = folder / "snapshots" / COMMIT / name.replace("__", "/").replace("_dot_", ".")
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = folder / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))


def open_clip_folder(folder: Path, backbone: Backbone, weights: str) -> Path:
    """A folder as open_clip saves it for the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = {"mean": list(backbone.card.mean), "std": list(backbone.card.std),
              "interpolation": "bicubic", "resize_mode": "shortest"}  # fmt: skip
    model = {**backbone.card.config, "quick_gelu": backbone.card.activation == "quickgelu"}
    config = {"model_cfg": model, "preprocess_cfg": pixels}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if weights.endswith(".safetensors"):
        save_file(exported_state(backbone), folder / weights)
    else:
        torch.save(exported_state(backbone), folder / weights)
    return folder


def authors_state(backbone: Backbone) -> State:
    """The tensors of a training checkpoint of the authors with this model in it."""
    clip = exported_state(backbone)
    teacher = {key: torch.ones_like(value) for key, value in clip.items() if "visual." in key}
    return {
        "sem_seg_head.predictor.prompt_tokens": torch.zeros(64, 4, 32),
        **{CLIP_PREFIX + key: value for key, value in clip.items()},
        **{f"teacher_encoder.{key}": value for key, value in teacher.items()},
        "head.conv0.weight": torch.zeros(64, 1, 3, 3),
    }


def wrapped(state: State) -> dict[str, object]:
    """As detectron2 saves a checkpoint."""
    moments = {"step": torch.tensor(5.0), "exp_avg": torch.zeros(3)}
    groups = [{"lr": 2e-4, "betas": (0.9, 0.999), "params": [0]}]
    return {
        "model": state,
        "optimizer": {"state": {0: moments}, "param_groups": groups},
        "scheduler": {"last_epoch": 5, "_last_lr": [2e-4]},
        "iteration": 4999,
    }


def assert_same(first: Backbone, second: Backbone) -> None:
    """Equal to the last bit: weights, dense and text features."""
    ours, theirs = exported_state(first), exported_state(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    images = torch.rand(1, 3, 40, 70)
    assert torch.equal(first.dense(images), second.dense(images))
    tokens = first.text.tokenize(["a cat"])
    assert torch.equal(first.text(tokens), second.text(tokens))
