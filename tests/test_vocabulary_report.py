"""Many vocabularies at the cost of one encoder run; the report by hand; the thesaurus."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from pixelclip.commands.bias import bias_command
from pixelclip.config import SegmentConfig
from pixelclip.errors import ConfigError, DataError
from pixelclip.evaluation import vocabulary_report, wordings
from pixelclip.evaluation.datasets import load_folder
from pixelclip.evaluation.metrics import confusion, mean_iou
from pixelclip.evaluation.vocabularies import Counted, Vocabularies, count_vocabularies, pieces
from pixelclip.evaluation.vocabulary_files import markdown, write_pictures
from pixelclip.evaluation.wordings import Concept, Thesaurus, Wording, make_wordings
from pixelclip.segmenter import Segmenter
from tests.tiny import photo
from tests.varied import varied_vit

CONFIG = SegmentConfig(templates="name", window=64, short_side=96)  # photos in several windows
WORDS = Thesaurus(
    plurals={"sheep": "sheep"},
    concepts=(
        Concept(names=("cat", "kitty"), near=("fox", "Sky", "lynx")),
        Concept(names=("dog", "hound", "cat"), near=("wolf", "fox")),
    ),
)


NEAR = ("fox", "wolf", "house", "a tree", "blue", "stone wall")


@pytest.fixture
def dataset(tmp_path):
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    (tmp_path / "classes.txt").write_text("cat\ndog\nsky\n")
    draw = np.random.default_rng(0)
    for index in range(3):
        photo(50, 40, index).save(tmp_path / f"images/{index}.jpg")
        labels = draw.integers(0, 3, (40, 50)).astype(np.uint8)
        labels[:5] = 255
        Image.fromarray(labels).save(tmp_path / f"labels/{index}.png")
    return tmp_path


@pytest.mark.parametrize("preset", ["default", "authors"])
def test_counts_equal_those_of_a_segmenter_per_vocabulary(dataset, preset):
    config = CONFIG.model_copy(update={"preset": preset})
    data, backbone = load_folder(dataset), varied_vit()
    if preset == "authors":  # a short side of 640 pixels takes its time
        data = replace(data, pairs=data.pairs[:1])
    given = make_wordings(data.classes, WORDS, ["a {}", "single"])
    vocabularies = Vocabularies(backbone, given, config)
    assert {wording.kind for wording in vocabularies.wordings} == {
        "given", "template", "plural", "synonyms", "one synonym", "near misses"
    }  # fmt: skip
    counted = count_vocabularies(vocabularies, data)
    for wording, matrix in zip(vocabularies.wordings, counted.matrices, strict=True):
        own = config.model_copy(update={"templates": wording.templates or "name"})
        segmenter = Segmenter(varied_vit(), wording.names, config=own, cache=False)
        expected = sum(
            confusion(data.truth(label), segmenter(path).labels, len(wording.names))
            for path, label in data.pairs
        )
        np.testing.assert_array_equal(matrix, expected[:3])
        assert (expected.sum(axis=0) > 0).sum() > 2


def test_the_image_tower_sees_every_input_once(dataset):
    backbone, seen = varied_vit(), []
    backbone.visual.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    data = load_folder(dataset)
    segmenter = Segmenter(backbone, data.classes, config=CONFIG)
    segmenter(data.pairs[0][0])
    alone = sum(seen)
    seen.clear()
    count_vocabularies(Vocabularies(backbone, make_wordings(data.classes, WORDS), CONFIG), data)
    assert alone > 1
    assert sum(seen) == 3 * alone


def test_names_added_to_a_vocabulary_only_take_pixels(dataset):
    data = load_folder(dataset)
    wording = [Wording("given", "", data.classes),
               Wording("near misses", "", (*data.classes, *NEAR))]  # fmt: skip
    before, after = count_vocabularies(Vocabularies(varied_vit(), wording, CONFIG), data).matrices
    assert (after[:, :3] <= before[:, :3]).all()
    np.testing.assert_array_equal(after.sum(axis=1), before.sum(axis=1))
    assert after[:, 3:-1].sum() == (before[:, :3] - after[:, :3]).sum() > 0


def test_broken_pairs_are_listed_and_count_nowhere(dataset):
    (dataset / "images/1.jpg").write_bytes(b"broken")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(dataset / "labels/2.png")
    data = load_folder(dataset)
    vocabularies = Vocabularies(varied_vit(), make_wordings(data.classes, WORDS, ["a {}"]), CONFIG)
    counted = count_vocabularies(vocabularies, data)
    assert len(counted.failed) == 2
    assert {matrix.sum() for matrix in counted.matrices} == {35 * 50}
    assert counted.photos.tolist() == [1, 1, 1]
    (dataset / "labels/0.png").unlink()
    with pytest.raises(DataError, match="none of the photos could be used"):
        count_vocabularies(vocabularies, load_folder(dataset))


def test_wordings_a_model_cannot_tell_apart_are_left_out_with_the_reason():
    same = Wording("synonyms", "twins", ("cat", "Cat", "sky"))
    given = Wording("given", "as given", ("cat", "dog", "sky"))
    vocabularies = Vocabularies(varied_vit(), [given, same], CONFIG)
    assert vocabularies.wordings == [given]
    assert "occurs twice" in vocabularies.left_out["twins"]
    with pytest.raises(ConfigError, match="occurs twice"):
        Vocabularies(varied_vit(), [same], CONFIG)


def test_pieces_touch_at_corners_and_end_at_ignored_pixels():
    truth = np.array([[0, 1, 255, 1], [1, 0, 255, 1], [2, 0, 255, 7]])
    assert pieces(truth, 3) == {0: [3], 1: [2, 2], 2: [1]}
    assert pieces(np.full((2, 2), 255), 3) == {}


def hand_made(folder):
    """Two classes; wordings as given, a template, one synonym of the second, near misses."""
    given = ("cat", "dog")
    kinds = [
        Wording("given", "as given", given),
        Wording("template", "a {}", given, "a {}"),
        Wording("one synonym", "dog → hound", ("cat", "hound"), "", 1),
        Wording("near misses", "1 near misses added", ("cat", "dog", "fox", "wolf")),
    ]
    matrices = [
        np.array([[6, 2, 0], [0, 4, 0]]),  # IoU 6/8, 4/6
        np.array([[4, 4, 0], [0, 4, 0]]),  # 4/8, 4/8
        np.array([[8, 0, 0], [4, 0, 0]]),  # 8/12, 0
        np.array([[3, 1, 4, 0, 0], [0, 3, 0, 1, 0]]),  # 3/8, 3/5
    ]
    (folder / "classes.txt").write_text("cat\ndog\n")
    data = load_folder(folder)
    vocabularies = Vocabularies(varied_vit(), kinds, CONFIG)
    counted = Counted([m.astype(np.int64) for m in matrices], [[8], [1, 3]], np.array([1, 2]), [])
    return vocabulary_report.report(vocabularies, data, counted)


def test_report_by_hand(dataset):
    report = hand_made(dataset)
    cat, dog = report["classes"]
    assert report["miou"] == pytest.approx(100 * (6 / 8 + 4 / 6) / 2, abs=1e-3)
    assert (cat["pixels_percent"], cat["pieces"], cat["piece_pixels"]) == (66.667, 1, 8)
    assert (dog["photos"], dog["pieces"], dog["piece_pixels"]) == (2, 2, 2)
    # The synonym changes the dog alone, so it is no wording of the cat or of the whole.
    assert report["spread"]["wordings"] == cat["wording"]["wordings"] == 2
    assert report["spread"]["worst"] == "a {}"
    assert report["spread"]["lowest"] == 50
    assert cat["wording"]["mean"] == 62.5
    assert dog["wording"]["wordings"] == 3
    assert (dog["wording"]["lowest"], dog["wording"]["worst"]) == (0, "dog → hound")
    assert dog["wording"]["mean"] == pytest.approx(100 * (4 / 6 + 4 / 8) / 3, abs=1e-3)
    swap = report["wordings"][2]
    assert (swap["changed"], swap["iou"], swap["miou"]) == (
        {"dog": "hound"},
        0,
        pytest.approx(33.333),
    )
    # Three of the cat's eight pixels were right and are the fox's, which takes four.
    assert cat["near_misses"] == {"percent": 37.5, "most": "fox"}
    assert dog["near_misses"] == {"percent": 25, "most": "wolf"}
    near = report["near_misses"]
    assert near["accuracy_before"] == 100 * (6 / 8 + 4 / 4) / 2
    assert near["accuracy_after"] == 100 * (3 / 8 + 3 / 4) / 2
    assert near["pixels_percent"] == pytest.approx(100 * 5 / 12, abs=1e-3)
    assert near["miou_after"] == pytest.approx(100 * (3 / 8 + 3 / 5) / 2, abs=1e-3)
    assert report["confused"] == [{"true": "cat", "predicted": "dog", "pixels": 2, "percent": 25}]
    assert report["rank_correlation"]["pixels_percent"] is None  # two classes say nothing


def test_objects_hold_half_of_the_pixels_whatever_the_crumbs():
    assert vocabulary_report.object_area([1] * 99 + [200]) == 200
    assert vocabulary_report.object_area([10, 10, 10]) == 10
    assert vocabulary_report.object_area([50, 30, 20]) == 50
    assert vocabulary_report.object_area([49, 30, 21]) == 30


def test_rank_correlation_equals_scipy():
    draw = np.random.default_rng(0)
    first, second = draw.integers(0, 5, (2, 30)).astype(float).tolist()  # many equal values
    found = vocabulary_report.rank_correlation(first, second)
    assert found == pytest.approx(spearmanr(first, second).statistic, abs=1e-3)
    assert vocabulary_report.rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None


def test_absent_classes_have_no_figures_and_do_not_count(dataset):
    (dataset / "classes.txt").write_text("cat\ndog\nsky\nzebra\n")
    data = load_folder(dataset)
    vocabularies = Vocabularies(varied_vit(), make_wordings(data.classes, WORDS, ["a {}"]), CONFIG)
    counted = count_vocabularies(vocabularies, data)
    report = vocabulary_report.report(vocabularies, data, counted)
    zebra = report["classes"][3]
    assert zebra["iou"] is zebra["wording"] is zebra["piece_pixels"] is zebra["near_misses"] is None
    assert report["miou"] == pytest.approx(100 * mean_iou(counted.matrices[0]), abs=1e-3)
    assert "| zebra |  | 0.0 | 0 | 0 |  |" in markdown(report)


def test_report_is_json_and_a_page_with_every_part(dataset, tmp_path):
    pytest.importorskip("matplotlib")
    report = hand_made(dataset)
    assert json.loads(json.dumps(report))["classes"] == report["classes"]
    page = markdown(report)
    for part in ("Frequency and size", "Wording", "Near misses", "Confused", "dog → hound"):
        assert part in page
    first, second = ([path.read_bytes() for path in write_pictures(report, tmp_path / name)]
                     for name in "ab")  # fmt: skip
    assert first == second  # the same report gives the same bytes
    with Image.open(tmp_path / "a/wordings.png") as picture:
        assert picture.width > 500


def test_the_changed_words_of_a_wording_are_named(dataset):
    words = Thesaurus(
        concepts=(Concept(names=("cat", "kitty")), Concept(names=("dog", "hound"), near=("wolf",)))
    )
    data = load_folder(dataset)
    given = make_wordings(data.classes, words, [])
    vocabularies = Vocabularies(varied_vit(), given, CONFIG)
    counted = count_vocabularies(vocabularies, data)
    report = vocabulary_report.report(vocabularies, data, counted)
    changed = {row["kind"]: row["changed"] for row in report["wordings"]}
    assert changed["given"] == changed["near misses"] == {}
    assert changed["plural"] == {"cat": "cats", "dog": "dogs", "sky": "skies"}
    assert changed["synonyms"] == {"cat": "kitty", "dog": "hound"}
    assert changed["one synonym"] == {"dog": "hound"}
    page = markdown(report)
    assert "- 2 names by their synonym 1: cat → kitty, dog → hound" in page
    ends = [report["spread"]["worst"], report["spread"]["best"]]
    for end, label in zip(("Worst", "Best"), ends, strict=True):
        words = ", ".join(f"{old} → {new}" for old, new in next(
            row["changed"] for row in report["wordings"] if row["label"] == label).items())  # fmt: skip # noqa: E501
        assert (f"- {end}, {label}: {words}" in page.split("## ")[0]) == bool(words)
    assert {"synonyms", "plural"} & {row["kind"] for row in report["wordings"]
                                     if row["label"] in ends}  # fmt: skip


def test_wordings_by_hand():
    given = make_wordings(("cat", "dog", "sky"), WORDS, ["a {}"])
    assert given[0].names == ("cat", "dog", "sky")
    by_label = {wording.label: wording for wording in given}
    # "cat" stands among the dog's words but is a class of its own, as "sky" among near misses.
    assert by_label["cat → kitty"].names == ("kitty", "dog", "sky")
    assert [w.label for w in given if w.kind == "one synonym"] == [
        "cat → kitty", "dog → hound"
    ]  # fmt: skip
    assert by_label["names in plural"].names == ("cats", "dogs", "skies")
    assert given[-1].names == ("cat", "dog", "sky", "fox", "lynx", "wolf")


@pytest.mark.parametrize(
    ("name", "many"),
    [("cat", "cats"), ("bus", "buses"), ("dining table", "dining tables"), ("sky", "skies"),
     ("toy", "toys"), ("torch", "torches"), ("sofa, couch", "sofas, couches"),
     ("sheep", "sheep"), ("traffic light", "traffic lights"), ("y", "ies"),
     ("stairs", "stairs"), ("glass", "glasses"), ("cactus", "cactuses"),
     ("background, wall", "background, wall")],
)  # fmt: skip
def test_plurals(name, many):
    assert wordings.plural(name, {"sheep": "sheep"}) == many


def test_no_word_of_the_thesaurus_is_its_own_near_miss():
    words = wordings.load_thesaurus()
    assert len(words.concepts) > 100
    for concept in words.concepts:
        assert not {wordings.key(n) for n in concept.names} & {
            wordings.key(n) for n in concept.near
        }
    first = [concept.names[0] for concept in words.concepts]
    assert len(set(first)) == len(first)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[", "is not JSON"), ('{"concepts": [{"names": []}]}', r"wrong at concepts.0.names"),
     ('{"words": 1}', "wrong at words"), ("[" * 100_000, "is not JSON")],
)  # fmt: skip
def test_a_broken_thesaurus_is_one_line(tmp_path, text, message):
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        wordings.load_thesaurus(tmp_path / "own.json")
    with pytest.raises(ConfigError, match="cannot read the thesaurus"):
        wordings.load_thesaurus(tmp_path / "none.json")


def test_command_writes_report_page_and_pictures(dataset, run_dir, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    words = tmp_path / "words.json"
    words.write_text('{"concepts": [{"names": ["cat", "kitty"], "near": ["fox"]}]}')
    code = bias_command(
        dataset, model=str(run_dir), output=tmp_path / "out", thesaurus=words, short_side=64
    )
    assert code == 0
    out = capsys.readouterr().out
    assert "With 1 near misses" in out
    written = "report.md, report.json, frequency_and_size.png, wordings.png"
    assert out.endswith(f"{written} -> {tmp_path / 'out'}/\n")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["photos"] == 3
    assert report["near_misses"]["names"] == ["fox"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "report.json", "report.md", "frequency_and_size.png", "wordings.png", "pieces"
    }  # fmt: skip
