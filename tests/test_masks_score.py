"""Scores of masks against regions that people drew."""

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from pixelclip.errors import DataError
from pixelclip.masks.runs import from_masks
from pixelclip.masks.score import open_truth, score, score_photo
from pixelclip.photos import find_photos

SIZE = (12, 10)


def blocks(*boxes, size=SIZE):
    """Masks that are boxes: first row, last row, first column, last column."""
    masks = np.zeros((len(boxes), *size), dtype=bool)
    for mask, (top, bottom, left, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return from_masks(masks)


LEFT, RIGHT, ALL = (0, 12, 0, 5), (0, 12, 5, 10), (0, 12, 0, 10)


def test_perfect_masks_score_one_everywhere():
    found = score_photo(blocks(LEFT, RIGHT), [blocks(RIGHT, LEFT)])
    assert (found.best_iou.tolist(), found.covering) == ([1.0, 1.0], 1.0)
    assert (found.masks, found.coverage) == (2, 1.0)


@pytest.mark.parametrize("masks", [blocks(), blocks((3, 3, 0, 0)), blocks(RIGHT)])
def test_no_mask_there_scores_zero(masks):
    found = score_photo(masks, [blocks(LEFT)])
    assert (found.best_iou.tolist(), found.covering) == ([0.0], 0.0)


def test_half_a_region_has_half_the_iou_and_weighs_as_many_pixels_as_it_has():
    found = score_photo(
        blocks((0, 6, 0, 8), (0, 12, 8, 10)), [blocks((0, 12, 0, 8), (0, 12, 8, 10))]
    )
    assert found.best_iou.tolist() == [0.5, 1.0]
    assert found.covering == pytest.approx(0.8 * 0.5 + 0.2 * 1.0)
    assert found.coverage == pytest.approx(0.4 + 0.2)


def test_nested_masks_are_each_compared_whole_and_covered_pixels_count_once():
    found = score_photo(blocks(ALL, LEFT, (0, 6, 0, 5)), [blocks(LEFT), blocks(ALL, (0, 6, 0, 5))])
    assert found.best_iou.tolist() == [1.0, 1.0, 1.0]
    assert found.coverage == 1.0


def test_pixels_outside_all_regions_cost_a_mask_iou():
    assert score_photo(blocks(ALL), [blocks((0, 12, 0, 2))]).best_iou.tolist() == [0.2]


def test_covering_is_the_mean_over_people():
    one, other = blocks(LEFT, RIGHT), blocks(ALL)
    masks = blocks(LEFT, RIGHT)
    assert score_photo(masks, [one]).covering == 1.0
    assert score_photo(masks, [other]).covering == 0.5
    assert score_photo(masks, [one, other, blocks()]).covering == 0.75  # the last drew nothing


def test_masks_and_regions_of_different_frames_are_not_compared():
    with pytest.raises(DataError, match=r"of 10 x 12 pixels cannot .* regions of 12 x 10"):
        score_photo(blocks(ALL), [blocks(ALL, size=(10, 12))])
    with pytest.raises(DataError, match="no region"):
        score_photo(blocks(ALL), [blocks()])


stacks = array_shapes(min_dims=2, max_dims=2, max_side=9).flatmap(
    lambda shape: st.tuples(
        *(
            st.integers(least, 6).flatmap(lambda count: arrays(bool, (count, *shape)))
            for least in (0, 1)
        )
    )
)


@settings(deadline=None)
@given(stacks, st.randoms(use_true_random=False))
def test_figures_are_those_of_masks_as_pixels_in_any_order(pair, random):
    masks, regions = pair
    if not regions.any():
        return
    order = random.sample(range(len(masks)), len(masks))
    found = score_photo(from_masks(masks[order]), [from_masks(regions)])
    best = [
        max((float((m & r).sum() / (m | r).sum()) for m in masks), default=0.0)
        for r in regions
        if r.any()
    ]
    assert found.best_iou.tolist() == best
    areas = [int(r.sum()) for r in regions if r.any()]
    covering = sum(a * b for a, b in zip(areas, best, strict=True)) / sum(areas)
    assert found.covering == pytest.approx(covering, abs=1e-12)
    assert found.coverage == masks.any(axis=0).mean()


def save(path, labels, dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(labels, dtype=dtype)).save(path)


@pytest.fixture
def photos(tmp_path):
    for name in ("a", "b", "c"):
        save(tmp_path / "images" / f"{name}.png", np.zeros((*SIZE, 3)))
    return find_photos([tmp_path / "images"])


def halves():
    labels = np.zeros(SIZE, dtype=np.uint8)
    labels[:, 5:] = 1
    return labels


class Fixed:
    """A reader that has the same masks for every photo but some."""

    def __init__(self, masks, without=()):
        self.masks, self.without = masks, without

    def __call__(self, photo, size):
        return None if photo.path.stem in self.without else self.masks


def test_regions_of_all_photos_count_once_and_the_rest_is_a_mean_over_photos(photos, tmp_path):
    save(tmp_path / "labels/a.png", halves())
    save(tmp_path / "labels/b.png", halves() * 0)
    found = score(Fixed(blocks(LEFT)), photos, open_truth(tmp_path, photos), quiet=True)
    assert asdict(found) == {
        "recall_50": pytest.approx(2 / 3),  # 1, 0 and 0.5
        "recall_70": pytest.approx(1 / 3),
        "mean_best_iou": pytest.approx(1.5 / 3),
        "covering": pytest.approx((0.5 + 0.5) / 2),
        "masks_per_photo": 1.0,
        "coverage": 0.5,
        "photos": 2,
        "regions": 3,
        "failed": (),
    }


def test_each_persons_map_is_read_and_every_value_is_a_region(photos, tmp_path):
    apart = np.ones(SIZE)
    apart[:, 4:6] = 255  # a number like any other
    save(tmp_path / "labels/a_0.png", apart, np.uint16)
    save(tmp_path / "labels/a_1.png", halves() + 1, np.uint16)
    save(tmp_path / "labels/a_3.png", halves(), np.uint16)  # beyond a gap
    for path in (tmp_path, tmp_path / "labels"):
        truth = open_truth(path, photos)
        people = truth(photos[0], SIZE)
        assert [person.areas().tolist() for person in people] == [[96, 24], [60, 60]]
        assert truth(photos[1], SIZE) == []


def test_connected_pieces_of_a_class_are_regions_and_255_and_crumbs_are_none(tmp_path):
    save(tmp_path / "images/a.jpg", np.zeros((100, 80, 3)))
    photos = find_photos([tmp_path / "images"])
    labels = np.full((100, 80), 255)
    labels[10:20, 10:20] = 7
    labels[20:30, 20:30] = 7  # touches at a corner: one piece
    labels[50:60, 10:20] = 7
    labels[50:60, 20:30] = 0  # a neighbour of another class
    labels[90, 0:8] = 3  # 8 of 8000 pixels, the least
    labels[95, 0:7] = 3
    save(tmp_path / "labels/a.png", labels)
    (truth,) = open_truth(tmp_path, photos)(photos[0], (100, 80))
    assert sorted(truth.areas().tolist()) == [8, 100, 100, 200]


def test_label_maps_with_many_classes_ignore_65535(photos, tmp_path):
    labels = halves().astype(np.uint16) * 299 + 1
    labels[:2], labels[2] = 65535, 255
    save(tmp_path / "labels/a.png", labels, np.uint16)
    (truth,) = open_truth(tmp_path, photos)(photos[0], SIZE)
    assert sorted(truth.areas().tolist()) == [10, 45, 45]


def test_other_masks_are_taken_for_regions(photos, tmp_path):
    boxes = '{"image": {"height": 12, "width": 10}, "annotations": [%s]}'
    ring = '{"segmentation": [[0, 0, 5, 0, 5, 12, 0, 12]]}'
    (tmp_path / "sa1b").mkdir()
    (tmp_path / "sa1b/a.json").write_text(boxes % ring)
    found = score(Fixed(blocks(LEFT)), photos, open_truth(tmp_path / "sa1b", photos), quiet=True)
    assert (found.regions, found.mean_best_iou, found.photos) == (1, 1.0, 1)


def test_photos_that_cannot_be_scored_are_listed_and_left_out(photos, tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "labels" / f"{name}.png", halves())
    save(tmp_path / "labels/c.png", np.zeros((10, 12)))
    reader = Fixed(blocks(LEFT, RIGHT), without=("b",))
    found = score(reader, photos, open_truth(tmp_path, photos), quiet=True)
    assert (found.photos, found.recall_50) == (1, 1.0)
    assert len(found.failed) == 2
    assert "b.png has no masks" in found.failed[0]
    assert "12 x 10 pixels, but the upright photo has 10 x 12" in found.failed[1]


def test_a_damaged_map_of_regions_is_an_error(photos, tmp_path):
    save(tmp_path / "labels/a.png", halves())
    whole = (tmp_path / "labels/a.png").read_bytes()
    (tmp_path / "labels/a.png").write_bytes(whole[:-30])
    truth = open_truth(tmp_path, photos)
    with pytest.raises(DataError, match=r"cannot read label map .*a\.png"):
        truth(photos[0], SIZE)
    with pytest.raises(DataError, match=r"none of the photos could be scored; first: .*a\.png"):
        score(Fixed(blocks(ALL)), photos, truth, quiet=True)


def test_no_regions_at_all_is_an_error_that_says_what_is_accepted(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(DataError, match=r"no regions of these photos: .* labels/NAME_0\.png"):
            open_truth(path, photos)
    save(tmp_path / "labels/a.png", halves() * 0 + 255)
    truth = open_truth(tmp_path, photos)
    with pytest.raises(DataError, match=r"no regions are known of any of the 3 photos; accepted"):
        score(Fixed(blocks(ALL)), photos, truth, quiet=True)


def test_the_human_maps_find_themselves(shared_dir):
    folder = shared_dir / "data/regions"
    photos = find_photos([folder / "images"])[:3]
    truth = open_truth(folder, photos)
    people = truth(photos[0], (321, 481))
    assert len(people) >= 4
    found = score_photo(people[0], people)
    assert (found.best_iou[: people[0].count] == 1).all()
    assert 0.3 < found.covering < 1
    assert score_photo(people[0], people[:1]).covering == 1.0
