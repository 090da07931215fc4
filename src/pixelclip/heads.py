"""What a PNG says of itself, read without its pixels."""

import io
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from pixelclip.errors import DataError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT_BYTES = 2**24  # of the chunks kept; cameras write some kilobytes
_TEXTS = {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}  # where Pillow looks for the orientation


class PngHead(NamedTuple):
    """The first chunk of a PNG: width and height in pixels, bits per channel, kind of colour."""

    width: int
    height: int
    depth: int
    colour: int


def png_head(path: Path) -> PngHead:
    """The head of a PNG.

    Raises:
        DataError: it cannot be read, or is no PNG.
    """
    try:
        with path.open("rb") as file:
            signature, *values = struct.unpack(">8s8x2I2B", file.read(26))
    except (OSError, struct.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if signature != SIGNATURE:
        raise DataError(f"{path} is not a PNG")
    return PngHead(*values)


def png_without_pixels(path: Path) -> io.BytesIO:
    """A PNG of the same head and texts, those behind the pixels too, in memory.

    Pillow decodes a whole photo to learn whether Exif follows its pixels; here they are skipped.
    """
    parts, room, is_behind = [SIGNATURE], MAX_TEXT_BYTES, False
    with path.open("rb") as file:
        file.seek(len(SIGNATURE))
        while len(head := file.read(8)) == 8:
            size, kind = struct.unpack(">I4s", head)
            if kind == b"IEND":
                break
            is_behind = is_behind or kind == b"IDAT"
            if (kind in _TEXTS and size <= room) or (kind == b"IHDR" and size == 13):
                body, check = file.read(size), file.read(4)
                if len(body) < size:
                    break
                # Pillow does not compare the checksums of what follows the pixels.
                parts += [head, body, _checksum(kind, body) if is_behind else check]
                room -= size
            else:
                file.seek(size + 4, io.SEEK_CUR)
    for kind in (b"IDAT", b"IEND"):
        parts += [struct.pack(">I4s", 0, kind), _checksum(kind, b"")]
    return io.BytesIO(b"".join(parts))


def _checksum(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(kind + body))
