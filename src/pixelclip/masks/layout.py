"""Pictures, captions and legends put together on white."""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from pixelclip.errors import visible

TEXT_SIZE, TITLE_SIZE = 13, 17
LINE = 19  # pixels from line to line
MARGIN, GAP = 20, 4  # pixels between cells; between pictures, and captions, of a cell
INK, PALE = (50, 50, 50), (238, 238, 238)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Key(NamedTuple):
    """An entry of a legend.

    Attributes:
        name: any text.
        colour: red, green, blue.
        share: of the picture.
    """

    name: str
    colour: UInt8[np.ndarray, "3"]
    share: float


def plain(text: str) -> str:
    """The text in the characters that Pillow's own font has; others as Python escapes them."""
    return visible(unicodedata.normalize("NFC", text)).encode("ascii", "backslashreplace").decode()


def shortened(text: str, width: int, font: Font) -> str:
    """The text, without its middle where it would be wider than so many pixels."""
    kept, short = len(text), text
    while kept > 2 and font.getlength(short) > width:
        kept -= 1
        short = f"{text[: kept - kept // 2]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - kept // 2 :]}"
    return short


def captioned(image: Image.Image, lines: Sequence[str], *, least_width: int) -> Image.Image:
    """The image with lines of text below it, both in the middle."""
    font = ImageFont.load_default(size=TEXT_SIZE)
    width = max(image.width, least_width)
    canvas = Image.new("RGB", (width, image.height + GAP + LINE * len(lines)), "white")
    canvas.paste(image, ((width - image.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        middle = (width / 2, image.height + GAP + LINE * (number + 0.5))
        draw.text(middle, shortened(plain(line), width, font), INK, font, anchor="mm")
    return canvas


def note(text: str, size: tuple[int, int]) -> Image.Image:
    """A text in the place of a picture; in a place too small for any, none."""
    font = ImageFont.load_default(size=TEXT_SIZE)
    width = size[0] - 2 * TEXT_SIZE
    lines = [""]
    for word in plain(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    canvas = Image.new("RGB", size, PALE)
    if width < 2 * TEXT_SIZE or size[1] < LINE:
        return canvas
    ImageDraw.Draw(canvas).multiline_text(
        (size[0] / 2, size[1] / 2),
        "\n".join(shortened(line, width, font) for line in lines),
        INK,
        font,
        anchor="mm",
        align="center",
    )
    return canvas


def heading(text: str, size: int = TITLE_SIZE) -> Image.Image:
    """A line of larger text."""
    font = ImageFont.load_default(size=size)
    text = plain(text)
    canvas = Image.new("RGB", (int(font.getlength(text)) + 2, size + 2 * GAP), "white")
    middle = (canvas.width / 2, canvas.height / 2)
    ImageDraw.Draw(canvas).text(middle, text, INK, font, anchor="mm")
    return canvas


def legend(keys: Sequence[Key], *, width: int, height: int, limit: int) -> Image.Image:
    """Colours with their names and shares, one below the other, and how many more there are.

    Args:
        keys: in the order to show.
        width: of the legend, in pixels; longer names lose their middle.
        height: at least.
        limit: keys shown.
    """
    font = ImageFont.load_default(size=TEXT_SIZE)
    num_lines = min(len(keys), limit + 1)
    canvas = Image.new("RGB", (width, max(height, LINE * num_lines)), "white")
    draw = ImageDraw.Draw(canvas)
    left = TEXT_SIZE + 2 * GAP
    for number, key in enumerate(keys[:limit]):
        top = LINE * number
        colour = tuple(int(value) for value in key.colour)
        draw.rectangle((0, top, TEXT_SIZE, top + TEXT_SIZE), colour, INK)
        share = f"  {key.share:.0%}" if key.share >= 0.01 or not key.share else "  <1%"
        room = width - left - int(font.getlength(share)) - 1
        name = shortened(plain(key.name), room, font)
        draw.text((left, top + TEXT_SIZE / 2), name + share, INK, font, anchor="lm")
    if len(keys) > limit:
        text = f"and {len(keys) - limit} more"
        draw.text((left, LINE * limit + TEXT_SIZE / 2), text, INK, font, anchor="lm")
    return canvas


def grid(
    rows: Sequence[Sequence[Image.Image]], *, title: str = "", subtitle: str = ""
) -> Image.Image:
    """Rows of images on white, each in the middle of its column and at the bottom of its row.

    Args:
        rows: a row may have fewer images than another.
        title: to stand above them.
        subtitle: in smaller letters, below the title.
    """
    columns = [[row[i] for row in rows if i < len(row)] for i in range(max(map(len, rows)))]
    widths = [max(cell.width for cell in column) for column in columns]
    heights = [max(cell.height for cell in row) for row in rows]
    head = [heading(title)] if title else []
    head += [heading(subtitle, TEXT_SIZE)] if subtitle else []
    bottom = sum(image.height + MARGIN for image in head)
    width = max([sum(widths) + MARGIN * (len(widths) - 1), *(image.width for image in head)])
    height = bottom + sum(heights) + MARGIN * (len(heights) - 1)
    canvas = Image.new("RGB", (width + 2 * MARGIN, height + 2 * MARGIN), "white")
    for number, image in enumerate(head):
        canvas.paste(image, (MARGIN, MARGIN + sum(it.height + MARGIN for it in head[:number])))
    for row, row_height in zip(rows, heights, strict=True):
        bottom += MARGIN + row_height
        left = MARGIN
        for cell, column_width in zip(row, widths, strict=False):
            canvas.paste(cell, (left + (column_width - cell.width) // 2, bottom - cell.height))
            left += column_width + MARGIN
    return canvas
