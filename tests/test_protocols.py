"""Protocols as their authors run them, slowly; published figures and means beside ours."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pixelclip.backbones import save_backbone
from pixelclip.backbones.means import Means
from pixelclip.backbones.pixels import to_pixels
from pixelclip.evaljob import EvalJob, run_eval_job
from pixelclip.evaluation.datasets import SegmentationDataset, load_dataset
from pixelclip.evaluation.protocols import published, settings_and_departures
from pixelclip.segmenter import Segmenter
from tests.test_datasets import write_set
from tests.tiny import photo, tiny_vit

WORDS = ("background", "cat", "dog", "sky", "tree", "road", "person", "cup")


def slide_inference(segmenter, image, short_side, threshold):
    """SCLIP's `forward_slide` and `postprocess_result`: every score of every pixel, no shortcut.

    Its `Resize` keeps the photo's shape within 2048 x short side; crops of 224 at steps of 112,
    the last ones moved back inside; scores are upsampled to each crop, added up, divided by how
    many crops there were, and brought to the photo's size.
    """
    width, height = image.size
    scale = min(short_side / min(width, height), 2048 / max(width, height))
    net_width, net_height = int(width * scale + 0.5), int(height * scale + 0.5)
    pixels = to_pixels(image.resize((net_width, net_height), Image.Resampling.BILINEAR))[None]
    crop, stride = 224, 112
    scores = torch.zeros(1, len(segmenter.text), net_height, net_width)
    crops = torch.zeros(1, 1, net_height, net_width)
    for row in range(max(net_height - crop + stride - 1, 0) // stride + 1):
        for column in range(max(net_width - crop + stride - 1, 0) // stride + 1):
            bottom = min(row * stride + crop, net_height)
            right = min(column * stride + crop, net_width)
            where = np.s_[:, :, max(bottom - crop, 0) : bottom, max(right - crop, 0) : right]
            with torch.inference_mode():
                features = F.normalize(segmenter.backbone.dense(pixels[where]).float(), dim=1)
            found = torch.einsum("bdhw,kd->bkhw", features, segmenter.text)
            size = pixels[where].shape[2:]
            scores[where] += F.interpolate(found, size, mode="bilinear")
            crops[where] += 1
    scores = F.interpolate(scores / crops, (height, width), mode="bilinear")[0]
    shares = (scores * segmenter.backbone.temperature).softmax(dim=0)
    labels = shares.argmax(dim=0)
    if threshold is not None:
        labels[shares.amax(dim=0) < threshold] = 0
    return labels.numpy()


def sliding(name, classes, image):
    """The segmenter of the protocol, with text features that all occur in the photo."""
    dataset = SegmentationDataset(name, classes, ((Path("a"), Path("b")),))
    config, _ = settings_and_departures("sliding", {"templates": "name"}, dataset)
    segmenter = Segmenter(tiny_vit(), classes, config=config, cache=False)
    some = F.normalize(segmenter.backbone.dense(to_pixels(image.resize((224, 224)))[None]), dim=1)
    some = some[0].flatten(1).T
    segmenter.text = F.normalize(some[:: len(some) // len(WORDS)][: len(classes)] - some.mean(0))
    return segmenter


@pytest.mark.parametrize("size", [(500, 375), (427, 640), (150, 100)])
def test_sliding_is_the_fields_inference_pixel_by_pixel(size):
    image = photo(*size, seed=size[0])
    segmenter = sliding("coco-stuff", WORDS[1:], image)
    expected = slide_inference(segmenter, image, 336, None)
    assert len(np.unique(expected)) > 4
    assert (segmenter(image).labels != expected).mean() < 1e-4  # ties of rounding


def test_sliding_has_its_threshold_for_background_and_its_size_for_cityscapes():
    image = photo(300, 200, seed=1)
    segmenter = sliding("voc21", WORDS, image)
    assert (segmenter.config.background, segmenter.config.threshold) == ("threshold", 0.1)
    shares = segmenter(image, confidence=True).confidence
    threshold = float(np.median(shares))  # some pixels are below, others not
    segmenter.config = segmenter.config.model_copy(update={"threshold": threshold})
    expected = slide_inference(segmenter, image, 336, threshold)
    found = segmenter(image).labels
    assert 0.1 < (found == 255).mean() < 0.9
    assert (np.where(found == 255, 0, found) != expected).mean() < 2e-3
    wide = photo(320, 160, seed=2)
    segmenter = sliding("cityscapes", WORDS[1:], wide)
    expected = slide_inference(segmenter, wide, 560, None)
    assert (segmenter(wide).labels != expected).mean() < 1e-4


def test_published_figures_say_by_which_protocol_they_were_made():
    sources = {line.method: line.source for line in published()}
    assert sources["PixelCLIP ViT-B/16, SA-1B masks"] == "authors README; squashed photos"
    assert sources["SCLIP ViT-B/16"] == "independent rerun; sliding windows"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_backbone(tiny_vit(), tmp_path_factory.mktemp("model")).parent)


def evaluate(model, root, **options):
    options = {"settings": {"templates": "name", "short_side": 64}, "quiet": True} | options
    path = root / "figures.json"
    job = EvalJob(Means(model, device="cpu"), root=root, workers=1, json_file=path, **options)
    return run_eval_job(job), json.loads(path.read_text())


def make_suite(root, names):
    """One photo of each set; a value that is a class in all of them."""
    for name in names:
        value = 24 if name == "cityscapes" else 18
        write_set(root / name, name, {"2007_000033": np.full((64, 80), value)})


def test_every_published_figure_in_a_table_is_the_one_of_that_method_and_set(
    model, tmp_path, shared_dir
):
    make_suite(tmp_path, ["voc20", "ade150"])
    _, stored = evaluate(model, tmp_path, suite="paper")
    document = json.loads((shared_dir / "reference/published.json").read_text())
    ours = {"ade20k-150": "ade150", "pascal-context-59": "context59", "voc-20": "voc20"}
    columns = [ours.get(column, column) for column in document["columns"]]
    _, *theirs = stored["table"]["rows"]
    assert len(theirs) == len(document["rows"])
    for row, line in zip(theirs, document["rows"], strict=True):
        assert row["name"] == line[0]
        assert row["miou"] == dict(zip(columns, line[1:6], strict=True))
    # of the eight, three have no published figure at all
    _, stored = evaluate(model, tmp_path, suite="eight")
    _, *theirs = stored["table"]["rows"]
    for row, line in zip(theirs, document["rows"], strict=True):
        expected = dict(zip(columns, line[1:6], strict=True))
        assert row["miou"] == {name: expected.get(name) for name in row["miou"]}
        assert row["mean"] is None


def test_a_set_that_is_not_whole_has_no_mean_and_is_told(model, tmp_path, capsys):
    make_suite(tmp_path, ["voc20"])
    code, _ = evaluate(model, tmp_path, datasets=("voc20",))
    assert code == 1
    line = "pixelclip: not whole: voc20: 1 photos were found; the set has 1449"
    assert line in capsys.readouterr().err.splitlines()
    make_suite(tmp_path, ["coco-stuff", "ade150", "context59", "cityscapes"])
    code, stored = evaluate(model, tmp_path, suite="paper")
    assert code == 1
    first, *_ = stored["table"]["rows"]
    assert None not in first["miou"].values()
    assert first["mean"] is None


def test_another_list_of_photos_in_use_is_whole(tmp_path):
    write_set(tmp_path, "context59", {f"2008_{k:06d}": [[2]] for k in range(3)}, layout=2)
    text = (Path(__file__).parents[1] / "src/pixelclip/evaluation/specs/context59.toml").read_text()
    for whole, count in [("[3]", 0), ("[4]", 1)]:
        spec = tmp_path / "mine.toml"
        spec.write_text(text.replace("[5104]", whole))
        assert len(load_dataset(str(spec), tmp_path).lacking) == count
