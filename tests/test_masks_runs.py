"""Runs of masks: equal to decoded masks in every way, and unmoved by hostile codes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco

from pixelclip.errors import DataError
from pixelclip.masks.runs import (
    MAX_CHARACTERS,
    MAX_MASKS,
    from_coco,
    from_labels,
    from_masks,
    from_rle,
)

any_masks = array_shapes(min_dims=3, max_dims=3, max_side=12).flatmap(
    lambda shape: arrays(bool, (shape[0] - 1, *shape[1:]))
)


def coco_counts(masks):
    """The codes of COCO's own implementation."""
    return [coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"] for mask in masks]


def decoded(photo_masks):
    return photo_masks.sample(np.arange(photo_masks.height), np.arange(photo_masks.width))


@given(any_masks)
def test_codes_are_those_of_coco_both_ways(masks):
    codes = coco_counts(masks)
    assert from_masks(masks).to_rle() == codes
    np.testing.assert_array_equal(decoded(from_rle(*masks.shape[1:], codes)), masks)


@given(any_masks)
def test_all_ways_to_write_a_code_give_the_same_masks(masks):
    size = list(masks.shape[1:])
    segmentations = []
    for mask, code in zip(masks, coco_counts(masks), strict=True):
        flat = np.concatenate([[False], mask.ravel(order="F")])
        edges = [0, *np.flatnonzero(flat[1:] != flat[:-1]), mask.size]
        counts = [int(count) for count in np.diff(edges)]
        segmentations += [
            {"size": size, "counts": counts},
            {"size": size, "counts": code},
            {"size": size, "counts": code.decode()},
            {"size": size, "counts": [*counts, 0, 0]},
        ]
    result = from_rle(*size, segmentations)
    assert result.broken == 0
    np.testing.assert_array_equal(decoded(result), masks.repeat(4, axis=0))


@given(any_masks, st.data())
def test_sample_equals_decode_and_index(masks, data):
    height, width = masks.shape[1:]
    rows, columns = (
        data.draw(arrays(np.int64, st.integers(0, 20), elements=st.integers(-3, side + 2)))
        for side in (height, width)
    )
    padded = np.pad(masks, ((0, 0), (3, 3), (3, 3)))
    expected = padded[:, rows + 3][:, :, columns + 3]
    np.testing.assert_array_equal(from_masks(masks).sample(rows, columns), expected)


def test_sample_of_a_large_frame_equals_decode_and_index():
    generator = np.random.default_rng(0)
    masks = generator.random((40, 300, 500)) < generator.random((40, 1, 1))  # many single pixels
    masks[::3, :200] = False  # these miss the crop
    rows, columns = np.arange(180, 20, -2), np.linspace(100, 400, 64).astype(int)
    sampled = from_rle(300, 500, coco_counts(masks)).sample(rows, columns)
    np.testing.assert_array_equal(sampled, masks[:, rows][:, :, columns])
    assert not sampled[::3].any()


@given(any_masks, st.data())
def test_select_takes_masks_in_the_order_asked_for(masks, data):
    count = len(masks)
    indices = arrays(np.int64, st.integers(0, 6), elements=st.integers(0, max(0, count - 1)))
    keep = data.draw(indices if count else st.just(np.zeros(0, dtype=np.int64)))
    scores = np.linspace(0, 1, count).tolist()
    chosen = from_rle(*masks.shape[1:], coco_counts(masks), scores).select(keep)
    np.testing.assert_array_equal(decoded(chosen), masks[keep])
    np.testing.assert_allclose(chosen.scores, np.array(scores)[keep])
    flags = data.draw(arrays(bool, count))
    np.testing.assert_array_equal(decoded(from_masks(masks).select(flags)), masks[flags])


@given(any_masks)
def test_areas_count_the_pixels(masks):
    np.testing.assert_array_equal(from_masks(masks).areas(), masks.sum(axis=(1, 2)))


@given(any_masks)
def test_boxes_are_those_of_coco(masks):
    codes = [{"size": masks.shape[1:], "counts": text} for text in coco_counts(masks)]
    expected = coco.toBbox(codes) if codes else np.zeros((0, 4))
    np.testing.assert_array_equal(from_masks(masks).boxes(), expected)


@given(any_masks, st.data())
def test_details_go_with_their_masks(masks, data):
    count = len(masks)
    broken = data.draw(arrays(bool, count))
    codes = [None if bad else code for bad, code in zip(broken, coco_counts(masks), strict=True)]
    details = [{"id": index} for index in range(count)]
    found = from_rle(*masks.shape[1:], codes, details=details)
    assert found.details == tuple(own for own, bad in zip(details, broken, strict=True) if not bad)
    last = found.select(np.arange(found.count)[::-1][:2])
    assert last.details == found.details[::-1][:2]
    assert from_rle(*masks.shape[1:], codes).details is None


@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2), elements=st.integers(0, 4)))
def test_labels_become_one_mask_per_value(labels):
    values = [value for value in np.unique(labels) if value != 2]
    masks = from_labels(labels, ignore=(2,))
    expected = np.array([labels == value for value in values]).reshape(-1, *labels.shape)
    np.testing.assert_array_equal(decoded(masks), expected)


def test_label_maps_with_too_many_values_keep_the_first_ones():
    labels = np.arange(70 * 60).reshape(70, 60)
    masks = from_labels(labels)
    assert (masks.count, masks.broken) == (MAX_MASKS, 70 * 60 - MAX_MASKS)
    np.testing.assert_array_equal(decoded(masks).sum(axis=0), labels < MAX_MASKS)


def test_polygons_are_drawn_as_coco_draws_them():
    generator = np.random.default_rng(0)
    polygons = []
    for corners in (3, 4, 9):
        rings = [(generator.random((corners, 2)) * [60, 40]).ravel().tolist() for _ in range(2)]
        polygons.append(rings)
    expected = [coco.decode(coco.merge(coco.frPyObjects(rings, 40, 60))) for rings in polygons]
    np.testing.assert_array_equal(decoded(from_coco(40, 60, polygons)), np.array(expected) > 0)


def test_polygons_and_codes_keep_their_order():
    mask = np.eye(8, dtype=bool)
    square = [[0, 0, 4, 0, 4, 4, 0, 4]]
    code = {"size": [8, 8], "counts": coco_counts([mask])[0].decode()}
    masks = from_coco(8, 8, [square, None, code, square], [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_array_equal(masks.areas(), [16, 8, 16])
    np.testing.assert_allclose(masks.scores, [0.1, 0.3, 0.4])
    assert masks.broken == 1


@pytest.mark.parametrize(
    "polygon",
    [
        [],
        [[]],
        [[1, 1, 2, 2]],
        [[1, 1, 5, 1, 5]],
        [[1, 1, 5, 1, 5, float("nan")]],
        [[1, 1, 5, 1, 5, float("inf")]],
        [[1, 1, 5, 1, 5, 10**400]],
        [[1, 1, 5, 1, 5, 1e9]],
        [[1, 1, 5, 1, 5, "5"]],
        [[1, 1, 5, 1, 5, True]],
        [[[1, 1], [5, 1], [5, 5]]],
        [[1, 1, 5, 1, 5, 5], None],
        [3, 5, 8],
        [[0, 0, 16, 16, 0, 0] * 2**16],
    ],
    ids=lambda polygon: str(polygon)[:30],
)
def test_damaged_polygons_are_left_out(polygon):
    masks = from_coco(8, 8, [polygon, [[1, 1, 5, 1, 5, 5]]])
    assert (masks.count, masks.broken) == (1, 1)


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        3,
        b"",
        "",
        "é",
        b"\xff",
        b"0",
        b"o" * 100,  # a number that never ends
        b"73Z",  # 7, 3, 10 with the last number not ended
        b"WPPPPPP03:",  # the same with eight groups for the 7
        b"7Md0",  # 7, -3, 20
        b"_",  # negative
        b"\x80\x80",
        "0" * 10_000_000,
        "o" * 10_000_000,
        {},
        {"size": [4, 5]},
        {"size": [5, 4], "counts": [20]},
        {"size": None, "counts": [20]},
        {"size": [4, 5, 1], "counts": [20]},
        {"size": [4, 5], "counts": []},
        {"size": [4, 5], "counts": [19]},
        {"size": [4, 5], "counts": [21, -1]},
        {"size": [4, 5], "counts": [2**70]},
        {"size": [4, 5], "counts": [20.0]},
        {"size": [4, 5], "counts": [True] * 20},
        {"size": [4, 5], "counts": ["20"]},
        {"size": [4, 5], "counts": [[20]]},
        {"size": [4, 5], "counts": {"a": 1}},
        {"size": [4, 5], "counts": [0] * 10_000_000},
    ],
    ids=lambda segmentation: str(segmentation)[:30],
)
def test_damaged_codes_are_left_out(segmentation):
    good = {"size": [4, 5], "counts": [7, 3, 10]}
    masks = from_rle(4, 5, [good, segmentation, good])
    assert (masks.count, masks.broken) == (2, 1)
    np.testing.assert_array_equal(masks.areas(), [3, 3])


@given(any_masks, st.lists(st.binary(max_size=40)), st.randoms())
def test_no_text_makes_decoding_fail(masks, texts, random):
    """What is accepted fills the photo exactly; the good codes among the others stay good."""
    damaged = [bytearray(code) for code in coco_counts(masks)]
    for code in damaged:
        code[random.randrange(len(code))] = random.randrange(256)
    codes = [*texts, *map(bytes, damaged), *coco_counts(masks)]
    result = from_rle(*masks.shape[1:], codes)
    assert result.count + result.broken == len(codes)
    pixels = decoded(result)
    np.testing.assert_array_equal(pixels[result.count - len(masks) :], masks)
    assert from_masks(pixels).to_rle() == result.to_rle()


def test_codes_beyond_the_limits_are_left_out():
    (code,) = coco_counts(np.ones((1, 1, 2), dtype=bool))
    masks = from_rle(1, 2, [code] * (MAX_MASKS + 3))
    assert (masks.count, masks.broken) == (MAX_MASKS, 3)
    long = b"111" + b"0" * (2200 * 2000 - 3)  # every other pixel
    (code,) = coco_counts(np.ones((1, 2200, 2000), dtype=bool))
    masks = from_rle(2200, 2000, [long, long, code])
    assert 2 * len(long) > MAX_CHARACTERS
    np.testing.assert_array_equal(masks.areas(), [2200 * 1000, 2200 * 2000])


def test_runs_without_a_gap_become_one():
    masks, same = (
        from_rle(4, 5, [{"size": [4, 5], "counts": counts}])
        for counts in ([2, 3, 0, 4, 0, 1, 10], [2, 8, 10])
    )
    np.testing.assert_array_equal(masks.ends, [10])
    assert masks.to_rle() == same.to_rle()


def test_scores_are_brought_into_their_range():
    codes = coco_counts(np.ones((4, 2, 2), dtype=bool))
    masks = from_rle(2, 2, codes, [1.02, -3.0, float("nan"), 0.5])
    np.testing.assert_allclose(masks.scores, [1, 0, 1, 0.5])
    np.testing.assert_allclose(from_rle(2, 2, codes).scores, 1)


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (2**20, 2**20)])
def test_frames_that_no_photo_has_are_refused(size):
    with pytest.raises(DataError, match="masks cannot have a frame of"):
        from_rle(*size, [])


def test_no_masks_are_masks_too():
    masks = from_rle(3, 4, [])
    assert decoded(masks).shape == (0, 3, 4)
    assert masks.to_rle() == []
    assert masks.areas().shape == (0,)
