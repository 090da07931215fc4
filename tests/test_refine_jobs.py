"""`--refine` and `--templates FILE` in jobs: workers, resumed runs, masks of photos and sets."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixelclip.backbones import save_backbone
from pixelclip.backbones.means import Means
from pixelclip.config import SegmentConfig
from pixelclip.errors import ConfigError, DataError
from pixelclip.evaljob import EvalJob, run_eval_job
from pixelclip.evaluation.datasets import load_folder
from pixelclip.evaluation.evaluate import evaluate
from pixelclip.images import read_indices
from pixelclip.job import segment_photos
from pixelclip.masks.make import make_masks
from pixelclip.output import Output
from pixelclip.segmenter import Segmenter
from tests.tiny import photo, tiny_vit

NAMES = ("cat", "dog", "sky")
SETTINGS = {"templates": "name", "short_side": 64}
OWN = "cat\ta {}\nsky\tthe {}\n{}\nthe {}\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run directory of a ViT that sees edges only, and not where: its labels vary."""
    backbone = tiny_vit()
    tower = backbone.visual.tower
    with torch.no_grad():
        tower.conv1.weight -= tower.conv1.weight.mean(dim=(2, 3), keepdim=True)
        tower.positional_embedding.zero_()
        tower.class_embedding.zero_()
    return str(save_backbone(backbone, tmp_path_factory.mktemp("model")).parent)


@pytest.fixture
def data(tmp_path):
    """20 photos, two pieces, in a folder of labelled photos."""
    folder = tmp_path / "set"
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(NAMES))
    draw = np.random.default_rng(0)
    for index in range(20):
        photo(50, 40, index).save(folder / f"images/{index:02d}.png")
        labels = np.kron(draw.integers(0, 3, (4, 5)), np.ones((10, 10))).astype(np.uint8)
        Image.fromarray(labels).save(folder / f"labels/{index:02d}.png")
    return folder


def figures(model, data, tmp_path, **options):
    """The figures of a run in this process, or as options say."""
    path = tmp_path / "figures.json"
    options = {"settings": SETTINGS, "quiet": True, "workers": 1} | options
    code = run_eval_job(EvalJob(Means(model, device="cpu"), (data,), json_file=path, **options))
    return json.loads(path.read_text()) | {"code": code}


def segmented(model, data, out, *, refine=None, templates="name", **options):
    config = SegmentConfig(**(SETTINGS | {"templates": templates}))
    means, output = Means(model, device="cpu"), Output(out, overlay=False, quiet=True, **options)
    words = {"classes": "cat, dog, sky", "means": means, "config": config, "workers": 1}
    code = segment_photos([data / "images"], **words, output=output, refine=refine)
    told = json.loads((out / "pixelclip.manifest.json").read_text())
    labels = {path.name: read_indices(path) for path in sorted(out.glob("*.labels.png"))}
    return code, told, labels


def test_workers_and_resumed_runs_give_the_same_figures(model, data, tmp_path):
    options = {"refine": "superpixels", "output": tmp_path / "out"}
    first = figures(model, data, tmp_path, **options)
    (piece,) = (tmp_path / "out").glob("pieces/*/00001.npz")
    piece.unlink()
    assert figures(model, data, tmp_path, **options) == first
    assert figures(model, data, tmp_path, refine="superpixels", workers=2) == first
    segmenter = Segmenter(model, NAMES, config=SegmentConfig(**SETTINGS), refine="superpixels")
    assert first["miou"] == evaluate(segmenter, load_folder(data))["miou"]
    assert first["settings"]["refine"]["source"] == "superpixels"
    assert first["departures"] == [
        "templates is name; the protocol says the model's own",
        "short_side is 64; the protocol says the model's own",
        "each mask of superpixels gets one class; the protocol says each pixel",
    ]  # fmt: skip
    plain = figures(model, data, tmp_path, output=tmp_path / "out")  # beside the refined pieces
    assert plain["settings"]["refine"] is None
    assert plain["miou"] != first["miou"]


def test_templates_of_classes_make_other_figures_that_workers_share(model, data, tmp_path):
    (tmp_path / "own.txt").write_text(OWN)
    (tmp_path / "common.txt").write_text("{}\nthe {}\n")
    own = {"settings": SETTINGS | {"templates": str(tmp_path / "own.txt")}}
    first = figures(model, data, tmp_path, **own)
    assert figures(model, data, tmp_path, **own, workers=2) == first
    assert first["settings"]["fused"] is True
    common = {"settings": SETTINGS | {"templates": str(tmp_path / "common.txt")}}
    average = figures(model, data, tmp_path, **common)
    assert average["settings"]["fused"] is False
    assert average["miou"] != first["miou"]


def test_masks_of_a_set_lie_in_the_folder_or_below_its_name(model, data, tmp_path):
    make_masks(data / "images", tmp_path / "masks", source="superpixels")
    flying = figures(model, data, tmp_path, refine="superpixels")
    stored = figures(model, data, tmp_path, refine=str(tmp_path / "masks"), workers=2)
    assert stored["miou"] == flying["miou"]
    assert stored["settings"]["refine"]["masks"] == str(tmp_path / "masks")
    (tmp_path / "all").mkdir()
    (tmp_path / "masks").rename(tmp_path / "all/set")
    below = figures(model, data, tmp_path, refine=str(tmp_path / "all"), photos=7)
    assert below["settings"]["refine"]["masks"] == str(tmp_path / "all/set")
    assert below["photos"] == 7


def test_a_photo_without_masks_is_listed(model, data, tmp_path):
    maps = tmp_path / "maps"
    shutil.copytree(data / "labels", maps)
    (maps / "03.png").unlink()
    report = figures(model, data, tmp_path, refine=str(maps))
    assert report["code"] == 1
    assert report["photos"] == 19
    (line,) = report["failed"]
    assert line.endswith(f"03.png has no masks in {maps}")
    code, told, labels = segmented(model, data, tmp_path / "out", refine=str(maps))
    assert code == 1
    assert [failed["error"] for failed in told["failed"]] == [line]
    assert len(labels) == 19
    for name, found in labels.items():
        regions = read_indices(maps / name.replace(".labels", ""))
        assert all(len(np.unique(found[regions == k])) == 1 for k in np.unique(regions))


def test_segmented_photos_are_kept_until_their_masks_change(model, data, tmp_path):
    maps = tmp_path / "maps"
    shutil.copytree(data / "labels", maps)
    code, told, labels = segmented(model, data, tmp_path / "out", refine=str(maps))
    assert (code, told["new"], told["kept"]) == (0, 20, 0)
    assert told["settings"]["refine"]["masks"] == str(maps)
    _, told, _ = segmented(model, data, tmp_path / "out", refine=str(maps))
    assert (told["new"], told["kept"]) == (0, 20)
    os.utime(maps / "00.png", ns=(1, 1))
    _, told, _ = segmented(model, data, tmp_path / "out", refine=str(maps))
    assert (told["new"], told["kept"]) == (20, 0)
    _, told, plain = segmented(model, data, tmp_path / "out")
    assert (told["new"], told["kept"]) == (20, 0)
    assert any((plain[name] != labels[name]).any() for name in labels)
    (tmp_path / "own.txt").write_text(OWN)
    _, told, _ = segmented(model, data, tmp_path / "out", templates=str(tmp_path / "own.txt"))
    assert told["new"] == 20
    assert told["settings"]["fused"] is True


@pytest.mark.parametrize(
    ("refine", "error", "message"),
    [("nowhere", ConfigError, "no masks at nowhere; give a file or folder of masks, or one of"),
     ("empty", DataError, "no masks in"),
     ("others", DataError, "none of the photos has masks in others; names must match")],
)  # fmt: skip
def test_masks_that_cannot_be_used_are_refused_before_the_work(
    model, data, tmp_path, monkeypatch, refine, error, message
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("others").mkdir()
    Image.fromarray(np.zeros((40, 50), np.uint8)).save("others/other.png")
    with pytest.raises(error, match=message):
        figures(model, data, tmp_path, refine=refine)
    with pytest.raises(error, match=message):
        segmented(model, data, tmp_path / "out", refine=refine)


def test_scores_and_results_among_the_masks_are_refused(model, data, tmp_path):
    with pytest.raises(ConfigError, match="scores cannot be kept with masks"):
        segmented(model, data, tmp_path / "out", refine="superpixels", scores=True)
    masks = data / "labels"
    with pytest.raises(ConfigError, match="lies among the masks of --refine; choose another"):
        segmented(model, data, masks / "out", refine=str(masks))
    with pytest.raises(ConfigError, match="lies among the masks of --refine; choose another"):
        figures(model, data, tmp_path, refine=str(masks), output=masks)
