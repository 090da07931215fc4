"""Colours, outlines and legends."""

import numpy as np
import pytest
from PIL import Image

from pixelclip import images
from pixelclip.errors import DataError
from pixelclip.overlay import overlay, palette
from tests.tiny import photo


def test_colours_stay_apart():
    colours = palette(64).astype(int)
    distance = np.abs(colours[:, None] - colours[None]).sum(-1)
    np.fill_diagonal(distance, 999)
    assert distance.min() > 12
    early = distance[:12, :12]
    assert early.min() > 60


def test_overlay_keeps_the_photo_where_there_is_no_class():
    image = photo(200, 40)
    labels = np.full((40, 200), 255, np.uint8)
    labels[:20] = 1
    drawn = np.asarray(overlay(image, labels, ["cat", "dog"]))[:40]
    np.testing.assert_array_equal(drawn[22:], np.asarray(image)[22:])
    assert (drawn[:19] != np.asarray(image)[:19]).mean() > 0.8


def test_overlay_of_a_large_photo_is_drawn_smaller(monkeypatch):
    monkeypatch.setattr(images, "OVERLAY_PIXELS", 1000)
    drawn = overlay(photo(100, 80), np.zeros((80, 100), np.uint8), ["cat"])
    assert drawn.height < 80


def test_legend_names_only_what_occurs_and_wraps():
    labels = np.zeros((50, 120), np.uint8)
    few = overlay(photo(120, 50), labels, ["a"] * 1 + [f"word {i}" for i in range(80)])
    labels[:, :80] = np.arange(80)
    many = overlay(photo(120, 50), labels, ["a"] + [f"word {i}" for i in range(80)])
    assert many.height > few.height > 50


def test_labels_of_another_photo_are_refused():
    with pytest.raises(DataError, match="these labels are of a photo of 40 x 60"):
        overlay(photo(60, 40), np.zeros((60, 40), np.uint8), ["cat"])


def test_a_turned_photo_is_drawn_upright():
    image = photo(60, 40)
    image.getexif()[0x0112] = 6
    drawn = overlay(image, np.zeros((60, 40), np.uint8), ["cat"])
    assert drawn.height > 60
    assert isinstance(drawn, Image.Image)
