"""Mask stores: what is written is read, damage is told by the shard's name."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixelclip.errors import DataError
from pixelclip.images import Photo
from pixelclip.masks.annotations import open_masks
from pixelclip.masks.runs import from_labels, from_masks, from_rle
from pixelclip.masks.store import (
    SCHEMA,
    MaskStore,
    make_row,
    shard_path,
    write_manifest,
    write_shard,
)

SIZE = (9, 7)


def photo(name):
    return Photo(Path("photos") / f"{name}.jpg", Path(name))


def some_masks(seed):
    generator = np.random.default_rng(seed)
    masks = from_masks(generator.random((seed % 5, *SIZE)) < 0.4)
    return from_rle(*SIZE, masks.to_rle(), generator.random(masks.count).tolist())


@pytest.fixture
def store_dir(tmp_path):
    """A store of 11 photos in two shards."""
    folder = tmp_path / "store"
    write_manifest(folder, {"source": "test"})
    names = [f"sub/{index}" for index in range(10)]
    rows = [make_row(name, some_masks(index)) for index, name in enumerate(names)]
    write_shard(folder, 0, rows[:7])
    write_shard(folder, 1, [*rows[7:], make_row("ü/雪", some_masks(3))])
    return folder


def test_a_store_gives_back_what_was_written(store_dir):
    store = pickle.loads(pickle.dumps(open_masks(store_dir)))
    assert isinstance(store, MaskStore)
    assert len(store) == 11
    assert store.photos()[7:] == ["sub/7", "sub/8", "sub/9", "ü/雪"]
    for seed, name in [*((index, f"sub/{index}") for index in range(10)), (3, "ü/雪")]:
        written, found = some_masks(seed), store(photo(name), SIZE)
        assert found.to_rle() == written.to_rle()
        np.testing.assert_array_equal(found.scores, written.scores)
    assert store(photo("sub/10"), SIZE) is None


def test_the_columns_say_the_same(store_dir):
    table = pq.read_table(shard_path(store_dir, 0))
    for index, areas in enumerate(table["areas"].to_pylist()):
        assert areas == some_masks(index).areas().tolist()
    assert {group.num_rows for group in map(pq.read_metadata(shard_path(store_dir, 0)).row_group,
                                            range(2))} == {4, 3}  # fmt: skip


def test_masks_of_another_size_are_refused(store_dir):
    with pytest.raises(DataError, match=r"shard-00000\.parquet has masks of 7 x 9 pixels"):
        MaskStore(store_dir)(photo("sub/1"), (7, 9))


def test_names_that_are_no_text_are_stored(tmp_path):
    write_manifest(tmp_path, {})
    odd = Photo(Path("a"), Path("\udcff"))
    write_shard(tmp_path, 0, [make_row("\ufffd", some_masks(1))])
    assert MaskStore(tmp_path)(odd, SIZE).count == 1


@pytest.mark.parametrize(
    "change", [{"format": "other"}, {"version": 2}, {"version": "1"}, {"format": None}]
)
def test_manifests_of_others_are_refused(store_dir, change):
    path = store_dir / "masks.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=r"masks\.json is not the manifest of a mask store"):
        MaskStore(store_dir)


def test_a_shard_with_other_columns_is_refused(store_dir):
    path = shard_path(store_dir, 1)
    pq.write_table(pq.read_table(path).drop_columns("areas"), path)
    with pytest.raises(DataError, match=r"shard-00001\.parquet is not a shard"):
        MaskStore(store_dir)


def test_a_row_without_a_score_per_mask_is_refused(store_dir):
    record = {"photo": "a", "height": 9, "width": 7, "counts": [b"o1"], "scores": [], "areas": [1]}
    pq.write_table(pa.Table.from_pylist([record], SCHEMA), shard_path(store_dir, 2))
    with pytest.raises(DataError, match=r"shard-00002\.parquet is damaged: row 0"):
        MaskStore(store_dir)(photo("a"), SIZE)


def test_damaged_codes_in_a_shard_are_counted(store_dir):
    record = {"photo": "a", "height": 9, "width": 7, "areas": [1, 63]}
    record |= {"counts": [b"\xff", from_labels(np.ones(SIZE, int)).to_rle()[0]], "scores": [0.5, 1]}
    pq.write_table(pa.Table.from_pylist([record], SCHEMA), shard_path(store_dir, 2))
    masks = MaskStore(store_dir)(photo("a"), SIZE)
    assert (masks.count, masks.broken) == (1, 1)


def test_truncated_shards_are_named(store_dir):
    path = shard_path(store_dir, 1)
    whole = path.read_bytes()
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"shard-00001\.parquet is damaged"):
            MaskStore(store_dir)


def test_flipped_bits_never_change_masks(store_dir):
    """Pages have checksums, so damage to them is found; damage elsewhere gives an error or none."""
    path = shard_path(store_dir, 0)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    messages = []
    for at in generator.integers(len(whole), size=300):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        try:
            store = MaskStore(store_dir)
            for index in range(7):
                masks = store(photo(f"sub/{index}"), SIZE)
                assert masks is None or masks.to_rle() == some_masks(index).to_rle()
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all(path.name in message and "\n" not in message for message in messages)


def test_a_store_that_changes_under_a_reader_is_an_error(store_dir):
    store = MaskStore(store_dir)
    write_shard(store_dir, 1, [make_row("sub/7", some_masks(7))])
    with pytest.raises(DataError, match="has changed since"):
        store(photo("sub/9"), SIZE)
    shard_path(store_dir, 0).unlink()
    with pytest.raises(DataError, match=r"shard-00000\.parquet"):
        store(photo("sub/1"), SIZE)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        write_shard(tmp_path / "file", 0, [make_row("a", some_masks(1))])
    with pytest.raises(DataError, match="cannot write"):
        write_manifest(tmp_path / "file", {})
