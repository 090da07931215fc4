"""Templates by entropy: by hand and against slow versions; the file and what uses it."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import entropy

from pixelclip.commands.templates import templates_command
from pixelclip.config import SegmentConfig, TrainConfig
from pixelclip.errors import ConfigError, DataError
from pixelclip.evaluation.datasets import load_folder
from pixelclip.evaluation.evaluate import evaluate
from pixelclip.evaluation.metrics import confusion, mean_iou
from pixelclip.evaluation.template_choice import (
    ChoiceSettings,
    Entropies,
    choose,
    count_entropies,
    photo_entropies,
    write_choice,
)
from pixelclip.photos import find_photos
from pixelclip.segmenter import Segmenter
from pixelclip.training.prompts import make_vectors
from pixelclip.vocabulary import parse_templates, template_features
from tests.tiny import photo
from tests.varied import varied_vit

CLASSES = ("cat", "sofa, couch", "sky")
TEMPLATES = ("a {}", "photo of a {}.", "{} in a room", "many {}", "the {}")


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def segmenter():
    return Segmenter(varied_vit(), CLASSES, config=SegmentConfig(templates="name"), cache=False)


@pytest.fixture
def folder(tmp_path):
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    draw = np.random.default_rng(0)
    for index in range(3):
        photo(90, 70, index).save(tmp_path / f"images/{index}.png")
        labels = draw.integers(0, 3, (70, 90)).astype(np.uint8)
        Image.fromarray(labels).save(tmp_path / f"labels/{index}.png")
    return tmp_path


@pytest.mark.parametrize("per_call", [9, 16_000_000])
def test_entropies_equal_a_slow_version(monkeypatch, per_call):
    monkeypatch.setattr("pixelclip.evaluation.template_choice.SCORES_PER_CALL", per_call)
    features, texts = unit(4, 5, 8), unit(3, 6, 8, seed=1)
    counted = count_entropies(features, texts, 10.0)
    sums, cells = np.zeros((6, 3)), np.zeros((6, 3))
    for template in range(6):
        for cell in features.flatten(0, 1):
            shares = torch.softmax(10 * texts[:, template] @ cell, dim=0)
            sums[template, shares.argmax()] += entropy(shares)
            cells[template, shares.argmax()] += 1
    np.testing.assert_allclose(counted.sums, sums, rtol=1e-4)
    np.testing.assert_array_equal(counted.cells, cells)


def test_choice_by_hand():
    sums = np.array([[4.0, 0, 0], [1, 2, 0], [2, 1, 0], [3, 8, 0]])
    cells = np.array([[2, 0, 0], [1, 2, 0], [2, 1, 0], [1, 4, 0]])
    # Means of class 0: 2, 1, 1, 3; of class 1: never, 1, 1, 2; class 2 is never predicted.
    chosen = choose(Entropies(sums, cells), ChoiceSettings(experts=3))
    assert chosen == [[1, 2, 0], [1, 2, 3], [0, 1, 2, 3]]
    chosen = choose(Entropies(sums, cells), ChoiceSettings(experts=1))
    assert chosen == [[1], [1], [0, 1, 2, 3]]


def test_chosen_templates_are_used_as_written(segmenter, tmp_path):
    chosen = [[4, 0], [2], [0, 1, 2, 3, 4]]
    path = tmp_path / "own.json"
    write_choice(path, segmenter, TEMPLATES, chosen, photos=3, settings=ChoiceSettings())
    config = SegmentConfig(templates=str(path))
    found = Segmenter(varied_vit(), (*CLASSES, "zebra"), config=config, cache=False)
    groups = found.experts.groups
    used = [{groups.templates[i] for i in groups.sets[owner]} for owner in groups.owners]
    # A class that the file does not name has the average of all candidates.
    assert used == [{TEMPLATES[i] for i in own} for own in [*chosen, range(5)]]
    assert "cat\tthe {}" in found.description()["templates"]


def test_evaluation_with_the_file_is_that_of_the_fused_classifier(segmenter, folder, tmp_path):
    data = load_folder(folder)
    path = tmp_path / "own.json"
    write_choice(path, segmenter, TEMPLATES, [[4], [2], [0]], photos=3, settings=ChoiceSettings())
    config = SegmentConfig(templates=str(path))
    fused = Segmenter(varied_vit(), CLASSES, config=config, cache=False)
    report = evaluate(fused, data)
    matrix = sum(
        confusion(data.truth(label), fused(image).labels, 3) for image, label in data.pairs
    )
    assert report["miou"] == pytest.approx(100 * mean_iou(matrix), abs=1e-3)
    assert report["settings"]["fused"] is True
    assert report["miou"] != evaluate(segmenter, data)["miou"]


def test_entropies_of_photos_are_sums_and_unreadable_ones_are_listed(segmenter, folder):
    texts = template_features(segmenter.backbone, CLASSES, TEMPLATES, cache=False)
    (folder / "images/1.png").write_bytes(b"broken")
    photos = find_photos([folder / "images"])
    found = photo_entropies(segmenter, photos, texts)
    assert len(found.failed) == 1
    alone = [
        count_entropies(
            segmenter.grid_features(segmenter.prepare(folder / f"images/{index}.png")),
            texts,
            segmenter.backbone.temperature,
        )
        for index in (0, 2)
    ]
    np.testing.assert_array_equal(found.cells, alone[0].cells + alone[1].cells)
    np.testing.assert_array_equal(found.sums, alone[0].sums + alone[1].sums)
    with pytest.raises(DataError, match="none of the 1 photos"):
        photo_entropies(segmenter, photos[1:2], texts)


FORMAT = {"format": "pixelclip-templates", "default": ["{}"]}


@pytest.mark.parametrize(
    ("document", "message"),
    [({"classes": {}}, "neither a list of templates nor from"),
     ({**FORMAT, "classes": []}, "neither a list"),
     ({**FORMAT, "classes": {"cat": []}}, "list of templates for 'cat'"),
     ({**FORMAT, "classes": {"cat": ["no name"]}}, "needs exactly one {}"),
     ({**FORMAT, "classes": {"cat": ["a\t{}"]}}, "not plain text"),
     ({**FORMAT, "classes": {"c\tat": ["a {}"]}}, "not plain text"),
     ({**FORMAT, "classes": {}, "default": None}, "list of templates for 'default'")],
)  # fmt: skip
def test_a_broken_file_of_templates_is_one_line(tmp_path, document, message):
    (tmp_path / "own.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=message):
        parse_templates(str(tmp_path / "own.json"), of_classes=True)


def test_templates_of_single_classes_are_refused_where_all_share_them(tmp_path, tiny_vit):
    (tmp_path / "own.json").write_text(json.dumps({**FORMAT, "classes": {"cat": ["a {}"]}}))
    (tmp_path / "own.txt").write_text("cat\ta {}\nthe {}")
    for path in (tmp_path / "own.json", tmp_path / "own.txt"):
        assert parse_templates(str(path), of_classes=True)[0] == "cat\ta {}"
        for vectors in ("prompts", "words"):
            config = TrainConfig(train_templates=str(path), class_vectors=vectors, num_clusters=2)
            with pytest.raises(ConfigError, match="holds templates of single classes, which serve"):
                make_vectors(tiny_vit, config, torch.Generator())
        with pytest.raises(ConfigError, match="give templates for all"):
            templates_command(["nowhere"], "cat", candidates=str(path))


def test_command_chooses(folder, run_dir, tmp_path, capsys):
    out = tmp_path / "own.json"
    names = str(folder / "classes.txt")
    code = templates_command(
        [str(folder / "images")],
        names,
        model=str(run_dir),
        output=out,
        candidates="imagenet-select",
        experts=2,
        short_side=64,
    )
    assert code == 0
    assert capsys.readouterr().out == f"3 classes, 3 photo(s) -> {out}\n"
    document = json.loads(out.read_text())
    assert list(document["classes"]) == list(CLASSES)
    assert all(1 <= len(own) <= 8 for own in document["classes"].values())
    assert document["made_from"]["photos"] == 3
