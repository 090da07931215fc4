"""Random colours of views (behaviour.md 8c and 8e); every draw is from the generator given."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageEnhance, ImageFilter, ImageStat

_LEVELS = np.arange(256)
_FULL_TURN = 255  # of Pillow's 8-bit hue; OpenCV's is 180
_BAND = 64  # rows worked on at once, which then stay in the processor's cache: 3 times as fast

Levels = Shaped[np.ndarray, "256"]


def vary_colour(view: Image.Image, random: np.random.Generator) -> Image.Image:
    """SSD's random colours: brightness, contrast, saturation and hue, each with probability 0.5.

    As detectron2's ColorAugSSDTransform, values cut to 0-255 after each step. Saturation and hue
    change in one turn through Pillow's HSV; theirs in two, through OpenCV's.
    """
    is_contrast_first = random.random() < 0.5
    if random.random() < 0.5:
        view = _map_levels(view, _LEVELS + random.uniform(-32, 32))
    if is_contrast_first:
        view = _vary_contrast(view, random)
    factor = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
    shift = int(random.integers(-18, 18, endpoint=True)) if random.random() < 0.5 else 0
    if factor != 1 or shift != 0:
        hue = (_LEVELS + round(shift * _FULL_TURN / 180)) % _FULL_TURN
        view = map_hsv(view, hue, _LEVELS * factor)
    return view if is_contrast_first else _vary_contrast(view, random)


def _vary_contrast(view: Image.Image, random: np.random.Generator) -> Image.Image:
    if random.random() < 0.5:
        return view
    return _map_levels(view, _LEVELS * random.uniform(0.5, 1.5))


def distort(view: Image.Image, random: np.random.Generator) -> Image.Image:
    """The strong view but for its rectangle: jitter (p 0.8), grey (p 0.2), blur (p 0.5)."""
    if random.random() < 0.8:
        factors = random.uniform(0.5, 1.5, 3).tolist()
        turn = random.uniform(-0.25, 0.25)
        view = jitter(view, factors, turn, order=random.permutation(4).tolist())
    if random.random() < 0.2:
        view = view.convert("L").convert("RGB")
    if random.random() < 0.5:
        view = view.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
    return view


def jitter(
    view: Image.Image, factors: Sequence[float], turn: float, *, order: Sequence[int]
) -> Image.Image:
    """Brightness, contrast, saturation and hue changed as torchvision does, to the bit.

    Args:
        view: RGB.
        factors: of brightness, contrast and saturation; 1 changes nothing.
        turn: of the hue, as a share of the circle.
        order: of the steps: 0 brightness, 1 contrast, 2 saturation, 3 hue.
    """
    for step in order:
        if step == 0:
            view = _blend(view, 0, factors[0])
        elif step == 1:
            mean = ImageStat.Stat(view.convert("L")).mean[0]
            view = _blend(view, int(mean + 0.5), factors[1])
        elif step == 2:
            view = ImageEnhance.Color(view).enhance(factors[2])
        else:
            view = map_hsv(view, (_LEVELS + int(turn * 255)) % 256, _LEVELS)
    return view


def _blend(view: Image.Image, grey: int, share: float) -> Image.Image:
    """That share of the view on grey, as ImageEnhance does, by a table, in a third of the time."""
    above = (_LEVELS - grey).astype(np.float32)  # Pillow computes in single precision
    return _map_levels(view, grey + np.float32(share) * above)


def _map_levels(view: Image.Image, levels: Levels) -> Image.Image:
    table = levels.clip(0, 255).astype(np.uint8).tolist()
    return view.point(table * len(view.getbands()))


def map_hsv(view: Image.Image, hue: Levels, saturation: Levels) -> Image.Image:
    """The view with other hues and saturations, each level (Pillow's, 8 bits) by a table.

    The way back to RGB is Pillow's to the bit, in a quarter of the time: each channel is
    V - round(share V S / (85 x 255)), with a share in 0-85 that the hue alone decides.
    """
    hues, saturations, values = view.convert("HSV").split()
    saturated = np.asarray(_map_levels(saturations, saturation))
    value = np.asarray(values)
    shares = [np.asarray(_map_levels(hues, levels)) for levels in _SHARES[:, hue]]
    channels = np.empty((3, *value.shape), dtype=np.uint8)
    for top in range(0, len(value), _BAND):
        rows = slice(top, top + _BAND)
        chroma = np.multiply(value[rows], saturated[rows], dtype=np.float32)
        chroma *= np.float32(1 / (85 * 255))
        for channel, share in zip(channels, shares, strict=True):
            less = chroma * share[rows]
            less += np.float32(0.5)
            np.subtract(value[rows], less.astype(np.uint8), out=channel[rows])
    return Image.merge("RGB", [Image.fromarray(channel) for channel in channels])


def _channel_shares() -> UInt8[np.ndarray, "3 256"]:
    """How much of the chroma, in 1/85, each hue takes from red, green and blue."""
    sixth, position = np.divmod(2 * _LEVELS, 85)  # level 255 is the full circle
    none, all_, rising, falling = np.zeros(256), np.full(256, 85), position, 85 - position
    red = [none, rising, all_, all_, falling, none]
    green = [falling, none, none, rising, all_, all_]
    blue = [all_, all_, falling, none, none, rising]
    return np.stack([np.choose(sixth % 6, c) for c in (red, green, blue)]).astype(np.uint8)


_SHARES = _channel_shares()
