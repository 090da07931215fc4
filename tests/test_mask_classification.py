"""Naming of given masks: what stands for a mask, and the figures."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pixelclip.backbones import Backbone
from pixelclip.config import SegmentConfig
from pixelclip.errors import ConfigError, DataError
from pixelclip.evaluation.chosen import photos_of
from pixelclip.evaluation.datasets import SegmentationDataset, load_folder
from pixelclip.evaluation.maskclass import (
    classify_masks,
    crop_side,
    mask_embeddings,
    true_classes,
)
from pixelclip.evaluation.maskclass_report import as_table
from pixelclip.masks.annotations import open_masks
from pixelclip.masks.runs import from_labels, from_masks
from pixelclip.masks.superpixels import Superpixels
from pixelclip.segmenter import Segmenter
from tests.tiny import photo

CLASSES = ("cat", "dog", "grass", "sky")
CONFIG = SegmentConfig(short_side=64, templates="a photo of {}")


@pytest.fixture
def segmenter(tiny_vit) -> Segmenter:
    return Segmenter(tiny_vit, CLASSES, config=CONFIG, cache=False)


@pytest.fixture
def dataset(tmp_path) -> SegmentationDataset:
    """Three photos of different shapes with three classes in quarters, some pixels not labelled."""
    for part in ("images", "labels"):
        (tmp_path / "set" / part).mkdir(parents=True)
    (tmp_path / "set/classes.txt").write_text("\n".join(CLASSES))
    for index, (width, height) in enumerate([(90, 70), (60, 80), (64, 64)]):
        photo(width, height, seed=index).save(tmp_path / f"set/images/{index}.png")
        labels = np.full((height, width), 255, dtype=np.uint8)
        labels[: height // 2, : width // 2] = index
        labels[height // 2 :, : width // 2] = (index + 1) % 3
        labels[height // 2 :, width // 2 :] = index
        Image.fromarray(labels).save(tmp_path / f"set/labels/{index}.png")
    return load_folder(tmp_path / "set")


def decoded(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Maps [K, h, w] up-sampled to pixels one by one: cell centres, border cells go on outwards."""
    maps = np.zeros((len(grid), height, width))
    for y in range(height):
        for x in range(width):
            down = min(max((y + 0.5) * grid.shape[1] / height - 0.5, 0), grid.shape[1] - 1)
            right = min(max((x + 0.5) * grid.shape[2] / width - 0.5, 0), grid.shape[2] - 1)
            top, left = int(down), int(right)
            bottom, beyond = min(top + 1, grid.shape[1] - 1), min(left + 1, grid.shape[2] - 1)
            upper = grid[:, top, left] * (1 - right + left) + grid[:, top, beyond] * (right - left)
            lower = grid[:, bottom, left] * (1 - right + left)
            lower = lower + grid[:, bottom, beyond] * (right - left)
            maps[:, y, x] = upper * (1 - down + top) + lower * (down - top)
    return maps


def test_pooled_is_the_mean_over_pixels_of_cosines_upsampled_by_hand(segmenter):
    image = np.asarray(photo(64, 64))  # of whole cells, so that the grid covers just the photo
    prepared = segmenter.prepare(image)
    features = segmenter.grid_features(prepared)
    cosines = (features @ segmenter.text.T).permute(2, 0, 1).numpy().astype(np.float64)
    maps = decoded(cosines, 64, 64)
    draw = np.random.default_rng(0)
    masks = np.kron(draw.random((5, 16, 16)) < 0.3, np.ones((1, 4, 4))).astype(bool)  # they overlap
    embeddings = mask_embeddings(segmenter, image, from_masks(masks)) @ segmenter.text.T
    for embedding, mask in zip(embeddings, masks, strict=True):
        np.testing.assert_allclose(embedding, maps[:, mask].mean(axis=1), atol=2e-6)


def test_pooled_is_the_mean_feature_of_the_pixels(segmenter):
    image = np.asarray(photo(90, 70))
    masks = from_labels(np.arange(70)[:, None] // 30 * 3 + np.arange(90) // 40)
    result = segmenter(image, scores=True)
    embeddings = mask_embeddings(segmenter, image, masks)
    decoded = masks.sample(np.arange(70), np.arange(90))
    for embedding, mask in zip(embeddings, decoded, strict=True):
        expected = result.scores[:, mask].mean(axis=1)
        np.testing.assert_allclose(embedding @ segmenter.text.T, expected, atol=2e-6)


def test_pooled_of_a_photo_in_windows_is_the_same_mean(tiny_vit):
    config = CONFIG.model_copy(update={"window": 64})
    segmenter = Segmenter(tiny_vit, CLASSES, config=config, cache=False)
    image = np.asarray(photo(200, 70))
    assert len(segmenter.plan(200, 70).columns) > 1
    masks = from_labels(np.tile(np.arange(200) // 50, (70, 1)))
    scores = segmenter(image, scores=True).scores
    embeddings = mask_embeddings(segmenter, image, masks) @ segmenter.text.T
    for index in range(4):
        expected = scores[:, :, 50 * index : 50 * index + 50].mean(axis=(1, 2))
        np.testing.assert_allclose(embeddings[index], expected, atol=2e-6)


def crop_by_hand(backbone: Backbone, crop: np.ndarray, side: int) -> torch.Tensor:
    small = Image.fromarray(crop).resize((side, side), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255
    return backbone.pooled(pixels)[0]


@pytest.mark.parametrize("variant", ["crop", "masked-crop"])
def test_crops_are_the_boxes_of_masks(segmenter, variant):
    image = np.asarray(photo(90, 70))
    masks = np.zeros((11, 70, 90), dtype=bool)  # more than fit a batch
    for index in range(11):
        masks[index, 3 + index : 20 + 3 * index, 10:40] = True
        masks[index, 3 + index : 8 + index, 10:20] = False
        masks[index, 3 + index, 39] = True
    ours = mask_embeddings(segmenter, image, from_masks(masks), variant)
    backbone = segmenter.backbone
    for index, mask in enumerate(masks):
        filled = image.copy()
        if variant == "masked-crop":
            filled[~mask] = [round(255 * value) for value in backbone.card.mean]
        crop = filled[3 + index : 20 + 3 * index, 10:40]
        expected = crop_by_hand(backbone, crop, 64)
        torch.testing.assert_close(ours[index], expected, atol=1e-4, rtol=1e-4)


def test_crops_have_the_side_that_the_model_was_trained_with(segmenter, tiny_vit):
    assert crop_side(segmenter) == 64
    assert tiny_vit.card.square != 64


def test_the_class_of_a_mask_is_that_of_most_of_its_labelled_pixels():
    truth = np.full((4, 8), 255)
    truth[:, :3], truth[:, 3:5] = 1, 0
    masks = np.zeros((4, 4, 8), dtype=bool)
    masks[0, :, :5] = True  # 12 of class 1, 8 of class 0
    masks[1, :, 3:7] = True  # half of it is labelled
    masks[2, :, 4:7] = True  # a third
    masks[3, 0, 7] = True  # nothing
    assert true_classes(from_masks(masks), truth, 2).tolist() == [1, 0, 2, 2]


def test_of_classes_with_as_many_pixels_the_first_is_the_mask_s():
    truth = np.array([[1, 1, 0, 0]])
    assert true_classes(from_masks(np.ones((1, 1, 4), dtype=bool)), truth, 2).tolist() == [0]


def slow_precision(truth: list[bool], scores: list[float]) -> float:
    """Mean over the true ones of the precision at their score; equal scores count together."""
    total = 0.0
    for is_true, score in zip(truth, scores, strict=True):
        if is_true:
            above = [t for t, s in zip(truth, scores, strict=True) if s >= score]
            total += sum(above) / len(above)
    return total / sum(truth)


def test_figures_equal_those_by_hand(segmenter, dataset):
    report = classify_masks(segmenter, dataset)
    truths, tops, probabilities = [], [], []
    matrix = np.zeros((4, 4))
    for path, label_path in dataset.pairs:
        labels = np.asarray(Image.open(label_path))
        image = np.asarray(Image.open(path))
        masks = from_labels(labels, ignore=[255])
        cosines = F.normalize(mask_embeddings(segmenter, image, masks), dim=1) @ segmenter.text.T
        for value, line in zip(np.unique(labels), cosines.tolist(), strict=False):
            terms = [math.exp(segmenter.backbone.temperature * cosine) for cosine in line]
            truths.append(int(value))
            tops.append(line.index(max(line)))
            probabilities.append([term / sum(terms) for term in terms])
            matrix[value, tops[-1]] += (labels == value).sum()
    hits = [a == b for a, b in zip(truths, tops, strict=True)]
    assert report.num_masks == len(truths) == 6
    assert report.accuracy == pytest.approx(100 * sum(hits) / 6, abs=1e-3)
    per_class, precision, ious = [], [], []
    for k in range(3):
        own = [hit for hit, truth in zip(hits, truths, strict=True) if truth == k]
        per_class.append(sum(own) / len(own))
        scores = [line[k] for line in probabilities]
        precision.append(slow_precision([truth == k for truth in truths], scores))
        ious.append(matrix[k, k] / (matrix[k].sum() + matrix[:, k].sum() - matrix[k, k]))
        assert report.per_class[CLASSES[k]] == pytest.approx(
            {"masks": len(own), "accuracy": 100 * per_class[-1], "ap": 100 * precision[-1]},
            abs=1e-3,
        )
    assert report.per_class["sky"] is None
    assert report.mean_accuracy == pytest.approx(100 * sum(per_class) / 3, abs=1e-3)
    assert report.ap == pytest.approx(100 * sum(precision) / 3, abs=1e-3)
    assert report.miou == pytest.approx(100 * sum(ious) / 3, abs=1e-3)
    assert 0 < len(set(precision)) > 1


class Truth:
    """A reader that gives the true regions, with one more on pixels that are not labelled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, photo, size):
        labels = np.asarray(Image.open(self.folder / f"{photo.path.stem}.png"))
        return from_labels(labels) if photo.path.stem != "2" else None


def test_masks_of_a_reader_count_where_labels_are(segmenter, dataset, tmp_path):
    report = classify_masks(segmenter, dataset, masks=Truth(tmp_path / "set/labels"))
    assert (report.num_masks, report.left_out, report.photos) == (4, 2, 2)
    assert report.masks == "Truth"


def test_photos_that_nobody_made_masks_of_are_failed_not_wrong(segmenter, dataset, tmp_path):
    report = classify_masks(segmenter, dataset, masks=Truth(tmp_path / "set/labels"))
    assert len(report.failed) == 1
    assert "2.png has no masks in" in report.failed[0]
    two = replace(dataset, pairs=dataset.pairs[:2])
    assert classify_masks(segmenter, two).miou == report.miou


def test_label_maps_as_masks_give_what_the_true_regions_give(segmenter, dataset, tmp_path):
    first = classify_masks(segmenter, dataset)
    second = classify_masks(segmenter, dataset, masks=open_masks(tmp_path / "set/labels"))
    assert first.per_class == second.per_class
    assert first.miou == second.miou


class WithEmpty(Truth):
    """The true regions with an empty mask before them."""

    def __call__(self, photo, size):
        regions = np.asarray(Image.open(self.folder / f"{photo.path.stem}.png"))
        values = [-1, *np.unique(regions[regions != 255])]  # no pixel has the first
        return from_masks(np.stack([regions.astype(int) == value for value in values]))


@pytest.mark.parametrize("variant", ["pooled", "crop", "masked-crop"])
def test_empty_masks_are_nothing(segmenter, dataset, tmp_path, variant):
    reader = WithEmpty(tmp_path / "set/labels")
    with_empty = classify_masks(segmenter, dataset, masks=reader, variant=variant)
    without = classify_masks(segmenter, dataset, variant=variant)
    assert (with_empty.num_masks, with_empty.left_out) == (without.num_masks, 0)
    assert with_empty.per_class == without.per_class


def test_masks_of_a_source_are_made_of_the_photos(segmenter, dataset):
    report = classify_masks(segmenter, dataset, masks=Superpixels())
    assert report.num_masks > 3
    assert report.settings["masks"]["threshold"] == 0.85
    assert classify_masks(segmenter, dataset, masks="superpixels").per_class == report.per_class


def test_variants_differ_and_stand_in_the_table(segmenter, dataset):
    reports = [
        classify_masks(segmenter, dataset, variant=variant)
        for variant in ("pooled", "crop", "masked-crop")
    ]
    table = as_table(reports).splitlines()
    assert len(table) == 5
    assert table[0].startswith("| data set | model | masks | variant | number | left out | accur")
    assert [line.split(" | ")[3] for line in table[2:]] == ["pooled", "crop", "masked-crop"]
    assert len({line.split(" | ", 4)[4] for line in table[2:]}) > 1
    assert reports[1].settings["crop_side"] == 64


def test_a_broken_photo_does_not_stop_the_others(segmenter, dataset):
    dataset.pairs[1][0].write_bytes(b"no photo")
    report = classify_masks(segmenter, dataset)
    assert report.photos == 2
    assert len(report.failed) == 1


def test_nothing_to_name_is_an_error(segmenter, dataset):
    for _, label_path in dataset.pairs:
        with Image.open(label_path) as labels:
            blank = Image.new("L", labels.size, 255)
        blank.save(label_path)
    with pytest.raises(DataError, match="no mask of set lies on labelled pixels"):
        classify_masks(segmenter, dataset)
    for path, _ in dataset.pairs:
        path.unlink()
    with pytest.raises(DataError, match="none of the 3 photos could be used"):
        classify_masks(segmenter, dataset)


def test_wrong_arguments_are_named(segmenter, dataset, tiny_vit):
    with pytest.raises(ConfigError, match="unknown variant 'box'; available: pooled, crop, mask"):
        classify_masks(segmenter, dataset, variant="box")
    others = Segmenter(tiny_vit, ["cat"], config=CONFIG, cache=False)
    with pytest.raises(ConfigError, match="the segmenter's classes are not those of set"):
        classify_masks(others, dataset)


def test_photos_are_named_below_the_folder_that_all_lie_in(dataset):
    assert [photo.stem.as_posix() for photo in photos_of(dataset)] == ["0", "1", "2"]
    folder = dataset.pairs[0][0].parent
    pairs = tuple(
        (folder / place / "a.png", folder / "a.png") for place in ("ulm", "bonn/east", "ulm/b")
    )
    named = photos_of(replace(dataset, pairs=pairs))
    assert [photo.stem.as_posix() for photo in named] == ["ulm/a", "bonn/east/a", "ulm/b/a"]


class UpperHalf:
    """A reader of one mask, which covers the upper half of each photo."""

    def __call__(self, photo, size):
        return from_masks((np.arange(size[0]) < size[0] // 2)[None, :, None].repeat(size[1], 2))


@pytest.mark.parametrize("third", ["grass", "background"])
def test_under_no_mask_is_background_where_the_data_set_has_it(tiny_vit, dataset, third):
    own = replace(dataset, classes=("cat", "dog", third, "sky"), pairs=dataset.pairs[2:])
    segmenter = Segmenter(tiny_vit, own.classes, config=CONFIG, cache=False)
    image, labels = (np.asarray(Image.open(path)) for path in own.pairs[0])
    embedding = mask_embeddings(segmenter, image, UpperHalf()(None, labels.shape))[0]
    painted = np.full(labels.shape, 2 if third == "background" else -1)
    painted[: len(labels) // 2] = int((segmenter.text @ embedding).argmax())
    ious = []
    for k in np.unique(labels[labels != 255]):
        is_true, is_found = labels == k, (painted == k) & (labels != 255)
        ious.append((is_true & is_found).sum() / (is_true | is_found).sum())
    report = classify_masks(segmenter, own, masks=UpperHalf())
    assert report.miou == pytest.approx(100 * float(np.mean(ious)), abs=1e-3)
    assert (report.miou > 0) == (third == "background")
