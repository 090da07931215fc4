"""Draw the pictures of the README from photos that installed packages ship.

python tools/readme_pictures.py            # all of docs/pictures
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageDraw, ImageFont

from pixelclip.backbones import load_backbone
from pixelclip.images import read_photo
from pixelclip.masks.annotations import open_masks
from pixelclip.masks.make import make_masks
from pixelclip.masks.pictures import contact_sheet
from pixelclip.photos import find_photos
from pixelclip.samples import sample_photos
from pixelclip.segmenter import Segmenter
from pixelclip.vocabulary import parse_classes

TARGET = Path(__file__).parent.parent / "docs/pictures"
WIDTH = 420


def scaled(image: Image.Image, width: int = WIDTH) -> Image.Image:
    """The image at that width."""
    height = round(image.height * width / image.width)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def banner(photo: Image.Image, words: str, overlay: Image.Image) -> Image.Image:
    """Photo, the words that were given, and the result, side by side."""
    font = ImageFont.load_default(size=20)
    left, right = scaled(photo), scaled(overlay)
    middle = max(round(font.getlength(f'"{words}"')) + 60, 160)
    canvas = Image.new("RGB", (2 * WIDTH + middle, max(left.height, right.height)), "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (WIDTH + middle, 0))
    draw = ImageDraw.Draw(canvas)
    centre = (WIDTH + middle / 2, left.height / 2)
    draw.text((centre[0], centre[1] - 14), f'"{words}"', fill="black", font=font, anchor="mm")
    draw.line(
        (WIDTH + 20, centre[1] + 8, WIDTH + middle - 20, centre[1] + 8), fill="black", width=2
    )
    tip = WIDTH + middle - 20
    draw.polygon([(tip, centre[1] + 2), (tip + 10, centre[1] + 8), (tip, centre[1] + 14)], "black")
    return canvas


def masks() -> Image.Image:
    """The sample photos beside their superpixels."""
    photos = find_photos([path for path, _ in sample_photos()])
    with TemporaryDirectory() as folder:
        make_masks(photos, folder, source="superpixels")
        return contact_sheet(photos, open_masks(Path(folder), photos), tile=216).image


def main() -> None:
    """Segment every sample photo and write the pictures."""
    TARGET.mkdir(parents=True, exist_ok=True)
    backbone = load_backbone("mini", device="cpu")
    overlays = []
    for path, words in sample_photos():
        photo = read_photo(path)
        result = Segmenter(backbone, parse_classes(words), cache=False)(photo)
        drawn = result.overlay(photo)
        overlays.append(scaled(drawn))
        if path.stem == "china":
            banner(photo, words, drawn).save(TARGET / "banner.jpg", quality=88)
    rows = [overlays[start : start + 3] for start in range(0, len(overlays), 3)]
    heights = [max(image.height for image in row) for row in rows]
    sheet = Image.new("RGB", (3 * (WIDTH + 10) - 10, sum(heights) + 10 * (len(rows) - 1)), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            sheet.paste(image, (column * (WIDTH + 10), top))
        top += height + 10
    sheet.save(TARGET / "samples.jpg", quality=88)
    masks().save(TARGET / "masks.jpg", quality=88)
    print(f"banner.jpg, samples.jpg and masks.jpg -> {TARGET}")


if __name__ == "__main__":
    main()
