"""Mask stores: what is written is read, damage is told by the shard's name."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixelclip.errors import DataError
from pixelclip.masks import store as store_module
from pixelclip.masks.annotations import open_masks
from pixelclip.masks.names import photo_name
from pixelclip.masks.runs import from_labels, from_masks, from_rle
from pixelclip.masks.store import (
    SCHEMA,
    MaskStore,
    count_masks,
    make_row,
    shard_failures,
    shard_path,
    shard_photos,
    write_manifest,
    write_shard,
)
from pixelclip.photos import Photo

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
    names = [f"sub/{index}.jpg" for index in range(10)]
    rows = [make_row(name, some_masks(index)) for index, name in enumerate(names)]
    write_shard(folder, 0, rows[:7])
    write_shard(folder, 1, [*rows[7:], make_row("ü/雪.jpg", some_masks(3))])
    return folder


def test_a_store_gives_back_what_was_written(store_dir):
    store = pickle.loads(pickle.dumps(open_masks(store_dir)))
    assert isinstance(store, MaskStore)
    assert len(store) == 11
    assert store.photos()[7:] == ["sub/7.jpg", "sub/8.jpg", "sub/9.jpg", "ü/雪.jpg"]
    for seed, name in [*((index, f"sub/{index}") for index in range(10)), (3, "ü/雪")]:
        written, found = some_masks(seed), store(photo(name), SIZE)
        assert found.to_rle() == written.to_rle()
        np.testing.assert_array_equal(found.scores, written.scores)
    assert store(photo("sub/10"), SIZE) is None


def test_masks_are_counted_without_being_read(store_dir):
    assert count_masks(store_dir) == sum(some_masks(seed).count for seed in [*range(10), 3])
    write_shard(store_dir, 2, [])
    assert count_masks(store_dir) == sum(some_masks(seed).count for seed in [*range(10), 3])


def test_the_columns_say_the_same(store_dir):
    table = pq.read_table(shard_path(store_dir, 0))
    for index, areas in enumerate(table["areas"].to_pylist()):
        assert areas == some_masks(index).areas().tolist()
    assert {group.num_rows for group in map(pq.read_metadata(shard_path(store_dir, 0)).row_group,
                                            range(2))} == {4, 3}  # fmt: skip


def test_masks_of_another_size_are_refused(store_dir):
    with pytest.raises(DataError, match=r"shard-00000\.parquet has masks of 7 x 9 pixels"):
        MaskStore(store_dir)(photo("sub/1"), (7, 9))


def test_names_that_are_no_text_are_stored_and_told_apart(tmp_path):
    write_manifest(tmp_path, {})
    names = ["in/\udcff.jpg", "in/\udcfe.jpg", "in/\ufffd.jpg", "in/%FF.jpg"]
    photos = [Photo(Path(name), Path(name).with_suffix("")) for name in names]
    assert photo_name(photos[0]) == "/in/%FF.jpg"
    rows = [make_row(photo_name(photos[index]), some_masks(index + 1)) for index in range(4)]
    write_shard(tmp_path, 0, rows)
    store = MaskStore(tmp_path)
    for index in range(4):
        assert store(photos[index], SIZE).to_rle() == some_masks(index + 1).to_rle()


def test_photos_that_differ_in_their_suffix_keep_their_masks(tmp_path):
    """One is named otherwise by `find_photos` as soon as the other is there."""
    write_manifest(tmp_path, {})
    alone = Photo(Path("d/1.jpg"), Path("1"))
    write_shard(tmp_path, 0, [make_row(photo_name(alone), some_masks(3))])
    store = MaskStore(tmp_path)
    assert store(Photo(Path("d/1.jpg"), Path("1.jpg")), SIZE).count == 3
    assert store(Photo(Path("d/1.png"), Path("1.png")), SIZE) is None
    assert store(Photo(Path("e/1.jpg"), Path("1.jpg-2")), SIZE) is None


def test_a_photo_that_occurs_twice_is_an_error(store_dir):
    write_shard(store_dir, 2, [make_row("sub/3.jpg", some_masks(3))])
    with pytest.raises(DataError, match=r"has the photo 'sub/3\.jpg' twice"):
        MaskStore(store_dir)


@pytest.mark.parametrize("limit", ["MAX_ROWS", "MAX_NAME_BYTES"])
def test_a_shard_of_too_many_photos_is_refused(store_dir, monkeypatch, limit):
    monkeypatch.setattr(store_module, limit, 6)
    with pytest.raises(DataError, match=r"shard-00000\.parquet is damaged or too large: 7 photos"):
        MaskStore(store_dir)


@pytest.mark.parametrize(
    "change", [{"format": "other"}, {"version": 3}, {"version": "2"}, {"format": None}]
)
def test_manifests_of_others_are_refused(store_dir, change):
    path = store_dir / "masks.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=r"masks\.json is not the manifest of a mask store"):
        MaskStore(store_dir)


def test_stores_of_the_first_version_are_to_be_made_again(store_dir):
    path = store_dir / "masks.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 1}))
    with pytest.raises(DataError, match=r"store was made by an earlier version .* make it again$"):
        open_masks(store_dir)


FAILED = [("sub/x.jpg", "sub/x.jpg cannot be read: \x1b no"), ("/%FF.jpg", "w" * 3000)]


def test_a_shard_says_which_photos_have_no_masks_and_why(store_dir):
    rows = [make_row("a.jpg", some_masks(3))]
    write_shard(store_dir, 2, rows, FAILED)
    path = shard_path(store_dir, 2)
    (first, second) = shard_failures(path)
    assert first == ("sub/x.jpg", "sub/x.jpg cannot be read: \\x1b no")  # one line, as printed
    assert second == ("/%FF.jpg", "w" * 1000)
    assert shard_photos(path) == ["a.jpg"]
    assert MaskStore(store_dir)(photo("sub/x"), SIZE) is None
    assert shard_failures(shard_path(store_dir, 1)) == []


def test_a_shard_may_hold_failures_only(store_dir):
    write_shard(store_dir, 2, [], FAILED)
    assert shard_photos(shard_path(store_dir, 2)) == []
    assert len(shard_failures(shard_path(store_dir, 2))) == 2
    assert len(MaskStore(store_dir)) == 11


def test_the_bytes_of_a_shard_depend_on_its_content_only(tmp_path):
    contents = set()
    for folder in ("a", "b"):
        details = tuple({"stability_score": 0.5} for _ in range(4))
        rows = [make_row("a.jpg", replace(some_masks(4), details=details))] * 9
        write_shard(tmp_path / folder, len(contents), rows, FAILED)
        (path,) = (tmp_path / folder).iterdir()
        contents.add(path.read_bytes())
        assert len(contents) == 1


@pytest.mark.parametrize(
    "failures", [b"", b"{", b"{}", b"null", b"3", b'["a"]', b'[["a", "b", "c"]]', b'[["a", 3]]',
                 b'[{"a": "b"}]', b"[" * 5000, b"\xff"]
)  # fmt: skip
def test_failures_that_are_none_are_refused(store_dir, failures):
    path = shard_path(store_dir, 0)
    table = pq.read_table(path)
    with pq.ParquetWriter(path, SCHEMA) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"pixelclip-failures": failures})
    with pytest.raises(DataError, match=r"shard-00000\.parquet"):
        shard_failures(path)


def test_too_many_failures_are_refused(store_dir, monkeypatch):
    write_shard(store_dir, 0, [], FAILED)
    monkeypatch.setattr(store_module, "MAX_FAILURE_BYTES", 99)
    with pytest.raises(DataError, match=r"shard-00000\.parquet is damaged: failures of \d+ bytes"):
        shard_failures(shard_path(store_dir, 0))


def test_a_shard_with_other_columns_is_refused(store_dir):
    path = shard_path(store_dir, 1)
    pq.write_table(pq.read_table(path).drop_columns("areas"), path)
    with pytest.raises(DataError, match=r"shard-00001\.parquet is not a shard"):
        MaskStore(store_dir)


def test_a_row_without_a_score_per_mask_is_refused(store_dir):
    record = {
        "photo": "a.jpg",
        "height": 9,
        "width": 7,
        "counts": [b"o1"],
        "scores": [],
        "areas": [1],
        "details": "",
    }
    pq.write_table(pa.Table.from_pylist([record], SCHEMA), shard_path(store_dir, 2))
    with pytest.raises(DataError, match=r"shard-00002\.parquet is damaged: row 0"):
        MaskStore(store_dir)(photo("a"), SIZE)


def test_damaged_codes_in_a_shard_are_counted(store_dir):
    record = {"photo": "a.jpg", "height": 9, "width": 7, "areas": [1, 63], "details": ""}
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
    for at in generator.integers(len(whole), size=100):
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
    assert len(messages) > 15
    assert all(path.name in message and "\n" not in message for message in messages)


def test_a_store_that_changes_under_a_reader_is_an_error(store_dir):
    store = MaskStore(store_dir)
    write_shard(store_dir, 1, [make_row("sub/7.jpg", some_masks(7))])
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
