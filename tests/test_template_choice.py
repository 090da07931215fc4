"""Templates by entropy: by hand and against slow versions; the file and what uses it."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import entropy

from pixelclip.commands.templates import templates_command
from pixelclip.config import SegmentConfig
from pixelclip.errors import ConfigError, DataError
from pixelclip.evaluation.datasets import load_folder
from pixelclip.evaluation.evaluate import evaluate
from pixelclip.evaluation.template_choice import (
    ChoiceSettings,
    Entropies,
    choose,
    count_entropies,
    expert_features,
    fused_labels,
    grid_features,
    photo_entropies,
    template_features,
    write_choice,
)
from pixelclip.evaluation.template_effect import measure_effect
from pixelclip.photos import find_photos
from pixelclip.segmenter import Segmenter
from pixelclip.upsample import axis, upsample_grid
from pixelclip.vocabulary import encode_classes, parse_templates
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


@pytest.mark.parametrize("per_call", [1, 16_000_000])
def test_entropies_equal_a_slow_version(monkeypatch, per_call):
    monkeypatch.setattr("pixelclip.evaluation.template_choice.SCORES_PER_CALL", per_call)
    features, texts = unit(4, 5, 8), unit(6, 3, 8, seed=1)
    counted = count_entropies(features, texts, 10.0)
    sums, cells = np.zeros((6, 3)), np.zeros((6, 3))
    for template in range(6):
        for cell in features.flatten(0, 1):
            shares = torch.softmax(10 * texts[template] @ cell, dim=0)
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


def test_fusion_equals_a_slow_version():
    features, average = unit(5, 6, 8), unit(4, 8, seed=1)
    experts = unit(4, 4, 8, seed=2)
    axes = (axis(40, 5, 5 / 40), axis(48, 6, 6 / 48))

    def scores(text):
        grids = [torch.from_numpy(upsample_grid(features @ one, *axes)) for one in text]
        return torch.stack(grids)  # [K, H, W]

    expected = scores(average).argmax(0)
    surest = torch.zeros(40, 48)
    fallback = torch.ones(40, 48, dtype=torch.bool)
    for index in range(4):
        shares = torch.softmax(5 * scores(experts[index]), dim=0)
        sure, best = shares.max(0)
        wins = (best == index) & (sure > surest)
        expected[wins], surest[wins] = index, sure[wins]
        fallback &= best != index
    assert 0 < fallback.sum() < fallback.numel()
    labels = fused_labels(features, experts, average, axes, 5.0)
    # The confidence of pixels between grid points is approximate in its rest: few may differ.
    assert (torch.from_numpy(labels.astype(np.int64)) == expected).float().mean() > 0.98
    assert (labels == expected.numpy())[fallback.numpy()].all()


def test_experts_of_all_templates_are_the_average(segmenter):
    texts = template_features(segmenter, TEMPLATES)
    experts, average = expert_features(texts, [[0, 1, 2, 3, 4]] * 3)
    usual = encode_classes(segmenter.backbone.text, CLASSES, TEMPLATES)
    torch.testing.assert_close(average, usual)
    torch.testing.assert_close(experts, usual.expand(3, 3, -1))


def test_chosen_templates_are_used_as_written(segmenter, tmp_path):
    chosen = [[4, 0], [2], [0, 1, 2, 3, 4]]
    path = tmp_path / "own.json"
    write_choice(path, segmenter, TEMPLATES, chosen, photos=3, settings=ChoiceSettings())
    experts, average = expert_features(template_features(segmenter, TEMPLATES), chosen)
    config = SegmentConfig(templates=str(path))
    found = Segmenter(varied_vit(), (*CLASSES, "zebra"), config=config, cache=False)
    torch.testing.assert_close(found.text[:3], experts[range(3), range(3)])
    # A class that the file does not name has the average of all candidates.
    zebra = encode_classes(segmenter.backbone.text, ["zebra"], TEMPLATES)
    torch.testing.assert_close(found.text[3:], zebra)
    assert "cat\tthe {}" in found.description()["templates"]
    assert not torch.allclose(found.text[0], average[0])


def test_effect_equals_evaluation_with_the_file(segmenter, folder, tmp_path):
    data = load_folder(folder)
    photos = find_photos([folder / "images"])
    texts = template_features(segmenter, TEMPLATES)
    entropies = photo_entropies(segmenter, photos, texts)
    chosen = choose(entropies, ChoiceSettings(experts=2))
    path = tmp_path / "own.json"
    write_choice(path, segmenter, TEMPLATES, chosen, photos=3, settings=ChoiceSettings())
    (tmp_path / "all.txt").write_text("\n".join(TEMPLATES))
    effects = {e["name"]: e["miou"] for e in measure_effect(segmenter, data, texts, chosen)}
    for name, templates in (
        ("own", "name"),
        ("average", tmp_path / "all.txt"),
        ("per class", path),
    ):
        config = SegmentConfig(templates=str(templates))
        other = Segmenter(varied_vit(), CLASSES, config=config, cache=False)
        assert effects[name] == pytest.approx(evaluate(other, data)["miou"], abs=0.02)
    assert len(set(effects.values())) > 2


def test_entropies_of_photos_are_sums_and_unreadable_ones_are_listed(segmenter, folder):
    texts = template_features(segmenter, TEMPLATES)
    (folder / "images/1.png").write_bytes(b"broken")
    photos = find_photos([folder / "images"])
    found = photo_entropies(segmenter, photos, texts)
    assert len(found.failed) == 1
    alone = [
        count_entropies(
            grid_features(segmenter, segmenter.prepare(folder / f"images/{index}.png")),
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
        parse_templates(str(tmp_path / "own.json"))


def test_templates_of_other_classes_alone_are_refused():
    with pytest.raises(ConfigError, match="the class 'sky' has no templates"):
        encode_classes(varied_vit().text, ["cat", "sky"], ["cat\ta {}"])


def test_candidates_are_for_all_classes(segmenter):
    with pytest.raises(ConfigError, match="for all classes"):
        template_features(segmenter, ["cat\ta {}"])


def test_command_chooses_and_measures(folder, run_dir, tmp_path, capsys):
    out = tmp_path / "own.json"
    names = str(folder / "classes.txt")
    arguments = {"model": str(run_dir), "output": out, "candidates": "imagenet-select"}
    code = templates_command(
        [str(folder / "images")], names, **arguments, experts=2, check=folder, short_side=64
    )
    assert code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:4]] == ["own", "average", "per class", "fused"]
    document = json.loads(out.read_text())
    assert list(document["classes"]) == list(CLASSES)
    assert all(1 <= len(own) <= 8 for own in document["classes"].values())
    assert document["made_from"]["photos"] == 3
    with pytest.raises(ConfigError, match="has other classes"):
        templates_command([str(folder / "images")], "cat, dog", **arguments, check=folder)
