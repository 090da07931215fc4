"""Drawing a label map over its photo: colours, outlines, a legend."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, ImageDraw, ImageFont

from pixelclip.errors import DataError
from pixelclip.images import Photograph, for_overlay


@cache
def palette(count: int) -> UInt8[np.ndarray, "K 3"]:
    """Colours that stay apart: hue by the golden ratio, lightness in three steps."""
    index = np.arange(count)
    hue = (index * 0.61803398875 + 0.02) % 1.0
    value = np.array([0.95, 0.70, 0.85])[index % 3]
    saturation = np.array([0.75, 0.85, 0.55])[(index // 3) % 3]
    sector = hue[:, None] * 6 + np.array([0, 4, 2])
    wave = np.clip(np.abs(sector % 6 - 3) - 1, 0, 1)
    colours = value[:, None] * (1 - saturation[:, None] * (1 - wave))
    return (colours * 255).round().astype(np.uint8)


def overlay(
    photo: Photograph,
    labels: Integer[np.ndarray, "H W"],
    classes: Sequence[str],
    *,
    opacity: float = 0.55,
) -> Image.Image:
    """The photo with every class in its colour, outlines, and a legend of the classes in it.

    Pixels of no class keep the photo's colours. A photo above 16 megapixels is drawn smaller; a
    photo that was shrunk already gets its labels shrunk alike.

    Raises:
        DataError: the labels are of a photo of another shape.
    """
    picture = for_overlay(photo)
    height, width = labels.shape
    if abs(picture.width / picture.height / (width / height) - 1) > 0.5 / min(picture.size) + 0.01:
        raise DataError(
            f"these labels are of a photo of {width} x {height} pixels, not of"
            f" {picture.width} x {picture.height}"
        )
    if picture.size != (width, height):
        rows = (np.arange(picture.height) * height) // picture.height
        columns = (np.arange(picture.width) * width) // picture.width
        labels = labels[np.ix_(rows, columns)]
    pixels = np.asarray(picture, dtype=np.float32)
    known = labels < len(classes)
    colours = palette(len(classes))[np.where(known, labels, 0)]
    mixed = pixels * (1 - opacity) + colours * opacity
    edge = np.zeros_like(known)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    mixed = np.where(known[..., None], mixed, pixels)
    mixed[edge] = 255
    counts = np.bincount(labels[known].ravel(), minlength=len(classes))
    present = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    drawn = Image.fromarray(mixed.round().astype(np.uint8))
    return with_legend(drawn, [(classes[index], index) for index in present], len(classes))


def with_legend(image: Image.Image, entries: list[tuple[str, int]], count: int) -> Image.Image:
    """The image with a strip of colour keys below it, as many rows as the names need.

    Args:
        image: to stand above the strip.
        entries: name and class index, in the order to show; at most 60 are shown.
        count: number of classes, which fixes the colours.
    """
    if len(entries) > 60:
        entries = [*entries[:60], (f"and {len(entries) - 60} more", -1)]
    text_size = max(11, min(28, image.width // 36))
    font = ImageFont.load_default(size=text_size)
    box, gap = text_size, text_size // 2
    width = max(image.width, 160)  # a legend under a narrow photo must be readable
    places: list[tuple[int, int, str, int]] = []
    x = y = gap
    for name, index in entries:
        name = name.strip() or name
        need = box + gap // 2 + int(font.getlength(name)) + gap * 2
        if x > gap and x + need > width:
            x, y = gap, y + box + gap
        places.append((x, y, name, index))
        x += need
    strip_height = y + box + gap if places else 0
    canvas = Image.new("RGB", (width, image.height + strip_height), "white")
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for x, y, name, index in places:
        top = image.height + y
        if index >= 0:
            colour = tuple(int(c) for c in palette(count)[index])
            draw.rectangle((x, top, x + box, top + box), fill=colour, outline="black")
        draw.text((x + box + gap // 2, top + box / 2), name, fill="black", font=font, anchor="lm")
    return canvas
