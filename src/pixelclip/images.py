"""Photos in, label maps and overlays out: formats, limits, colours."""

import io
import json
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
from jaxtyping import Int64, Shaped, UInt8
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from pixelclip.errors import DataError
from pixelclip.files import replacing
from pixelclip.heads import png_head, png_without_pixels

MAX_PIXELS = 128_000_000
OVERLAY_PIXELS = 16_000_000
RESIZE_BAND_PIXELS = 8_000_000
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LYING = {TURNS[5], TURNS[6], TURNS[7], TURNS[8]}

_OPENING = threading.Lock()  # Pillow's limit is a global of its module


def read_photo(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The photo as upright RGB, 8 bits per channel.

    Raises:
        DataError: the file is missing, not a photo, damaged, cut short or too large.
    """
    return to_rgb(load_photo(path, max_pixels))


def load_photo(
    path: Path, max_pixels: int = MAX_PIXELS, *, at_least: tuple[int, int] | None = None
) -> Image.Image:
    """The photo as decoded: `photo_size`, `resized` and `to_rgb` turn it upright and to RGB.

    A large photo is not copied for that.

    Args:
        path: of the file.
        max_pixels: photos with more pixels are refused.
        at_least: width and height, upright, that are enough: a JPEG is decoded at a half, a
            quarter or an eighth of its size where that leaves no less, in a fraction of the time.

    Raises:
        DataError: the file is missing, not a photo, damaged, cut short or too large.
    """
    with reading(path), _open(path, PHOTO_FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise DataError(
                f"{path} is too large: {width} x {height} = {width * height / 1e6:.0f}"
                f" megapixels, the limit is {max_pixels / 1e6:.0f}; allow it with"
                f" --max-pixels {width * height}"
            )
        if at_least is not None and isinstance(image, JpegImageFile):
            lying = TURNS.get(_orientation(image)) in LYING
            image.draft(None, (at_least[1], at_least[0]) if lying else at_least)
        return _decoded(image)


def read_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of the upright photo, from the head of its file.

    Raises:
        DataError: the file is missing, not a photo, damaged or too large.
    """
    with reading(path), _open(path, PHOTO_FORMATS) as image:
        width, height = image.size
        orientation = _orientation(image)
        if isinstance(image, TiffImageFile):  # Pillow may have turned its `size`, or may later
            width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
        elif image.format == "PNG":
            with _open(png_without_pixels(path), ("PNG",)) as head:
                orientation = _orientation(head)
    if width * height > max_pixels:
        raise DataError(
            f"{path} is too large: {width} x {height} = {width * height / 1e6:.0f} megapixels,"
            f" the limit is {max_pixels / 1e6:.0f} megapixels (max_pixels)"
        )
    return (height, width) if TURNS.get(orientation) in LYING else (width, height)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a photo inside the block becomes a line on this path."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"no such photo: {path}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is not a photo in a known format") from error
    except MemoryError as error:
        raise DataError(f"{path} is too large for the memory of this machine") from error
    except Exception as error:  # Pillow's parsers raise anything on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} cannot be read: {reason}") from error


@contextmanager
def _open(path: Path | io.BytesIO, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """Open an image of one of these formats, without Pillow's own size limit.

    `max_pixels` replaces the limit. Other formats are not even tried, as some of Pillow's
    readers start programs.
    """
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow can live with, so can we
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(path, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with image:
        yield image


def _decoded(image: Image.Image) -> Image.Image:
    """The image with its pixels read, in a mode of 8 bits per channel, orientation kept."""
    image.load()
    if image.mode not in {"I", "F"} and not image.mode.startswith("I;16"):
        return image.copy() if image.readonly else image
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    largest = float(values.max(initial=0))
    if image.mode.startswith("I;16") or (image.mode == "I" and largest > 255):
        values = values / np.float32(257)
    elif image.mode == "F" and largest <= 1:
        values = values * np.float32(255)
    grey = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    grey.getexif()[ORIENTATION] = _orientation(image)
    return grey


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; of a PNG not decoded yet, what precedes the pixels."""
    try:
        value = Image.Image.getexif(image).get(ORIENTATION, 1)  # a PNG's own decodes the pixels
    except MemoryError:
        raise
    except Exception:  # damaged EXIF blocks raise anything; the pixels are still good
        return 1
    return value if value in range(1, 9) else 1


def to_rgb(photo: Image.Image) -> Image.Image:
    """The photo upright and as 8-bit RGB; transparency is dropped."""
    image = photo if photo.mode == "RGB" else photo.convert("RGB")
    turn = TURNS.get(_orientation(photo))
    if turn is None:
        return image
    upright = image.transpose(turn)
    upright.getexif().pop(ORIENTATION, None)
    return upright


Photograph = Image.Image | UInt8[np.ndarray, "H W 3"]


def as_photo(source: object, max_pixels: int = MAX_PIXELS) -> Photograph:
    """A photo from a path, a PIL image or an array (H, W, 3) or (H, W) of uint8.

    PIL images come as decoded (see `load_photo`), arrays as arrays.

    Raises:
        DataError: it is none of these, or cannot be read.
    """
    if isinstance(source, str | Path):
        return load_photo(Path(source), max_pixels)
    if isinstance(source, Image.Image):
        return _checked_image(source, max_pixels)
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


def _checked_image(image: Image.Image, max_pixels: int) -> Image.Image:
    pixels = image.width * image.height
    if not 0 < pixels <= max_pixels:
        raise DataError(
            f"the photo has {image.width} x {image.height} pixels; 1 to {max_pixels} are allowed"
        )
    try:
        image.crop((0, 0, 1, 1)).convert("RGB")  # not every mode can become RGB
        return _decoded(image)
    except Exception as error:  # Pillow's parsers raise anything on damaged files
        raise DataError(f"the photo cannot be read: {error}") from error


def photo_size(photo: Photograph) -> tuple[int, int]:
    """Width and height of the upright photo."""
    if not isinstance(photo, Image.Image):
        return photo.shape[1], photo.shape[0]
    lying = TURNS.get(_orientation(photo)) in LYING
    return (photo.height, photo.width) if lying else photo.size


def resized(photo: Photograph, size: tuple[int, int]) -> Image.Image:
    """Antialiased bilinear resize to upright RGB, in bands so that no second copy is made.

    Each band's source reaches beyond it as far as the filter does, so bands leave no trace.

    Args:
        photo: as decoded, or an array.
        size: width and height wanted, upright.
    """
    if not isinstance(photo, Image.Image):
        return _resized_bands(photo, size)
    if photo.width * photo.height <= OVERLAY_PIXELS:
        photo = to_rgb(photo)  # turned first, as anyone would; a large one is turned when small
    turn = TURNS.get(_orientation(photo))
    stored = (size[1], size[0]) if turn in LYING else size
    result = _resized_bands(photo, stored)
    return result if turn is None else result.transpose(turn)


def _resized_bands(photo: Photograph, size: tuple[int, int]) -> Image.Image:
    """The photo as it is stored, not turned, at that width and height."""
    if isinstance(photo, Image.Image):
        width, height = photo.size
    else:
        height, width = photo.shape[:2]
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
            photo.crop((0, first, width, last)).convert("RGB")
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
    try:
        with replacing(path) as part:
            part.write_bytes(content)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, document: object) -> None:
    """Write a document as JSON, whole or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode("utf-8", "replace"))  # names of files may be no text


def check_writable(folder: Path) -> None:
    """Make sure that files can be written to a folder, before the work and not after it.

    Raises:
        DataError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, prefix=".", suffix=".part"):
            pass
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror or error}") from error


def png_bytes(image: Image.Image) -> bytes:
    """The image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def read_labels(path: Path) -> Int64[np.ndarray, "H W"]:
    """A label map from a PNG with one channel of 8 or 16 bits (palettes keep their indices).

    Raises:
        DataError: the file is missing, damaged or has several channels.
    """
    return read_indices(path).astype(np.int64)


def read_indices(path: Path) -> Shaped[np.ndarray, "H W"]:
    """The same in the type that is stored, which takes an eighth of the memory.

    Raises:
        DataError: the file is missing, damaged or has several channels.
    """
    modes = {"L", "P", "I", "I;16", "I;16B", "1"}
    labels = read_png(path, modes, "has several channels; a label map has one")
    head = png_head(path)
    if head.depth >= 8 or head.colour != 0:
        return labels
    # Pillow stretches grey of 1, 2 or 4 bits to 0 to 255: label 1 would be 255.
    return labels.view(np.uint8) // np.uint8(255 // (2**head.depth - 1))


def read_png(path: Path, modes: set[str], otherwise: str) -> Shaped[np.ndarray, "H W *C"]:
    """The pixels of a PNG as they are stored, if its mode, in Pillow's words, is one of these.

    Raises:
        DataError: the file is missing or damaged, or of another mode: it `otherwise`.
    """
    try:
        with _open(path, ("PNG",)) as image:
            if image.mode in modes:
                return np.asarray(image)
    except Exception as error:  # Pillow's parsers raise anything on damaged files
        raise DataError(f"cannot read label map {path}: {error}") from error
    raise DataError(f"{path} {otherwise}")


def for_overlay(photo: Photograph) -> Image.Image:
    """Upright RGB to draw on, smaller than the photo above 16 megapixels."""
    width, height = photo_size(photo)
    scale = (OVERLAY_PIXELS / (width * height)) ** 0.5
    if scale < 1:
        return resized(photo, (max(1, round(width * scale)), max(1, round(height * scale))))
    return to_rgb(photo) if isinstance(photo, Image.Image) else Image.fromarray(photo)
