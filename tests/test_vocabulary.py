"""Class names, templates, ensembling and the cache on disk."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pixelclip import vocabulary
from pixelclip.backbones import build_backbone
from pixelclip.checkpoint import cache_dir
from pixelclip.errors import ConfigError
from tests.tiny import VIT_CONFIG, tiny_vit, vit_card


@pytest.fixture(scope="module")
def backbone():
    return tiny_vit()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXELCLIP_CACHE", str(tmp_path / "cache"))


def one_by_one(text, name, templates):
    """Normalise each text; mean over synonyms, normalise; mean over templates, normalise."""
    rows = []
    for template in templates:
        parts = [F.normalize(text(text.tokenize([template.format(s)])), dim=1)
                 for s in name.split(", ")]  # fmt: skip
        rows.append(F.normalize(torch.cat(parts).mean(0), dim=0))
    return F.normalize(torch.stack(rows).mean(0), dim=0)


@pytest.mark.parametrize("templates", ["single", "imagenet-select", "imagenet"])
def test_classes_equal_one_text_at_a_time(backbone, templates):
    names = ["cat", "sofa, couch", "sky, clouds, heaven", "a very long name " * 4, "bed "]
    chosen = vocabulary.template_sets()[templates]
    features = vocabulary.encode_classes(backbone.text, names, chosen)
    expected = torch.stack([one_by_one(backbone.text, name, chosen) for name in names])
    torch.testing.assert_close(features, expected, atol=2e-6, rtol=0)


def test_more_names_than_fit_in_a_call_keep_their_order(backbone):
    names = [f"{'very ' * (i % 5)}thing {i}" for i in range(vocabulary.TEXTS_PER_CALL + 44)]
    features = vocabulary.encode_classes(backbone.text, names, ("{}",))
    for index in (0, 1, 7, vocabulary.TEXTS_PER_CALL, len(names) - 1):
        alone = vocabulary.encode_classes(backbone.text, [names[index]], ("{}",))[0]
        torch.testing.assert_close(features[index], alone, atol=2e-6, rtol=0)


def test_template_sets_have_their_known_sizes():
    sizes = {name: len(templates) for name, templates in vocabulary.template_sets().items()}
    assert sizes == {"single": 1, "imagenet-select": 8, "imagenet": 80, "mini": 6, "name": 1}
    for templates in vocabulary.template_sets().values():
        vocabulary.check_templates(templates, "built in")


def test_class_lists_have_their_known_sizes():
    sizes = {name: len(names) for name, names in vocabulary.class_lists().items()}
    assert sizes == {
        "coco-stuff-171": 171, "ade20k-150": 150, "pascal-context-59": 59, "cityscapes-19": 19,
        "voc-20": 20, "coco-object-80": 80, "coco-object-81": 81, "pascal-context-60": 60,
        "voc-21": 21, "ade20k-847": 847, "pascal-context-459": 459,
    }  # fmt: skip
    for names in vocabulary.class_lists().values():
        vocabulary.check_classes(names)


def test_class_lists_are_spelled_as_the_authors_spell_them(shared_dir):
    theirs = json.loads((shared_dir / "reference/class_names.json").read_text())
    for name, classes in theirs.items():
        assert vocabulary.class_lists()[name] == tuple(classes)


def test_article_is_fixed_only_when_asked():
    assert vocabulary.fill("a photo of a {}.", "airplane") == "a photo of a airplane."
    fixed = vocabulary.fill("a photo of a {}.", "airplane", fix_article=True)
    assert fixed == "a photo of an airplane."
    assert vocabulary.fill("a {} in a game", "owl", fix_article=True) == "an owl in a game"
    assert vocabulary.fill("a photo of a {}.", "cat", fix_article=True) == "a photo of a cat."
    assert vocabulary.fill("art of the {}.", "owl", fix_article=True) == "art of the owl."


def test_commas_separate_classes():
    assert vocabulary.parse_classes("cat, sofa ,window") == ("cat", "sofa", "window")


def test_semicolons_leave_commas_to_synonyms():
    assert vocabulary.parse_classes("cat; sofa, couch; window") == ("cat", "sofa, couch", "window")


def test_a_file_has_a_class_per_line(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("cat\n\nsofa, couch\nwindow\n", encoding="utf-8")
    assert vocabulary.parse_classes(str(path)) == ("cat", "sofa, couch", "window")


def test_a_mark_before_the_first_line_is_no_part_of_a_name(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes(b"\xef\xbb\xbfcat\r\nsky\r\n")
    assert vocabulary.parse_classes(str(path)) == ("cat", "sky")


def test_a_json_file_holds_a_list(tmp_path):
    path = tmp_path / "words.json"
    path.write_text('["cat", "sofa, couch"]')
    assert vocabulary.parse_classes(str(path)) == ("cat", "sofa, couch")
    path.write_text('{"cat": 1}')
    with pytest.raises(ConfigError, match="must hold a JSON list"):
        vocabulary.parse_classes(str(path))


def test_names_may_hold_a_slash_and_stand_in_lines():
    assert vocabulary.parse_classes("TV/monitor, cat") == ("TV/monitor", "cat")
    assert vocabulary.parse_classes("cat\nsofa, couch\n") == ("cat", "sofa, couch")


def test_a_list_is_known_by_name():
    assert vocabulary.parse_classes("voc-20")[0] == "aeroplane"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no class names"),
        (" , ", "no class names"),
        ("cat,,dog", "class 2 of 3 is empty"),
        ("cat, Cat", "occurs twice"),
        ("nowhere/words.txt", "cannot read the class list"),
    ],
)
def test_bad_class_names_are_named(text, message):
    with pytest.raises(ConfigError, match=message):
        vocabulary.parse_classes(text)


def test_a_class_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes(b"\xff\xfe\x00cat")
    with pytest.raises(ConfigError, match="not UTF-8"):
        vocabulary.parse_classes(str(path))


@pytest.mark.parametrize("template", ["no place", "{} and {}", "{} {0}"])
def test_templates_need_one_place_for_the_name(template):
    with pytest.raises(ConfigError, match="exactly one"):
        vocabulary.check_templates([template], "mine")


def test_templates_come_from_a_file_or_the_text_itself(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("a {}\n\nthe {}\n", encoding="utf-8")
    assert vocabulary.parse_templates(str(path)) == ("a {}", "the {}")
    assert vocabulary.parse_templates("one {} here") == ("one {} here",)


def test_the_cache_gives_back_what_was_computed(backbone):
    first = vocabulary.class_features(backbone, ["cat", "dog"], ("a {}",))
    assert len(list((cache_dir() / "text").iterdir())) == 1
    second = vocabulary.class_features(backbone, ["cat", "dog"], ("a {}",))
    torch.testing.assert_close(first, second, atol=0, rtol=0)


def test_the_cache_is_read(backbone):
    vocabulary.class_features(backbone, ["cat"], ("a {}",))
    (path,) = (cache_dir() / "text").iterdir()
    marked = torch.full((1, backbone.dim), 0.25)
    vocabulary.write_safetensors(path, {"features": marked}, {})
    assert torch.equal(vocabulary.class_features(backbone, ["cat"], ("a {}",)), marked)


def test_other_names_templates_or_weights_have_an_entry_of_their_own(backbone):
    vocabulary.class_features(backbone, ["cat"], ("a {}",))
    vocabulary.class_features(backbone, ["dog"], ("a {}",))
    vocabulary.class_features(backbone, ["cat"], ("the {}",))
    vocabulary.class_features(tiny_vit(seed=1), ["cat"], ("a {}",))
    assert len(list((cache_dir() / "text").iterdir())) == 4


def test_a_damaged_cache_is_made_again(backbone):
    first = vocabulary.class_features(backbone, ["cat"], ("a {}",))
    (path,) = (cache_dir() / "text").iterdir()
    path.write_bytes(b"damaged")
    assert torch.equal(vocabulary.class_features(backbone, ["cat"], ("a {}",)), first)


def test_a_cache_that_cannot_be_written_is_passed_over(backbone, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PIXELCLIP_CACHE", str(tmp_path / "file"))
    features = vocabulary.class_features(backbone, ["cat"], ("a {}",))
    np.testing.assert_allclose(features.norm(dim=1), 1, atol=1e-5)


@pytest.mark.parametrize("features", [vocabulary.class_features, vocabulary.template_features])
@pytest.mark.parametrize("change", ["activation", "heads"])
def test_the_same_weights_in_another_tower_have_an_entry_of_their_own(features, change):
    text = {**VIT_CONFIG["text_cfg"], "heads": 4}
    changes = {
        "activation": {"activation": "gelu"},
        "heads": {"config": {**VIT_CONFIG, "text_cfg": text}},
    }
    first, other = tiny_vit(), build_backbone(vit_card(**changes[change]))
    other.load_state_dict(first.state_dict())
    assert other.text_hash == first.text_hash
    kept = [features(backbone, ["cat", "dog"], ("a {}",)) for backbone in (first, other)]
    fresh = [
        features(backbone, ["cat", "dog"], ("a {}",), cache=False) for backbone in (first, other)
    ]
    assert not torch.equal(*fresh)
    assert torch.equal(kept[1], fresh[1])
