"""Views against slow and obvious renderings, and the statistics of what is drawn."""

import colorsys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as torchvision

from pixelclip.masks.runs import from_masks
from pixelclip.training.colour import distort, jitter, map_hsv, vary_colour
from pixelclip.training.views import (
    Geometry,
    ViewSettings,
    crop_photo,
    draw_geometry,
    draw_rectangle,
    resized_size,
    sample_masks,
    to_frame,
)

SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(1, 70)
SETTINGS = st.builds(
    ViewSettings,
    short_side=st.integers(1, 60),
    long_side=st.integers(30, 90),
    crop_size=st.integers(1, 40),
    mask_size=st.integers(1, 24),
)
LEVELS = np.arange(256)


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def resized_whole(photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Across, then down: what Pillow up to 12 does in one call, and later ones for most shapes."""
    across = photo.resize((size[0], photo.height), Image.Resampling.BILINEAR)
    return across.resize(size, Image.Resampling.BILINEAR)


def cut_slowly(resized: Image.Image, geometry: Geometry) -> Image.Image:
    right, bottom = geometry.left + geometry.width, geometry.top + geometry.height
    crop = resized.crop((geometry.left, geometry.top, right, bottom))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if geometry.is_flipped else crop


@pytest.mark.parametrize(
    ("photo", "resized"),
    [((2250, 1500), (1333, 889)), ((1500, 2250), (889, 1333)), ((400, 300), (1333, 1000)),
     ((640, 640), (1024, 1024)), ((1, 1), (1024, 1024)), ((3, 500), (8, 1333)),
     ((1, 5000), (1, 1333)), ((1100, 1000), (1126, 1024))],
)  # fmt: skip
def test_photos_get_the_size_detectron2_gives_them(photo, resized):
    assert resized_size(photo, 1024, 1333) == resized


@given(SIDES, SIDES, SETTINGS, SEEDS)
def test_a_view_is_bit_for_bit_the_crop_of_the_whole_resized_photo(width, height, options, seed):
    photo = noise(width, height, seed)
    geometry = draw_geometry(np.random.default_rng(seed), photo.size, options)
    whole = resized_whole(photo, geometry.resized)
    view = np.asarray(crop_photo(photo, geometry))
    np.testing.assert_array_equal(view, np.asarray(cut_slowly(whole, geometry)))


@pytest.mark.parametrize("size", [(1125, 750), (1500, 2250), (333, 1999), (800, 601)])
def test_a_view_at_the_authors_settings_is_bit_for_bit_the_crop_of_the_resized_photo(size):
    photo = noise(*size)
    geometry = draw_geometry(np.random.default_rng(1), size, ViewSettings())
    whole = resized_whole(photo, geometry.resized)
    view = np.asarray(crop_photo(photo, geometry))
    np.testing.assert_array_equal(view, np.asarray(cut_slowly(whole, geometry)))


def test_a_view_of_a_wide_photo_is_bit_for_bit_from_pillows_one_call():
    photo = noise(1125, 750)
    geometry = draw_geometry(np.random.default_rng(1), photo.size, ViewSettings())
    whole = photo.resize(geometry.resized, Image.Resampling.BILINEAR)
    view = np.asarray(crop_photo(photo, geometry))
    np.testing.assert_array_equal(view, np.asarray(cut_slowly(whole, geometry)))


def masks_slowly(masks, geometry, options, rectangle):
    """Resize with Pillow, crop, flip, pad, cut out, sample, drop empty ones: at full resolution."""
    grids = []
    for mask in masks:
        image = Image.fromarray(mask).convert("L")
        resized = image.resize(geometry.resized, Image.Resampling.NEAREST)
        frame = np.zeros((options.crop_size, options.crop_size), dtype=bool)
        frame[: geometry.height, : geometry.width] = cut_slowly(resized, geometry)
        frame[rectangle.top : rectangle.bottom, rectangle.left : rectangle.right] = False
        at = [i * options.crop_size // options.mask_size for i in range(options.mask_size)]
        grids.append(frame[at][:, at])
    return [grid for grid in grids if grid.any()]


def has_ties(resized, original):
    """Whether a pixel's centre falls on a border, where Pillow's floating point may err."""
    return any((2 * x + 1) * original % (2 * resized) == 0 for x in range(resized))


@given(SIDES, SIDES, SETTINGS, SEEDS)
@settings(max_examples=300)
def test_sampled_masks_are_those_of_the_slow_rendering(width, height, options, seed):
    random = np.random.default_rng(seed)
    masks = random.random((4, height, width)) < np.array([0.5, 0.9, 0.01, 0])[:, None, None]
    geometry = draw_geometry(random, (width, height), options)
    rectangle = draw_rectangle(random, geometry.width, geometry.height)
    sampled = sample_masks(from_masks(masks), geometry, options, rectangle)
    if has_ties(geometry.resized[0], width) or has_ties(geometry.resized[1], height):
        return
    expected = masks_slowly(masks, geometry, options, rectangle)
    assert sampled.shape == (len(expected), options.mask_size, options.mask_size)
    for grid, slow in zip(sampled.numpy(), expected, strict=True):
        np.testing.assert_array_equal(grid, slow)


@pytest.mark.parametrize("is_flipped", [False, True])
def test_the_pixel_under_a_tie_is_the_later_one(is_flipped):
    photo = np.array([[[False, True, False, True]]])  # resized 4 -> 2: centres at 1 and 3
    geometry = Geometry((4, 1), (2, 1), 0, 0, 2, 1, is_flipped)
    options = ViewSettings(crop_size=2, mask_size=2)
    assert sample_masks(from_masks(photo), geometry, options)[0].tolist() == [[1, 1], [0, 0]]


def test_nothing_of_a_mask_lies_in_the_rectangle():
    options = replace(ViewSettings(), mask_size=640)  # every pixel of the frame
    random = np.random.default_rng(0)
    geometry = draw_geometry(random, (1125, 750), options)
    rectangle = draw_rectangle(random, geometry.width, geometry.height)
    everything = from_masks(np.ones((1, 750, 1125), dtype=bool))
    grid = sample_masks(everything, geometry, options, rectangle)[0]
    rows, columns = np.nonzero(~grid.numpy())
    assert (rows.min(), rows.max() + 1) == (rectangle.top, rectangle.bottom)
    assert (columns.min(), columns.max() + 1) == (rectangle.left, rectangle.right)


@given(st.integers(1, 9), st.integers(1, 9))
def test_a_frame_holds_the_view_in_its_corner_and_is_black_elsewhere(width, height):
    view = noise(width, height)
    frame = to_frame(view, 9)
    expected = torch.zeros(9, 9, 3, dtype=torch.uint8)
    expected[:height, :width] = torch.from_numpy(np.array(view))
    assert torch.equal(frame, expected.permute(2, 0, 1))


def test_crops_and_flips_are_drawn_evenly():
    options = ViewSettings(short_side=10, long_side=20, crop_size=8)
    random = np.random.default_rng(0)
    drawn = [draw_geometry(random, (13, 10), options) for _ in range(5000)]
    lefts = np.bincount([geometry.left for geometry in drawn])
    tops = np.bincount([geometry.top for geometry in drawn])
    assert len(lefts) == 6
    assert len(tops) == 3
    np.testing.assert_allclose(lefts / 5000, 1 / 6, atol=0.025)  # five standard deviations
    np.testing.assert_allclose(tops / 5000, 1 / 3, atol=0.035)
    assert np.mean([geometry.is_flipped for geometry in drawn]) == pytest.approx(0.5, abs=0.036)


def test_the_rectangle_takes_its_width_from_the_views_height():
    random = np.random.default_rng(0)
    drawn = np.array([draw_rectangle(random, 400, 200) for _ in range(5000)])
    left, top, right, bottom = drawn.T
    widths, heights = right - left, bottom - top
    assert 19 <= widths.min() < 24  # a tenth of 200, or one less at the border
    assert 95 < widths.max() <= 100
    assert 39 <= heights.min() < 45
    assert 195 < heights.max() <= 200
    assert np.median(widths) == pytest.approx(60, abs=3)
    assert left.min() == 0
    assert right.max() == 400
    assert top.min() == 0
    assert bottom.max() == 200
    assert np.corrcoef(widths, heights)[0, 1] == pytest.approx(0, abs=0.07)


def test_the_rectangle_may_begin_one_pixel_too_far():
    random = np.random.default_rng(0)
    drawn = [draw_rectangle(random, 7, 4) for _ in range(5000)]
    widths = np.array([right - left for left, _, right, _ in drawn])
    assert widths.max() == 1  # at one of 7 places, or at an 8th beyond the border
    drawn_as_none = 0.15 / 0.4  # 4 times less than a quarter
    beyond = (1 - drawn_as_none) / 8
    assert (widths == 0).mean() == pytest.approx(drawn_as_none + beyond, abs=0.035)


@given(st.integers(1, 40), st.integers(1, 40), SEEDS)
def test_the_rectangle_lies_inside_views_of_any_shape(width, height, seed):
    left, top, right, bottom = draw_rectangle(np.random.default_rng(seed), width, height)
    assert 0 <= left <= right <= width
    assert 0 <= top <= bottom <= height


def test_hues_and_saturations_map_through_pillows_hsv_for_every_colour():
    hue, saturation = (LEVELS + 77) % 256, LEVELS * 0.7
    for value in range(0, 256, 5):
        hsv = np.stack(np.meshgrid(LEVELS, LEVELS, [value]), axis=-1).astype(np.uint8)
        view = Image.frombytes("HSV", (256, 256), hsv.tobytes()).convert("RGB")
        tables = [*hue.tolist(), *saturation.astype(int).tolist(), *LEVELS.tolist()]
        expected = view.convert("HSV").point(tables).convert("RGB")
        np.testing.assert_array_equal(np.asarray(map_hsv(view, hue, saturation)), expected)


@given(
    st.lists(st.floats(0.5, 1.5), min_size=3, max_size=3),
    st.floats(-0.25, 0.25),
    st.permutations(range(4)),
    SEEDS,
)
@settings(max_examples=50)
def test_jitter_is_torchvisions_to_the_bit(factors, turn, order, seed):
    view = noise(33, 21, seed)
    steps = [
        lambda image: torchvision.adjust_brightness(image, factors[0]),
        lambda image: torchvision.adjust_contrast(image, factors[1]),
        lambda image: torchvision.adjust_saturation(image, factors[2]),
        lambda image: torchvision.adjust_hue(image, turn),
    ]
    expected = view
    for step in order:
        expected = steps[step](expected)
    np.testing.assert_array_equal(np.asarray(jitter(view, factors, turn, order=order)), expected)


def drawn_colours(change, colour, count=3000):
    """The colour that each of many draws makes of one."""
    view, random = Image.new("RGB", (1, 1), colour), np.random.default_rng(0)
    return np.array([change(view, random).getpixel((0, 0)) for _ in range(count)])


def test_brightness_and_contrast_are_drawn_half_of_the_time_from_their_ranges():
    greys = drawn_colours(vary_colour, (100, 100, 100))  # hue and saturation do nothing to grey
    assert (greys == greys[:, :1]).all()
    unchanged = np.mean(greys[:, 0] == 100)
    assert 0.22 < unchanged < 0.30  # 1/4, and now and then a change too small to see
    assert greys.min() in range(34, 39)  # (100 - 32) / 2
    assert greys.max() in range(180, 199)  # (100 + 32) * 1.5


def test_saturation_and_hue_are_drawn_half_of_the_time_from_their_ranges():
    colours = drawn_colours(vary_colour, (160, 80, 80))
    hues, saturations, _ = np.array([colorsys.rgb_to_hsv(*c) for c in (colours / 255).tolist()]).T
    degrees = (hues * 360 + 180) % 360 - 180  # from red
    assert 0.47 < np.mean(abs(degrees) < 1) < 0.56  # 1/2, and 1/37 of the draws are nought
    assert -39 < degrees.min() < -33
    assert 33 < degrees.max() < 39
    unchanged = abs(saturations - 0.5) < 0.008
    assert 0.21 < np.mean(unchanged) < 0.31  # neither saturation nor brightness: 1/4


def test_the_strong_view_is_grey_blurred_and_jittered_as_often_as_the_authors():
    view = Image.new("RGB", (24, 8), (180, 90, 30))
    view.paste((40, 60, 160), (12, 0, 24, 8))
    random = np.random.default_rng(0)
    drawn = np.stack([np.asarray(distort(view, random)).astype(int) for _ in range(3000)])
    is_grey = (drawn == drawn[..., :1]).all(axis=(1, 2, 3))
    is_blurred = (drawn[:, 4, 11] != drawn[:, 4, 0]).any(axis=1)
    is_plain = (drawn[:, 4, 0] == (180, 90, 30)).all(axis=1)
    assert is_grey.mean() == pytest.approx(0.2, abs=0.03)
    assert is_blurred.mean() == pytest.approx(0.5, abs=0.05)
    assert is_plain.mean() == pytest.approx(0.2 * 0.8, abs=0.03)
