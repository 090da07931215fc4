"""`pixelclip bias` as a job: shared out, killed, resumed; what is a near miss of what."""

import json
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from pixelclip.backbones import save_backbone
from pixelclip.backbones.means import Means
from pixelclip.biasjob import PIECE, BiasJob, run_bias_job
from pixelclip.config import SegmentConfig
from pixelclip.errors import ConfigError, DataError
from pixelclip.evaluation.datasets import load_folder
from pixelclip.evaluation.evaluate import evaluate
from pixelclip.evaluation.metrics import mean_iou
from pixelclip.evaluation.vocabularies import Vocabularies, count_vocabularies
from pixelclip.evaluation.vocabulary_files import _offsets
from pixelclip.evaluation.vocabulary_pieces import read_counted, write_counted
from pixelclip.evaluation.wordings import (
    Concept,
    Thesaurus,
    load_thesaurus,
    make_wordings,
    near_misses,
)
from pixelclip.segmenter import Segmenter
from pixelclip.vocabulary import class_lists
from tests.tiny import photo, tiny_vit
from tests.training import run
from tests.varied import varied_vit

WORDS = '{"concepts": [{"names": ["cat", "kitty"], "near": ["fox"]}]}'


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A data set of three pieces, the last photo broken; a model; a thesaurus."""
    folder = tmp_path_factory.mktemp("given")
    for part in ("images", "labels"):
        (folder / "set" / part).mkdir(parents=True)
    (folder / "set/classes.txt").write_text("cat\ndog\nsky\n")
    draw = np.random.default_rng(0)
    for index in range(2 * PIECE + 1):
        photo(50, 40, index).save(folder / f"set/images/{index}.png")
        labels = draw.integers(0, 3, (40, 50)).astype(np.uint8)
        Image.fromarray(labels).save(folder / f"set/labels/{index}.png")
    (folder / f"set/images/{2 * PIECE}.png").write_bytes(b"broken")
    (folder / "words.json").write_text(WORDS)
    save_backbone(tiny_vit(), folder / "vit.safetensors")
    return folder


def job(given, output, **changes):
    own = {"data": given / "set", "thesaurus": given / "words.json", "pictures": False}
    own["settings"] = {"templates": "name", "short_side": 64}
    means = Means(str(given / "vit.safetensors"), device="cpu")
    return BiasJob(means, output, quiet=True, **{**own, **changes})


@pytest.fixture(scope="module")
def made(given, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    assert run_bias_job(job(given, out, workers=1)) == 1
    return out


def test_two_processes_give_the_same_bytes(given, made, tmp_path):
    assert run_bias_job(job(given, tmp_path, workers=2)) == 1
    for name in ("report.json", "report.md"):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()


def test_figures_are_those_of_counting_at_once(given, made):
    dataset = load_folder(given / "set")
    config = SegmentConfig(templates="name", short_side=64)
    wordings = make_wordings(dataset.classes, load_thesaurus(given / "words.json"))
    counted = count_vocabularies(Vocabularies(tiny_vit(), wordings, config), dataset)
    report = json.loads((made / "report.json").read_text())
    assert report["failed"] == counted.failed
    assert len(report["failed"]) == 1
    assert report["photos"] == 2 * PIECE
    assert [row["pieces"] for row in report["classes"]] == list(map(len, counted.piece_areas))


def test_a_killed_report_goes_on_to_the_same_bytes(given, made, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = [
        "bias", "--data", given / "set", "-m", given / "vit.safetensors", "-o", out, "--no-plots",
        "--thesaurus", given / "words.json", "--templates", "name", "--short-side", "64",
        "--device", "cpu", "--workers", "1",
    ]  # fmt: skip
    code, text = run([*map(str, arguments)], log, signal_at=(signal.SIGKILL, f"{out}/pieces", 6))
    assert code == -signal.SIGKILL, text
    assert not (out / "report.json").exists()
    (first,) = (out / "pieces").rglob("00000.npz")
    written = first.stat().st_mtime_ns
    code, text = run([*map(str, arguments)], log)
    assert code == 1, text
    assert first.stat().st_mtime_ns == written
    assert (out / "report.json").read_bytes() == (made / "report.json").read_bytes()


def test_changed_photos_and_words_are_counted_anew(given, made, tmp_path):
    out = shutil.copytree(made, tmp_path / "out")
    data = shutil.copytree(given / "set", tmp_path / "set")
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(data / "labels/0.png")
    run_bias_job(job(given, out, data=data))
    report = json.loads((out / "report.json").read_text())
    assert report["classes"] != json.loads((made / "report.json").read_text())["classes"]
    (tmp_path / "words.json").write_text(WORDS.replace("fox", "lynx"))
    run_bias_job(job(given, out, thesaurus=tmp_path / "words.json"))
    assert json.loads((out / "report.json").read_text())["near_misses"]["names"] == ["lynx"]


def test_damaged_pieces_are_made_again(given, made, tmp_path):
    out = shutil.copytree(made, tmp_path / "out")
    (path,) = (out / "pieces").rglob("00000.npz")
    path.write_bytes(path.read_bytes()[:-50])
    run_bias_job(job(given, out))
    assert (out / "report.json").read_bytes() == (made / "report.json").read_bytes()


def test_a_piece_is_read_as_it_was_written_and_refused_if_it_is_another(given, tmp_path):
    dataset = load_folder(given / "set")
    words = make_wordings(dataset.classes, load_thesaurus(given / "words.json"), ["a {}"])
    config = SegmentConfig(short_side=64)
    counted = count_vocabularies(Vocabularies(varied_vit(), words, config), dataset)
    path, pairs = tmp_path / "piece.npz", len(dataset.pairs)
    write_counted(path, "mine", counted)
    found = read_counted(path, "mine", words, 3, pairs)
    for mine, theirs in zip(counted.matrices, found.matrices, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert found.piece_areas == counted.piece_areas
    assert found.errors == counted.errors
    np.testing.assert_array_equal(found.photos, counted.photos)
    for changed in (("other", words, 3, pairs), ("mine", words[:1], 3, pairs),
                    ("mine", words, 2, pairs), ("mine", words, 3, pairs - 1)):  # fmt: skip
        assert read_counted(path, *changed) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "give one data set"),
        ({"dataset": "voc20"}, "give one data set"),
        ({"data": None, "dataset": "voc20"}, "--dataset needs --root"),
        ({"data": None, "dataset": "voc2"}, "unknown data set 'voc2'"),
        ({"preset": "mine"}, "unknown --preset 'mine'"),
    ],
)
def test_what_makes_no_sense_is_one_line(given, tmp_path, changes, message):
    if changes.get("dataset") == "voc2":
        changes = {**changes, "root": tmp_path}
    with pytest.raises(ConfigError, match=message):
        run_bias_job(job(given, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_official_downloads_are_read_with_their_notes(given, tmp_path):
    root = tmp_path / "VOC2012"
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / part).mkdir(parents=True)
    for index in range(2):
        photo(50, 40, index).save(root / f"JPEGImages/{index}.jpg")
        Image.fromarray(np.full((40, 50), 1 + index, np.uint8)).save(
            root / f"SegmentationClass/{index}.png"
        )
    (root / "ImageSets/Segmentation/val.txt").write_text("0\n1\n")
    own = {"data": None, "dataset": "voc20", "root": tmp_path, "settings": {"short_side": 64}}
    assert run_bias_job(job(given, tmp_path / "out", **own)) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["photos"] == 2
    assert any("2 photos were found" in line for line in report["departures"])
    assert report["classes_sha256"] in json.dumps(report)


def test_one_class_without_any_known_words_has_a_report(given, tmp_path):
    data = tmp_path / "set"
    shutil.copytree(given / "set", data)
    (data / "classes.txt").write_text("qwzx\n")
    for path in (data / "labels").iterdir():
        Image.fromarray(np.zeros((40, 50), np.uint8)).save(path)
    pytest.importorskip("matplotlib")
    run_bias_job(job(given, tmp_path / "out", data=data, pictures=True))
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["miou"] == 100
    assert report["near_misses"] is None
    assert report["confused"] == []
    page = (tmp_path / "out/report.md").read_text()
    assert "Confused" not in page


def test_no_class_is_background_as_in_eval(given, tmp_path):
    data = shutil.copytree(given / "set", tmp_path / "set")
    (data / "classes.txt").write_text("background, wall\ndog\ncat\n")
    dataset = load_folder(data)
    config = SegmentConfig(templates="name", short_side=64, background="threshold", threshold=0.4)
    words = make_wordings(dataset.classes, load_thesaurus(given / "words.json"), ["a {}"])
    counted = count_vocabularies(Vocabularies(varied_vit(), words, config), dataset)
    expected = evaluate(Segmenter(varied_vit(), dataset.classes, config=config), dataset)
    assert 100 * mean_iou(counted.matrices[0]) == pytest.approx(expected["miou"], abs=1e-3)
    assert counted.matrices[0][:, 0].sum() > 0
    for matrix in counted.matrices:
        assert not matrix[:, -1].any()


# Words


def test_the_background_is_called_nothing_else():
    words = Thesaurus(concepts=(Concept(names=("wall", "partition"), near=("cliff",)),))
    given = make_wordings(("background, wall", "dog"), words, ["a {}"])
    assert {wording.names[0] for wording in given} == {"background, wall"}
    assert near_misses(("background, wall", "dog"), words) == []


# What the data sets' makers count as a class: VOC's annotation guidelines, the class definitions of
# Cityscapes, CamVid's eleven groups.
COUNTED = {
    "voc-20": "glider tricycle unicycle scooter moped donkey mule pony minibus van ship"
    " armchair deckchair monitor",
    "cityscapes-19": "tram gate curb hedge bush moss tree grass shopper jogger passenger van",
    "pascal-context-59": "glider tricycle unicycle scooter donkey van bush hedge",
    "coco-stuff-171": "wall floor window table scooter van tram panda mattress",
}


@pytest.mark.parametrize("name", COUNTED)
def test_near_misses_are_nothing_that_counts_as_a_class(name):
    near = near_misses(class_lists()[name], load_thesaurus())
    assert len(near) > 20
    assert not set(near) & set(COUNTED[name].split())


@pytest.mark.parametrize("name", class_lists())
def test_near_misses_share_no_whole_name_with_a_class(name):
    classes = [set(part.replace("-", " ").casefold().split())
               for one in class_lists()[name] for part in one.split(",")]  # fmt: skip
    for near in near_misses(class_lists()[name], load_thesaurus()):
        own = set(near.split())
        assert not any(own <= words or words <= own for words in classes), near


def test_names_that_would_coincide_stay_as_given():
    words = Thesaurus(
        plurals={"clouds": "clouds"},
        concepts=(
            Concept(names=("cloud", "vapour")), Concept(names=("fog", "vapour")),
            Concept(names=("dog", "hound")), Concept(names=("cat", "kitty")),
        ),
    )  # fmt: skip
    given = make_wordings(("cloud", "clouds", "fog", "dog", "cat"), words, ["a {}"])
    by_kind = {wording.kind: wording for wording in given}
    assert by_kind["plural"].names == ("cloud", "clouds", "fogs", "dogs", "cats")
    assert by_kind["synonyms"].names == ("cloud", "clouds", "fog", "hound", "kitty")
    assert by_kind["synonyms"].label == "2 names by their synonym 1"


def test_a_synonym_of_one_class_alone_is_tried_once():
    words = Thesaurus(concepts=(Concept(names=("cat", "kitty")),))
    kinds = [wording.kind for wording in make_wordings(("cat", "dog"), words, ["a {}"])]
    assert kinds.count("synonyms") == 0
    assert kinds.count("one synonym") == 1


def test_each_name_is_encoded_once(given, tmp_path, monkeypatch):
    monkeypatch.setenv("PIXELCLIP_CACHE", str(tmp_path))
    backbone, texts = varied_vit(), []
    backbone.text.register_forward_hook(lambda _, inputs, __: texts.append(len(inputs[0])))
    classes = load_folder(given / "set").classes
    words = Thesaurus(concepts=(Concept(names=("dog", "a", "b", "c", "d"), near=("e",)),))
    wordings = make_wordings(classes, words, ["a {}"])
    assert sum(wording.templates == "" for wording in wordings) == 7
    Vocabularies(backbone, wordings, SegmentConfig(templates="name"))
    # Three as given, three in the template; the plurals cats, dogs, skies; a, b, c, d and e.
    assert sum(texts) == 3 + 3 + 3 + 4 + 1


def test_names_in_the_picture_never_overlap():
    points = np.array([[100.0, 100.0], [101, 100], [102, 101], [300, 300]])
    found = _offsets(points, ["horse", "motorbike", "car", "bus"])
    boxes = [
        (x + offset[0], y + offset[1], x + offset[0] + 4 * len(name), y + offset[1] + 7)
        for (x, y), offset, name in zip(points, found, ["horse", "motorbike", "car", "bus"],
                                        strict=True) if offset
    ]  # fmt: skip
    assert len(boxes) >= 3
    for first, one in enumerate(boxes):
        for other in boxes[first + 1 :]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or (
                other[3] <= one[1]
            )  # fmt: skip


def test_photos_that_failed_are_tried_again(given, tmp_path):
    data = shutil.copytree(given / "set", tmp_path / "set")
    photo(50, 40).save(data / f"images/{2 * PIECE}.png")
    settings = {"templates": "name", "short_side": 64}
    with pytest.raises(DataError, match="none of the photos could be used"):
        run_bias_job(job(given, tmp_path / "out", data=data, settings=settings | {"max_pixels": 9}))
    assert run_bias_job(job(given, tmp_path / "out", data=data, settings=settings)) == 0
