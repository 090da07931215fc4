"""Mask stores: the masks of many photos in a folder of Parquet shards (docs/formats.md)."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pixelclip.errors import DataError, visible
from pixelclip.files import replacing
from pixelclip.images import write_json
from pixelclip.masks.details import details_text, parse_details
from pixelclip.masks.names import photo_name
from pixelclip.masks.records import Size, check_size, masks_of, parse_json, read_json
from pixelclip.masks.runs import PhotoMasks
from pixelclip.photos import Photo

FORMAT, VERSION = "pixelclip-masks", 2
MANIFEST = "masks.json"
MAX_MANIFEST_BYTES = 2**26  # 100,000 rounds
MAX_GROUP_BYTES = 2**27
MAX_ROWS, MAX_NAME_BYTES = 10**6, 2**27  # of a shard
MAX_NAME = 2**12  # bytes per photo in a list of names, on average
FAILURES = b"pixelclip-failures"
MAX_FAILURE_BYTES, MAX_LINE = 2**26, 1000  # of all failures of a shard; characters of one
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
        pa.field("details", pa.string(), nullable=False),
    ]
)
MASK_COLUMNS = SCHEMA.names[:-1]  # training has no use for the details


class Row(NamedTuple):
    """The columns of a shard, in their order."""

    photo: str
    height: int
    width: int
    counts: list[bytes]
    scores: list[float]
    areas: list[int]
    details: str = ""


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
        return None if place is None else _masks(_read_row(*place, MASK_COLUMNS), *place, size)

    def with_details(self, photo: Photo, size: Size | None = None) -> PhotoMasks | None:
        """The same with what else is known of the masks, which takes longer.

        Args:
            photo: to look up.
            size: height and width that it must have; None: any.

        Raises:
            DataError: as above, or the details are damaged.
        """
        place = self._rows.get(photo_name(photo))
        if place is None:
            return None
        stored = _read_row(*place, SCHEMA.names)
        known = parse_details(stored.details, len(stored.counts), place[0])
        size = size or (stored.height, stored.width)
        return replace(_masks(stored, *place, size, known.masks), document=known.document)


def read_manifest(folder: Path) -> dict[str, object]:
    """The manifest of a store.

    Raises:
        DataError: there is none, or it is of another format or version.
    """
    path = folder / MANIFEST
    manifest = read_json(path, max_bytes=MAX_MANIFEST_BYTES)
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        if manifest.get("format") == FORMAT and manifest.get("version") == 1:
            raise DataError(f"{folder} was made by an earlier version of pixelclip; make it again")
        raise DataError(f"{path} is not the manifest of a mask store of version {VERSION}")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, object]) -> None:
    """Write the manifest of a store; format and version are added.

    Raises:
        DataError: the folder cannot be written.
    """
    document = {"format": FORMAT, "version": VERSION, **manifest}
    write_json(folder / MANIFEST, document)


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
        details=details_text(masks),
    )


def write_shard(
    folder: Path, index: int, rows: Sequence[Row], failures: Sequence[tuple[str, str]] = ()
) -> None:
    """Write the masks of photos as one shard; its bytes depend on nothing else.

    Args:
        folder: of the store.
        index: of the shard.
        rows: one per photo.
        failures: names of photos that have no masks, each with one line that says why.

    Raises:
        DataError: the folder cannot be written.
    """
    table = pa.Table.from_pylist([row._asdict() for row in rows], SCHEMA)
    path = shard_path(folder, index)
    try:
        with replacing(path) as part:
            with _writer(part) as writer:
                writer.write_table(table, row_group_size=ROW_GROUP)
                if failures:
                    lines = [(name, why[:MAX_LINE]) for name, why in failures]
                    writer.add_key_value_metadata({FAILURES: json.dumps(lines).encode()})
            with part.open("rb") as file:
                os.fsync(file.fileno())  # a name that outlives a loss of power means a whole shard
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def _writer(path: Path) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path,
        SCHEMA,
        compression="zstd",
        use_dictionary=False,  # no mask occurs twice
        write_page_checksum=True,
    )


def shard_photos(path: Path) -> list[str]:
    """The names of the photos of a shard.

    Raises:
        DataError: the shard is damaged.
    """
    with _reading(path) as shard:
        groups = map(shard.metadata.row_group, range(shard.num_row_groups))
        size = sum(group.column(0).total_uncompressed_size for group in groups)
        if shard.metadata.num_rows > MAX_ROWS or size > MAX_NAME_BYTES:
            raise DataError(
                f"{path} is damaged or too large: {shard.metadata.num_rows} photos with names"
                f" of {size} bytes; the limits are {MAX_ROWS} and {MAX_NAME_BYTES}"
            )
        names: list[str] = shard.read(["photo"], use_threads=False)["photo"].to_pylist()
        return names


def read_rows(path: Path) -> list[Row]:
    """All rows of a shard.

    Raises:
        DataError: the shard is damaged.
    """
    with _reading(path) as shard:
        for group in map(shard.metadata.row_group, range(shard.num_row_groups)):
            if group.total_byte_size > MAX_GROUP_BYTES:
                raise DataError(f"{path} is damaged: a row group is too large")
        table = shard.read(use_threads=False)
    return [Row(**row) for row in table.to_pylist()]


def count_masks(folder: Path) -> int:
    """How many masks a store holds, by what its shards say of themselves.

    Raises:
        DataError: a shard is damaged.
    """
    total = 0
    for path in folder.glob("shard-*.parquet"):
        with _reading(path) as shard:
            for group in range(shard.num_row_groups):
                group_metadata = shard.metadata.row_group(group)
                areas = next(
                    column
                    for column in map(group_metadata.column, range(group_metadata.num_columns))
                    if column.path_in_schema.startswith("areas.")
                )
                empty = areas.statistics.null_count if areas.statistics else 0
                total += areas.num_values - empty  # an empty list counts as a value, too
    return total


def shard_failures(path: Path) -> list[tuple[str, str]]:
    """The photos of a shard that have no masks: name and why, in one line.

    Raises:
        DataError: the shard is damaged.
    """
    with _reading(path) as shard:
        text = (shard.metadata.metadata or {}).get(FAILURES, b"[]")
    if len(text) > MAX_FAILURE_BYTES:
        raise DataError(f"{path} is damaged: failures of {len(text)} bytes")
    entries = parse_json(text, path)
    failures: list[tuple[str, str]] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        match entry:
            case [str(name), str(why)]:
                failures.append((name, visible(why)))
            case _:
                raise DataError(f"{path} is damaged: its failures are no names with reasons")
    return failures


def _read_row(path: Path, row: int, columns: list[str]) -> Row:
    """These columns of a row of a shard, read with the few others of its group."""
    with _reading(path) as shard:
        for group in range(shard.num_row_groups):
            metadata = shard.metadata.row_group(group)
            if row >= metadata.num_rows:
                row -= metadata.num_rows
                continue
            if metadata.total_byte_size > MAX_GROUP_BYTES:
                raise DataError(f"{path} is damaged: row group {group} is too large")
            table = shard.read_row_group(group, columns, use_threads=False)
            return Row(**table.slice(row, 1).to_pylist()[0])
    raise DataError(f"{path} has changed since the store was opened")


def _masks(
    stored: Row, path: Path, row: int, size: Size, details: list[dict[str, object]] | None = None
) -> PhotoMasks:
    check_size((stored.height, stored.width), size, path)
    if len(stored.counts) != len(stored.scores):
        raise DataError(f"{path} is damaged: row {row} has not one score per mask")
    return masks_of(stored.counts, stored.scores, size, path, details=details)


def write_names(path: Path, names: Sequence[str]) -> None:
    """Write the names of photos, whole or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        with replacing(path) as part:
            pq.write_table(pa.table({"photo": names}), part, compression="zstd")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def read_names(path: Path, count: int) -> list[str]:
    """The names of so many photos.

    Raises:
        DataError: the file is damaged, or has another number of them.
    """
    try:
        with pq.ParquetFile(path) as file:
            groups = map(file.metadata.row_group, range(file.num_row_groups))
            size = sum(group.total_byte_size for group in groups)
            if file.metadata.num_rows != count or size > MAX_NAME * count:
                raise ValueError("other photos than the manifest says")
            names: list[str] = file.read(["photo"])["photo"].to_pylist()
            if not all(isinstance(name, str) for name in names):
                raise ValueError("its names are no texts")
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    return names


@contextmanager
def _reading(path: Path) -> Iterator[pq.ParquetFile]:
    """A shard, opened; the checksums of its pages are compared while they are read.

    Raises:
        DataError: it is no shard, or what the block reads of it is damaged.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as shard:
            if not shard.schema_arrow.equals(SCHEMA):
                raise DataError(f"{path} is not a shard of a mask store: its columns are others")
            yield shard
    except (pa.ArrowException, OSError, ValueError, IndexError) as error:
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())}") from error
