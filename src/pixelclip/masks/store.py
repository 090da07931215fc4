"""Mask stores: the masks of many photos in a folder of Parquet shards (docs/formats.md)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pixelclip.errors import DataError
from pixelclip.files import replacing
from pixelclip.images import Photo, write_bytes
from pixelclip.masks.names import photo_name
from pixelclip.masks.records import Size, check_size, masks_of, read_json
from pixelclip.masks.runs import PhotoMasks

FORMAT, VERSION = "pixelclip-masks", 1
MANIFEST = "masks.json"
MAX_MANIFEST_BYTES = 2**20
MAX_GROUP_BYTES = 2**30
MAX_ROWS, MAX_NAME_BYTES = 10**6, 2**28  # of a shard
ROW_GROUP = 4  # photos; to look one up, this many are read


def _list_of(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind, nullable=False))


SCHEMA = pa.schema(
    [
        pa.field("photo", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("counts", _list_of(pa.binary()), nullable=False),
        pa.field("scores", _list_of(pa.float32()), nullable=False),
        pa.field("areas", _list_of(pa.int64()), nullable=False),
    ]
)


class Row(NamedTuple):
    """The columns of a shard, in their order."""

    photo: str
    height: int
    width: int
    counts: list[bytes]
    scores: list[float]
    areas: list[int]


class MaskStore:
    """The masks of photos by the path of the photo below its folder.

    Args:
        folder: with the manifest and the shards. Only the names of the photos are read here.

    Raises:
        DataError: it is no store, of another version, a shard is damaged, or a photo occurs twice.
    """

    def __init__(self, folder: Path) -> None:
        read_manifest(folder)
        self._rows: dict[str, tuple[Path, int]] = {}
        for path in sorted(folder.glob("shard-*.parquet")):
            for row, photo in enumerate(shard_photos(path)):
                if photo in self._rows:
                    raise DataError(f"{folder} has the photo {photo!r} twice")
                self._rows[photo] = (path, row)

    def __len__(self) -> int:
        """Number of photos."""
        return len(self._rows)

    def photos(self) -> list[str]:
        """Names of the photos in the store, in its order (`names.photo_name`)."""
        return list(self._rows)

    def knows(self, photo: Photo) -> bool:
        """Whether the photo is in the store."""
        return photo_name(photo) in self._rows

    def __call__(self, photo: Photo, size: Size) -> PhotoMasks | None:
        """The masks of a photo of this height and width; None if it is not in the store.

        Raises:
            DataError: its shard is damaged, or its masks have another size.
        """
        place = self._rows.get(photo_name(photo))
        if place is None:
            return None
        path, row = place
        stored = _read_row(path, row)
        check_size((stored.height, stored.width), size, path)
        if len(stored.counts) != len(stored.scores):
            raise DataError(f"{path} is damaged: row {row} has not one score per mask")
        return masks_of(stored.counts, stored.scores, size, path)


def read_manifest(folder: Path) -> dict[str, object]:
    """The manifest of a store.

    Raises:
        DataError: there is none, or it is of another format or version.
    """
    path = folder / MANIFEST
    manifest = read_json(path, max_bytes=MAX_MANIFEST_BYTES)
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise DataError(f"{path} is not the manifest of a mask store of version {VERSION}")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, object]) -> None:
    """Write the manifest of a store; format and version are added.

    Raises:
        DataError: the folder cannot be written.
    """
    document = {"format": FORMAT, "version": VERSION, **manifest}
    text = json.dumps(document, indent=2, ensure_ascii=False)
    write_bytes(folder / MANIFEST, f"{text}\n".encode())


def shard_path(folder: Path, index: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{index:05d}.parquet"


def make_row(name: str, masks: PhotoMasks) -> Row:
    """The row of a photo of that name."""
    return Row(
        photo=name,
        height=masks.height,
        width=masks.width,
        counts=masks.to_rle(),
        scores=masks.scores.tolist(),
        areas=masks.areas().tolist(),
    )


def write_shard(folder: Path, index: int, rows: Sequence[Row]) -> None:
    """Write the masks of photos as one shard.

    Raises:
        DataError: the folder cannot be written.
    """
    table = pa.Table.from_pylist([row._asdict() for row in rows], SCHEMA)
    path = shard_path(folder, index)
    try:
        with replacing(path) as part:
            pq.write_table(
                table,
                part,
                row_group_size=ROW_GROUP,
                compression="zstd",
                use_dictionary=False,  # no mask occurs twice
                write_page_checksum=True,
            )
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def shard_photos(path: Path) -> list[str]:
    """The names of the photos of a shard.

    Raises:
        DataError: the shard is damaged.
    """
    try:
        with _open(path) as shard:
            groups = map(shard.metadata.row_group, range(shard.num_row_groups))
            size = sum(group.column(0).total_uncompressed_size for group in groups)
            if shard.metadata.num_rows > MAX_ROWS or size > MAX_NAME_BYTES:
                raise DataError(
                    f"{path} is damaged or too large: {shard.metadata.num_rows} photos with names"
                    f" of {size} bytes; the limits are {MAX_ROWS} and {MAX_NAME_BYTES}"
                )
            return shard.read(["photo"], use_threads=False)["photo"].to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _read_row(path: Path, row: int) -> Row:
    """A row of a shard, read with the few others of its group."""
    try:
        with _open(path) as shard:
            for group in range(shard.num_row_groups):
                metadata = shard.metadata.row_group(group)
                if row >= metadata.num_rows:
                    row -= metadata.num_rows
                    continue
                if metadata.total_byte_size > MAX_GROUP_BYTES:
                    raise DataError(f"{path} is damaged: row group {group} is too large")
                table = shard.read_row_group(group, use_threads=False)
                return Row(**table.slice(row, 1).to_pylist()[0])
    except (pa.ArrowException, OSError, ValueError, IndexError) as error:
        raise _damaged(path, error) from error
    raise DataError(f"{path} has changed since the store was opened")


def _open(path: Path) -> pq.ParquetFile:
    """A shard, opened; the checksums of its pages are compared while they are read."""
    shard = pq.ParquetFile(path, page_checksum_verification=True)
    if not shard.schema_arrow.equals(SCHEMA):
        raise DataError(f"{path} is not a shard of a mask store: its columns are others")
    return shard


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is damaged: {' '.join(str(error).split())}")
