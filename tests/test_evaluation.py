"""Metrics by hand and against scikit-learn; data sets in a folder."""

import json
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_erosion
from sklearn.metrics import confusion_matrix, jaccard_score

from pixelclip.config import SegmentConfig
from pixelclip.errors import ConfigError, DataError
from pixelclip.evaluation import metrics
from pixelclip.evaluation.datasets import dataset_names, load_folder
from pixelclip.evaluation.evaluate import evaluate, with_background
from pixelclip.evaluation.protocols import SUITES, published, settings_and_departures
from pixelclip.evaluation.table import Row, cells, markdown, our_rows
from pixelclip.images import write_json
from pixelclip.segmenter import Segmenter
from tests.tiny import photo, tiny_vit


def test_confusion_equals_scikit_learn():
    draw = np.random.default_rng(0)
    truth, labels = draw.integers(0, 7, (2, 50, 60))
    matrix = metrics.confusion(truth, labels, 7)
    expected = confusion_matrix(truth.ravel(), labels.ravel(), labels=range(7))
    np.testing.assert_array_equal(matrix[:, :7], expected)
    assert matrix[:, 7].sum() == 0
    scores = jaccard_score(truth.ravel(), labels.ravel(), average=None)
    np.testing.assert_allclose(metrics.iou_per_class(matrix), scores)


def test_by_hand():
    truth = np.array([[0, 0, 1, 255], [1, 1, 2, 255]])
    labels = np.array([[0, 1, 1, 0], [1, 255, 0, 2]])
    matrix = metrics.confusion(truth, labels, 4)
    np.testing.assert_array_equal(
        matrix, [[1, 1, 0, 0, 0], [0, 2, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    )
    # class 0: 1 hit of 2 true + 2 predicted - 1; class 1: 2 of 3 + 3 - 2; class 2: never hit;
    # class 3 does not occur and does not count.
    ious = metrics.iou_per_class(matrix)
    np.testing.assert_allclose(ious[:3], [1 / 3, 2 / 4, 0])
    assert np.isnan(ious[3])
    assert metrics.mean_iou(matrix) == pytest.approx((1 / 3 + 1 / 2) / 3)
    assert metrics.pixel_accuracy(matrix) == pytest.approx(3 / 6)
    assert metrics.mean_accuracy(matrix) == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)


def test_counts_equal_scikit_learn_with_847_classes_and_16_bits():
    draw = np.random.default_rng(2)
    truth = draw.integers(0, 847, (60, 70)).astype(np.uint16)
    labels = np.where(draw.random((60, 70)) < 0.5, truth, draw.integers(0, 847, (60, 70)))
    truth[:7] = 65535
    labels = labels.astype(np.uint16)
    labels[:, :3] = 65535  # no class
    counts = metrics.count_photo(truth, labels, 847)
    known = truth < 847
    predicted = np.minimum(labels, 847)
    expected = confusion_matrix(truth[known], predicted[known], labels=range(848))[:847]
    np.testing.assert_array_equal(counts.confusion, expected)
    scores = jaccard_score(
        truth[known], predicted[known], average=None, labels=range(847), zero_division=0
    )
    seen = expected.sum(axis=1) > 0
    np.testing.assert_allclose(metrics.iou_per_class(counts.confusion)[seen], scores[seen])
    assert np.isnan(metrics.iou_per_class(counts.confusion)[~seen]).all()


def boundary_by_erosion(mask, known, radius):
    """The paper's definition for one class: the mask without its erosion, outside being empty.

    What is not known is of every class, and does not count.
    """
    square = np.ones((3, 3))
    eroded = binary_erosion(mask | ~known, square, iterations=radius, border_value=0)
    return mask & known & ~eroded


def blobs(draw, height, width, num_classes):
    coarse = draw.integers(0, num_classes, (height // 9 + 1, width // 9 + 1))
    return np.kron(coarse, np.ones((9, 9), dtype=int))[:height, :width]


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("size", [(120, 90), (7, 300), (1, 1), (40, 41)])
def test_boundary_iou_equals_the_papers_definition_class_by_class(size, partly):
    draw = np.random.default_rng(3)
    truth, labels = blobs(draw, *size, 5), np.roll(blobs(draw, *size, 5), 2, axis=0)
    labels = np.where(draw.random(size) < 0.6, truth, labels)
    if partly:
        truth[: size[0] // 8, : size[1] // 3] = 255
        truth[draw.random(size) < 0.1] = 255
        truth[blobs(draw, *size, 2) == 1] = 255
    labels[draw.random(size) < 0.05] = 255  # no class
    radius = max(1, round(0.02 * float(np.sqrt(size[0] ** 2 + size[1] ** 2))))
    counts = metrics.count_photo(truth, labels, 5)
    known = truth < 5
    for k in range(5):
        true, found = (
            boundary_by_erosion(labels_of == k, known, radius) for labels_of in (truth, labels)
        )
        assert counts.boundary.intersection[k] == (true & found).sum()
        assert counts.boundary.union[k] == (true | found).sum()


def test_a_prediction_that_is_right_on_all_labelled_pixels_has_a_boundary_iou_of_1():
    draw = np.random.default_rng(5)
    truth = np.full((200, 260), 255, np.uint8)  # as in voc20: most is not labelled
    truth[50:90, 60:200], truth[90:150, 60:120], truth[94:150, 124:200] = 0, 1, 2
    labels = np.where(truth < 3, truth, blobs(draw, 200, 260, 4)).astype(np.uint8)
    counts = metrics.count_photo(truth, labels, 3)
    assert (counts.boundary.intersection > 0).all()
    np.testing.assert_array_equal(metrics.boundary_iou_per_class(counts), 1)
    np.testing.assert_array_equal(metrics.iou_per_class(counts.confusion), 1)


def test_boundary_iou_sees_the_edges_that_iou_does_not():
    truth = np.zeros((200, 200), np.uint8)
    truth[50:150, 50:150] = 1
    labels = np.zeros_like(truth)
    labels[54:146, 54:146] = 1
    counts = metrics.count_photo(truth, labels, 2)
    assert metrics.iou_per_class(counts.confusion)[1] == pytest.approx(92**2 / 100**2)
    # bands of 6 pixels: 100 - 88 wide in the truth, 92 - 80 in the prediction, 92 - 88 in both
    both, true, found = 92**2 - 88**2, 100**2 - 88**2, 92**2 - 80**2
    expected = both / (true + found - both)
    assert metrics.boundary_iou_per_class(counts)[1] == pytest.approx(expected)


def test_counts_of_photos_add_up_to_those_of_all_pixels():
    draw = np.random.default_rng(4)
    photos = [(blobs(draw, 30, 40, 6), blobs(draw, 30, 40, 6)) for _ in range(3)]
    total = metrics.no_counts(6)
    for truth, labels in photos:
        total += metrics.count_photo(truth, labels, 6)
    every = [np.concatenate(part) for part in zip(*photos, strict=True)]
    np.testing.assert_array_equal(total.confusion, metrics.confusion(*every, 6))
    np.testing.assert_array_equal(
        total.boundary.union,
        sum(metrics.count_photo(*pair, 6).boundary.union for pair in photos),
    )


def test_frequency_weighted_iou_by_hand():
    matrix = np.array([[6, 2, 0], [1, 1, 0]])
    assert metrics.frequency_weighted_iou(matrix) == pytest.approx((8 * 6 / 9 + 2 * 1 / 4) / 10)


def test_no_class_is_the_background_where_there_is_one(dataset):
    (dataset / "classes.txt").write_text("background, backdrop\ndog\nsky\n")
    labels = np.array([[0, 255], [2, 255]], np.uint8)
    found = with_background(labels, load_folder(dataset))
    np.testing.assert_array_equal(found, [[0, 0], [2, 0]])
    assert found.dtype == np.uint8
    (dataset / "classes.txt").write_text("cat\ndog\nsky\n")
    np.testing.assert_array_equal(with_background(labels, load_folder(dataset)), labels)


def test_every_preset_has_settings_for_every_data_set(dataset):
    plain = load_folder(dataset)
    config, departures = settings_and_departures("default", {}, plain)
    assert (config, departures) == (SegmentConfig(), [])
    config, departures = settings_and_departures("authors", {"short_side": 640}, plain)
    assert (config.preset, config.short_side, config.templates) == (
        "authors", 640, "imagenet-select"
    )  # fmt: skip
    assert departures == ["short_side is 640; the protocol says the model's own"]
    config, departures = settings_and_departures("sliding", {}, replace(plain, name="cityscapes"))
    assert (config.window, config.overlap, config.short_side) == (224, 0.5, 560)
    assert config.background == "none"
    with_background = replace(
        plain, classes=("background", "b", "c"), lacking=("3 photos were found; the set has 9",)
    )
    config, departures = settings_and_departures("sliding", {}, with_background)
    assert (config.background, config.threshold, config.short_side) == ("threshold", 0.1, 336)
    assert departures[-1] == "3 photos were found; the set has 9"
    with pytest.raises(ConfigError, match=r"unknown --preset 'slide'; available: default, authors"):
        settings_and_departures("slide", {}, plain)


def test_suites_and_published_figures_name_data_sets_there_are():
    for name in SUITES:
        assert set(SUITES[name].sets) <= set(dataset_names())
    assert len(SUITES["eight"].sets) == 8
    lines = published()
    assert {name for line in lines for name in line.mious} <= set(dataset_names())
    sclip = next(line for line in lines if line.method.startswith("SCLIP"))
    assert "cityscapes" not in sclip.mious  # not published, so blank
    assert sclip.mious["voc20"] == 81.5


def test_the_copy_of_the_published_figures_is_the_original(shared_dir):
    copy = files("pixelclip").joinpath("data/published.json").read_bytes()
    assert copy == (shared_dir / "reference/published.json").read_bytes()


def test_a_mean_is_blank_where_a_set_is_missing(dataset, segmenter):
    report = evaluate(segmenter, load_folder(dataset))
    (row,) = our_rows([report], [report["dataset"], "voc20"])
    assert row.values == (report["miou"], None)
    assert row.mean is None
    text = markdown(cells([row, Row("a | b", "them", (1.0, 2.0))], ["own", "voc20"]))
    assert text.splitlines()[1] == "| --- | ---: | ---: | ---: | --- |"
    assert text.splitlines()[3] == "| a \\| b | 1.0 | 2.0 | 1.5 | them |"


def test_ignored_pixels_are_no_errors_even_when_255_is_predicted():
    truth = np.full((3, 3), 255)
    assert metrics.confusion(truth, truth, 2).sum() == 0


def test_miou_does_not_depend_on_class_order():
    draw = np.random.default_rng(1)
    truth, labels = draw.integers(0, 9, (2, 40, 40))
    order = draw.permutation(9)
    first = metrics.mean_iou(metrics.confusion(truth, labels, 9))
    second = metrics.mean_iou(metrics.confusion(order[truth], order[labels], 9))
    assert first == pytest.approx(second)


@pytest.fixture
def dataset(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "classes.txt").write_text("cat\ndog\nsky\n")
    draw = np.random.default_rng(0)
    for index in range(3):
        photo(50, 40, index).save(tmp_path / f"images/{index}.jpg")
        labels = draw.integers(0, 3, (40, 50)).astype(np.uint8)
        labels[:5] = 255
        Image.fromarray(labels).save(tmp_path / f"labels/{index}.png")
    return tmp_path


@pytest.fixture(scope="module")
def segmenter():
    config = SegmentConfig(templates="name")
    return Segmenter(tiny_vit(), ("cat", "dog", "sky"), config=config, cache=False)


def test_report_is_that_of_all_pixels_together(dataset, segmenter):
    report = evaluate(segmenter, load_folder(dataset))
    truth, labels = [], []
    for index in range(3):
        truth.append(np.asarray(Image.open(dataset / f"labels/{index}.png")).ravel())
        labels.append(segmenter(dataset / f"images/{index}.jpg").labels.ravel())
    truth, labels = np.concatenate(truth), np.concatenate(labels)
    counted = truth != 255
    scores = jaccard_score(truth[counted], labels[counted], average=None, labels=range(3))
    assert report["miou"] == pytest.approx(100 * scores.mean(), abs=1e-3)
    assert list(report["per_class"].values()) == pytest.approx(100 * scores, abs=1e-3)
    accuracy = (truth == labels)[counted].mean()
    assert report["pixel_accuracy"] == pytest.approx(100 * accuracy, abs=1e-3)
    assert report["photos"] == 3


def test_report_is_written_as_json(dataset, segmenter, tmp_path):
    report = evaluate(segmenter, load_folder(dataset))
    write_json(tmp_path / "deep/report.json", report)
    stored = json.loads((tmp_path / "deep/report.json").read_text())
    assert stored["miou"] == report["miou"]
    assert stored["settings"]["preset"] == "default"
    assert len(stored["settings"]["classes_sha256"]) == 64


def test_broken_pairs_are_listed_and_the_others_count(dataset, segmenter):
    (dataset / "images/1.jpg").write_bytes(b"broken")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(dataset / "labels/2.png")
    report = evaluate(segmenter, load_folder(dataset))
    assert report["photos"] == 1
    assert len(report["failed"]) == 2
    assert "its photo" in report["failed"][1]


def test_label_values_beyond_the_classes_are_named(dataset, segmenter):
    for index in range(3):
        Image.fromarray(np.full((40, 50), 7, np.uint8)).save(dataset / f"labels/{index}.png")
    with pytest.raises(DataError, match=r"holds the value 7, but there are 3 classes"):
        evaluate(segmenter, load_folder(dataset))


def test_a_folder_that_is_not_there_is_said_to_be_so(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        load_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["images", "labels", "classes.txt"])
def test_missing_parts_of_a_data_set_are_named(dataset, part):
    (dataset / part).rename(dataset / "elsewhere")
    with pytest.raises(DataError, match=f"has no {part}"):
        load_folder(dataset)


def test_a_photo_without_labels_is_listed_and_the_others_count(dataset, segmenter):
    (dataset / "labels/1.png").unlink()
    report = evaluate(segmenter, load_folder(dataset))
    assert report["photos"] == 2
    assert "1.png" in report["failed"][0]


def test_an_empty_line_between_class_names_is_refused(dataset):
    (dataset / "classes.txt").write_text("cat\n\nsky\n")
    with pytest.raises(DataError, match="class 2 of 3 is empty"):
        load_folder(dataset)


def test_class_names_may_come_from_any_editor(dataset):
    (dataset / "classes.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\nsky\r\n\r\n")
    assert load_folder(dataset).classes == ("cat", "dog", "sky")


def test_strange_files_among_the_photos_are_passed_over(dataset):
    (dataset / "images/._0.jpg").write_bytes(b"x")
    (dataset / "images/.DS_Store").write_bytes(b"x")
    (dataset / "labels/0.png").rename(dataset / "labels/0.PNG")
    pairs = load_folder(dataset).pairs
    assert len(pairs) == 3
    assert pairs[0][1].name == "0.PNG"


def test_a_set_without_any_labelled_pixel_is_an_error(dataset, segmenter):
    for index in range(3):
        Image.fromarray(np.full((40, 50), 255, np.uint8)).save(dataset / f"labels/{index}.png")
    with pytest.raises(DataError, match="no pixel of"):
        evaluate(segmenter, load_folder(dataset))
