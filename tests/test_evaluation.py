"""Metrics by hand and against scikit-learn; data sets in a folder."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score

from pixelclip.config import SegmentConfig
from pixelclip.errors import DataError
from pixelclip.evaluation import metrics
from pixelclip.evaluation.datasets import load_folder
from pixelclip.evaluation.evaluate import evaluate, write_report
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
    write_report(tmp_path / "deep/report.json", report)
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
