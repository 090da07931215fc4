"""Superpixels: regions that cover a photo once, and the hierarchy that they come from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError

from pixelclip.masks.hierarchy import merge_regions
from pixelclip.masks.score import score_photo
from pixelclip.masks.sources import MASK_SOURCES
from pixelclip.masks.superpixels import Superpixels, SuperpixelSettings, superpixels

FINE = {"scale": 1.0, "min_share": 0.0003}
images = arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12), st.just(3)))


def pixels(masks):
    return masks.sample(np.arange(masks.height), np.arange(masks.width))


def textured(height=90, width=120, seed=0):
    """Patches of several colours with noise, so that regions of all sizes are found."""
    generator = np.random.default_rng(seed)
    colours = generator.integers(0, 256, (6, 8, 3)).repeat(15, axis=0).repeat(15, axis=1)
    noise = generator.integers(-30, 31, (90, 120, 3))
    image = (colours + noise).clip(0, 255).astype(np.uint8)
    return image[:height, :width]


@settings(max_examples=30, deadline=None)
@given(images, st.floats(0, 2))
def test_flat_regions_cover_every_pixel_once(image, threshold):
    masks = superpixels(image, SuperpixelSettings(threshold=threshold, **FINE))
    assert (pixels(masks).sum(axis=0) == 1).all()
    assert masks.areas().min() > 0
    assert ((masks.scores >= 0) & (masks.scores <= 1)).all()


@settings(max_examples=30, deadline=None)
@given(images)
def test_any_two_nested_regions_are_different_and_disjoint_or_one_in_the_other(image):
    masks = pixels(superpixels(image, SuperpixelSettings(nested=True, **FINE)))
    flat = masks.reshape(len(masks), -1).astype(np.int64)
    shared, areas = flat @ flat.T, flat.sum(axis=1)
    assert areas.min() > 0
    smaller = np.minimum(areas[:, None], areas)
    assert ((shared == 0) | (shared == smaller)).all()
    assert len(np.unique(flat, axis=0)) == len(flat)
    assert flat[0].all()  # the whole photo; larger ones come first
    assert (np.diff(areas) <= 0).all()


def test_nested_regions_hold_those_of_every_threshold():
    image = textured()
    everything = SuperpixelSettings(nested=True, max_masks=4096)
    nested = superpixels(image, everything)
    for threshold in (0.5, 0.8, 1.2):
        flat = superpixels(image, SuperpixelSettings(threshold=threshold))
        assert 1 < flat.count < nested.count
        assert score_photo(nested, [flat]).best_iou.min() == 1.0


def test_a_higher_threshold_gives_fewer_regions_and_never_cuts_across_those_of_a_lower():
    image, counts, before = textured(), [], None
    for threshold in (0.0, 0.4, 0.6, 0.8, 1.0, 10.0):
        masks = superpixels(image, SuperpixelSettings(threshold=threshold))
        counts.append(masks.count)
        regions = pixels(masks).argmax(axis=0)
        if before is not None:
            assert len(np.unique(before * 10_000 + regions)) == counts[-2]
        before = regions
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[3] > counts[5] == 1


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("share", [0.002, 0.01, 0.1, 1.0])
def test_no_region_is_smaller_than_its_least_share(share, nested):
    masks = superpixels(textured(), SuperpixelSettings(min_share=share, nested=nested, threshold=0))
    assert masks.areas().min() >= round(share * 90 * 120)
    assert (masks.count == 1) == (share == 1)


def test_the_longest_lasting_nested_regions_are_kept():
    image = textured()
    every = superpixels(image, SuperpixelSettings(nested=True, max_masks=4096))
    some = superpixels(image, SuperpixelSettings(nested=True, max_masks=10))
    assert (every.count, some.count) == (every.count, 10)
    assert sorted(some.scores) == sorted(np.sort(every.scores)[-10:])
    assert score_photo(every, [some]).best_iou.min() == 1.0


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3000, 2), (2, 3000), (60, 40)])
def test_a_photo_of_one_colour_is_one_region_whatever_its_shape(shape, nested):
    image = np.full((*shape, 3), 90, dtype=np.uint8)
    masks = superpixels(image, SuperpixelSettings(nested=nested))
    assert (masks.count, masks.areas().tolist()) == (1, [shape[0] * shape[1]])
    assert (masks.height, masks.width, masks.scores.tolist()) == (*shape, [1.0])


def test_what_looks_alike_is_merged_first_and_a_strong_boundary_last():
    image = np.full((60, 90, 3), 100, dtype=np.uint8)
    image[:, 30:60] = 112
    image[:, 60:] = 240
    labels = np.arange(90)[None].repeat(60, axis=0) // 30
    tree = merge_regions(image, labels)
    assert tree.parents.tolist() == [3, 3, 4, 4, 4]
    assert tree.heights[:3].tolist() == [0, 0, 0]
    assert 0 < tree.heights[3] < tree.heights[4]
    np.testing.assert_allclose(tree.sizes, [1 / 3, 1 / 3, 1 / 3, 2 / 3, 1])
    assert tree.ranges().tolist()[3:] in ([[0, 2], [0, 3]], [[1, 3], [0, 3]])
    assert tree.cut((tree.heights[3] + tree.heights[4]) / 2).tolist() == [3, 3, 2]


def test_a_merged_region_is_as_if_it_had_been_one_from_the_start():
    image = textured(60, 90)
    labels = np.arange(90)[None].repeat(60, axis=0) // 40  # two of 40 columns, one of 10
    tree = merge_regions(image, labels)
    together = np.unique(np.array([tree.cut(tree.heights[3])]), return_inverse=True)[1].ravel()
    assert together.max() == 1
    assert merge_regions(image, together[labels]).heights[-1] == pytest.approx(tree.heights[-1])


def test_no_merge_is_lower_than_those_that_made_its_parts():
    image = textured()
    labels = np.arange(90)[:, None] // 5 * 24 + np.arange(120) // 5
    tree = merge_regions(image, labels)
    assert (tree.heights[tree.parents] >= tree.heights).all()
    assert (tree.parents[:-1] > np.arange(len(tree.parents) - 1)).all()


def test_regions_with_the_same_colours_are_told_apart_by_texture():
    stripes = np.where(np.arange(60) // 3 % 2, 98, 158).astype(np.uint8)
    down, across = stripes[:, None].repeat(60, axis=1), stripes[None].repeat(60, axis=0)
    halves = np.arange(60)[None].repeat(60, axis=0) // 30

    def height(left, right):
        image = np.concatenate([left[:, :30], right[:, :30]], axis=1)[..., None].repeat(3, axis=2)
        return merge_regions(image, halves).heights[-1]

    assert height(down, across) > height(down, down) + 0.5


def test_regions_without_a_boundary_are_told_apart_by_colour():
    ramp = np.linspace(0, 1, 90)[None, :, None]
    image = (np.array([30, 60, 200]) * (1 - ramp) + np.array([200, 90, 30]) * ramp).astype(np.uint8)
    labels = np.arange(90)[None].repeat(60, axis=0) // 45
    assert merge_regions(image.repeat(60, axis=0), labels).heights[-1] > 0.6


@pytest.mark.parametrize("nested", [False, True])
def test_masks_do_not_depend_on_other_photos_or_the_run(nested):
    photos = [textured(seed=1), textured(40, 50, seed=2)]
    source = Superpixels(SuperpixelSettings(nested=nested), device="cpu")
    together = source(photos)
    for photo, masks in zip(photos, together, strict=True):
        (alone,) = Superpixels(SuperpixelSettings(nested=nested))([photo])
        assert alone.to_rle() == masks.to_rle()
        assert alone.scores.tobytes() == masks.scores.tobytes()


def test_masks_of_a_large_photo_fill_it():
    image = textured(45, 60).repeat(14, axis=0).repeat(14, axis=1)
    masks = superpixels(image, SuperpixelSettings(nested=True))
    assert (masks.height, masks.width) == (630, 840)
    assert masks.areas()[0] == 630 * 840
    small = pixels(masks)[:, 7::14, 7::14]
    shares = small.mean(axis=(1, 2))
    np.testing.assert_allclose(masks.areas() / (630 * 840), shares, atol=0.05)


def test_settings_are_checked_and_the_source_is_found_by_name():
    kind = MASK_SOURCES["superpixels"]()
    assert (kind.settings, kind.make) == (SuperpixelSettings, Superpixels)
    for wrong in ({"min_share": 0.0}, {"threshold": -1}, {"max_masks": 0}, {"levels": 3}):
        with pytest.raises(ValidationError):
            SuperpixelSettings(**wrong)
    with pytest.raises(ValidationError):
        SuperpixelSettings().scale = 3.0
