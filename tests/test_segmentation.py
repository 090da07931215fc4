"""What is made of a label map: areas, masks, polygons."""

import numpy as np
import pytest
from pycocotools import mask as coco
from skimage.draw import polygon2mask

from pixelclip.rings import trace_rings
from pixelclip.segmentation import Segmentation

NAMES = ("cat", "sofa", "window")


def make(labels, names=NAMES):
    return Segmentation(labels, names, np.linspace(0.2, 0.8, len(names)))


@pytest.fixture
def labels():
    y, x = np.mgrid[:60, :80]
    labels = np.full((60, 80), 255, np.uint8)
    labels[(y - 30) ** 2 + (x - 30) ** 2 < 400] = 0
    labels[(y - 30) ** 2 + (x - 30) ** 2 < 60] = 2  # a hole in class 0
    labels[50:, 70:] = 2
    return labels


def test_areas_are_counted_and_sorted(labels):
    areas = make(labels).areas()
    assert [a["name"] for a in areas] == ["cat", "window"]
    assert areas[0]["pixels"] == (labels == 0).sum()
    assert areas[1]["share"] == pytest.approx((labels == 2).mean())
    assert areas[1]["confidence"] == pytest.approx(0.8)


def test_rle_is_what_coco_tools_read(labels):
    for name, rle in make(labels).rles().items():
        np.testing.assert_array_equal(coco.decode(rle), labels == NAMES.index(name))


@pytest.mark.parametrize(("tolerance", "overlap"), [(0.0, 1.0), (1.0, 0.9)])
def test_polygons_give_the_mask_back(labels, tolerance, overlap):
    for name, rings in make(labels).polygons(tolerance).items():
        drawn = np.zeros(labels.shape, bool)
        for ring in rings:
            corners = np.array([(y - 0.5, x - 0.5) for x, y in ring])
            drawn ^= polygon2mask(labels.shape, corners)  # even-odd rule, by pixel centres
        truth = labels == NAMES.index(name)
        assert (drawn & truth).sum() / (drawn | truth).sum() >= overlap


def test_polygons_touch_the_border_at_the_photos_corners():
    (ring,) = make(np.zeros((10, 20), np.uint8)).polygons(tolerance=0.0)["cat"]
    xs, ys = zip(*ring, strict=True)
    assert (min(xs), min(ys), max(xs), max(ys)) == (0, 0, 20, 10)


def test_a_photo_without_any_class_has_no_areas():
    result = make(np.full((4, 5), 255, np.uint8))
    assert result.areas() == []
    assert result.rles() == {}


def test_wide_labels_use_65535_for_no_class():
    names = tuple(f"thing {i}" for i in range(300))
    labels = np.full((4, 5), 65535, np.uint16)
    labels[0] = 299
    result = make(labels, names)
    assert result.none == 65535
    assert [a["index"] for a in result.areas()] == [299]


def ring_area(ring):
    """Signed area by the shoelace formula."""
    x, y = np.array(ring).T
    return (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2


@pytest.mark.parametrize("seed", range(5))
def test_rings_of_any_mask_enclose_its_pixels(seed):
    mask = np.random.default_rng(seed).random((17, 23)) < 0.5
    rings = trace_rings(mask)
    assert sum(map(ring_area, rings)) == mask.sum()
    assert all(ring[0] == ring[-1] for ring in rings)


def test_the_smallest_masks_keep_their_rings():
    for shape in ((1, 1), (1, 27), (2, 2), (5, 5)):
        (ring,) = trace_rings(np.ones(shape, bool))
        assert ring_area(ring) == shape[0] * shape[1]
        assert len(ring) == 5
