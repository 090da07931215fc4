"""Photos in, label maps and overlays out: formats, limits, colours."""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, ImageDraw, ImageFile, ImageFont, ImageOps, UnidentifiedImageError

from pixelclip.errors import DataError

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
MAX_PIXELS = 128_000_000
OVERLAY_PIXELS = 16_000_000
RESIZE_BAND_PIXELS = 8_000_000


class Photo(NamedTuple):
    """A photo to read and the stem, relative to the output folder, of what is written for it."""

    path: Path
    stem: Path


def find_photos(paths: Sequence[Path]) -> list[Photo]:
    """The photos among files and folders (searched with their subfolders), sorted per folder.

    Each gets a stem of its own: where two photos would share one, the suffix is kept in it.

    Raises:
        DataError: a path does not exist, or a folder holds no photo.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if _is_photo(p))
            if not inside:
                raise DataError(
                    f"no photos in {path} (looked for {', '.join(sorted(PHOTO_SUFFIXES))})"
                )
            found |= {p: p.relative_to(path) for p in inside}
        elif path.exists():
            found.setdefault(path, Path(path.name))
        else:
            raise DataError(f"no such photo or folder: {path}")
    stems = [relative.with_suffix("") for relative in found.values()]
    taken: set[Path] = set()
    photos = []
    for (path, relative), stem in zip(found.items(), stems, strict=True):
        unique = stem if stems.count(stem) == 1 else relative
        number = 2
        while unique in taken:
            unique = relative.with_name(f"{relative.name}-{number}")
            number += 1
        taken.add(unique)
        photos.append(Photo(path, unique))
    return photos


def _is_photo(path: Path) -> bool:
    hidden = path.name.startswith(".")
    ours = path.name.endswith((".labels.png", ".overlay.png"))
    return path.suffix.lower() in PHOTO_SUFFIXES and not hidden and not ours and path.is_file()


def read_photo(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The photo as upright RGB, 8 bits per channel.

    Raises:
        DataError: the file is missing, not a photo, damaged, cut short or too large.
    """
    try:
        with _open(path) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(
                    f"{path} is too large: {width} x {height} = {width * height / 1e6:.0f}"
                    f" megapixels, the limit is {max_pixels / 1e6:.0f}; allow it with"
                    f" --max-pixels {width * height}"
                )
            image.load()
            return to_rgb(image)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"no such photo: {path}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is not a photo in a known format") from error
    except Exception as error:  # Pillow's parsers raise anything on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} cannot be read: {reason}") from error


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """Open an image without Pillow's own size limit, which `max_pixels` replaces."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow can live with, so can we
            with Image.open(path) as image:
                yield image
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = limit, truncated


def to_rgb(image: Image.Image) -> Image.Image:
    """The image upright and as 8-bit RGB; 16-bit grey is scaled, transparency dropped."""
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float32)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        image = Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8))
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def as_photo(
    source: object, max_pixels: int = MAX_PIXELS
) -> Image.Image | UInt8[np.ndarray, "H W 3"]:
    """Upright RGB from a path, a PIL image or an array (H, W, 3) or (H, W) of uint8.

    Arrays stay arrays, as a copy of a large one would not be small.

    Raises:
        DataError: it is none of these, or cannot be read.
    """
    if isinstance(source, str | Path):
        return read_photo(Path(source), max_pixels)
    if isinstance(source, Image.Image):
        if source.width * source.height > max_pixels:
            raise DataError(f"the photo has more than {max_pixels / 1e6:.0f} megapixels")
        return to_rgb(source)
    if isinstance(source, np.ndarray):
        colour = source.ndim == 3 and source.shape[2] == 3
        if source.dtype != np.uint8 or not (colour or source.ndim == 2) or source.size == 0:
            raise DataError(
                "an array must be uint8 of shape (H, W, 3) or (H, W), not"
                f" {source.dtype} of shape {source.shape}"
            )
        if source.shape[0] * source.shape[1] > max_pixels:
            raise DataError(f"the photo has more than {max_pixels / 1e6:.0f} megapixels")
        return source if colour else np.repeat(source[..., None], 3, axis=2)
    raise DataError(f"cannot segment a {type(source).__name__}; give a path, PIL image or array")


def photo_size(photo: Image.Image | UInt8[np.ndarray, "H W 3"]) -> tuple[int, int]:
    """Width and height."""
    return photo.size if isinstance(photo, Image.Image) else (photo.shape[1], photo.shape[0])


def resized(photo: Image.Image | UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> Image.Image:
    """Antialiased bilinear resize, computed in bands so that large photos need no second copy.

    Each band's source reaches beyond it as far as the filter does, so bands leave no trace.

    Args:
        photo: RGB.
        size: width and height wanted.
    """
    width, height = photo_size(photo)
    result = Image.new("RGB", size)
    scale = height / size[1]
    reach = math.ceil(max(scale, 1.0)) + 1
    band = max(1, RESIZE_BAND_PIXELS // max(1, round(width * scale)))
    for top in range(0, size[1], band):
        bottom = min(top + band, size[1])
        first = max(0, math.floor(top * scale) - reach)
        last = min(height, math.ceil(bottom * scale) + reach)
        box = (0, top * scale - first, width, min(bottom * scale, height) - first)
        source = (
            photo.crop((0, first, width, last))
            if isinstance(photo, Image.Image)
            else Image.fromarray(np.ascontiguousarray(photo[first:last]))
        )
        part = source.resize((size[0], bottom - top), Image.Resampling.BILINEAR, box=box)
        result.paste(part, (0, top))
    return result


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename.

    Raises:
        DataError: the folder or the file cannot be written.
    """
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            part = Path(file.name)
            file.write(content)
        part.chmod(0o644)
        part.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def png_bytes(image: Image.Image) -> bytes:
    """The image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def read_labels(path: Path) -> Integer[np.ndarray, "H W"]:
    """A label map from a PNG with one channel of 8 or 16 bits (palettes keep their indices).

    Raises:
        DataError: the file is missing, damaged or has several channels.
    """
    try:
        with _open(path) as image:
            if image.mode not in {"L", "P", "I", "I;16", "I;16B", "1"}:
                raise DataError(f"{path} has several channels; a label map has one")
            return np.asarray(image).astype(np.int64)
    except DataError:
        raise
    except Exception as error:  # Pillow's parsers raise anything on damaged files
        raise DataError(f"cannot read label map {path}: {error}") from error


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
    photo: Image.Image,
    labels: Integer[np.ndarray, "H W"],
    classes: Sequence[str],
    *,
    opacity: float = 0.55,
) -> Image.Image:
    """The photo with every class in its colour, outlines, and a legend of the classes in it.

    Pixels of no class keep the photo's colours. A photo above 16 megapixels is drawn smaller; a
    photo that was shrunk already gets its labels shrunk alike.
    """
    photo = for_overlay(photo)
    height, width = labels.shape
    if photo.size != (width, height):
        rows = (np.arange(photo.height) * height) // photo.height
        columns = (np.arange(photo.width) * width) // photo.width
        labels = labels[np.ix_(rows, columns)]
    pixels = np.asarray(photo.convert("RGB"), dtype=np.float32)
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


def for_overlay(photo: Image.Image) -> Image.Image:
    """The photo, or above 16 megapixels a smaller copy, as overlays are drawn on."""
    scale = (OVERLAY_PIXELS / (photo.width * photo.height)) ** 0.5
    if scale >= 1:
        return photo
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    return resized(photo, size)


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
    places: list[tuple[int, int, str, int]] = []
    x = y = gap
    for name, index in entries:
        name = name.strip() or name
        need = box + gap // 2 + int(font.getlength(name)) + gap * 2
        if x > gap and x + need > image.width:
            x, y = gap, y + box + gap
        places.append((x, y, name, index))
        x += need
    strip_height = y + box + gap if places else 0
    canvas = Image.new("RGB", (image.width, image.height + strip_height), "white")
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for x, y, name, index in places:
        top = image.height + y
        if index >= 0:
            colour = tuple(int(c) for c in palette(count)[index])
            draw.rectangle((x, top, x + box, top + box), fill=colour, outline="black")
        draw.text((x + box + gap // 2, top + box / 2), name, fill="black", font=font, anchor="lm")
    return canvas
