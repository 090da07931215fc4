"""Data sets that are not whole, lie elsewhere, or hold what nobody expects."""

import os
import struct
import zlib
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image

from pixelclip.errors import DataError
from pixelclip.evaluation.datasets import load_dataset, load_folder, read_spec
from tests.test_datasets import LAYOUTS, NAMES, SPLITS, write_set


def value(name):
    return 24 if name == "cityscapes" else 8


def write_some(root, name, stems=NAMES):
    return write_set(root, name, {stem: np.full((3, 4), value(name)) for stem in stems})


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_half_a_download_says_what_is_missing_and_where_to_get_it(tmp_path, name):
    write_some(tmp_path, name, [f"2007_00000{k}" for k in range(6)])
    photo, label = (place.replace("{}", "2007_00000{}") for place in LAYOUTS[name][0])
    (tmp_path / photo.format(1)).unlink()
    for number in (2, 3):
        (tmp_path / label.format(number)).unlink()
    spec, lacking = read_spec(name), load_dataset(name, tmp_path).lacking
    assert lacking[0] == f"3 photos were found; the set has {spec.expected}"
    if name in SPLITS:
        missing = f"1 of 6 photos is missing, the first {tmp_path / photo.format(1)}"
    else:
        missing = f"{spec.expected - 5} of {spec.expected} photos are missing"
    assert lacking[1] == f"{missing}; get {spec.photos.get}"
    assert lacking[2] == (
        f"2 of 5 photos have no label map, the first {tmp_path / label.format(2)};"
        f" get {spec.labels.get}"
    )


def test_photos_without_an_object_are_not_missing(tmp_path):
    write_set(tmp_path, "voc20", {"a": [[0]], "b": [[5]]})
    text = files("pixelclip").joinpath("evaluation/specs/voc20.toml").read_text()
    spec = tmp_path / "two.toml"
    spec.write_text(text.replace("expected = 1449", "expected = 2"))
    dataset = load_dataset(str(spec), tmp_path)
    assert len(dataset.pairs) == 1
    assert dataset.lacking == ()


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_an_archive_that_was_not_unpacked_is_named(tmp_path, name):
    spec = read_spec(name)
    archive = spec.photos.get.split(" ")[0].rpartition("/")[2]
    (tmp_path / archive).write_bytes(b"PK")
    with pytest.raises(DataError, match=f"{archive} is there but not unpacked; get "):
        load_dataset(name, tmp_path)


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_root_too_high_or_too_low_is_told_the_right_one(tmp_path, name):
    root = write_some(tmp_path / "downloads", name)
    with pytest.raises(DataError, match=f"there is some with --root {root}; get "):
        load_dataset(name, tmp_path)
    first = LAYOUTS[name][0][0].split("/")[0]
    low = root / first / "empty"
    low.mkdir()
    with pytest.raises(DataError, match=f"there is some with --root {root}"):
        load_dataset(name, low)


def test_a_list_of_other_photos_is_told_from_photos_that_are_not_there(tmp_path):
    write_some(tmp_path, "voc21")
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_text("x\ny\nz\n")
    with pytest.raises(DataError, match=r"no photos of its list of 3 \(looked for") as error:
        load_dataset("voc21", tmp_path)
    assert "--root" not in str(error.value)  # where it looked already is no other place


@pytest.mark.parametrize(
    ("folder", "name"),
    [("voc20", "voc21"), ("voc21", "voc20"), ("context459", "context60"),
     ("context60", "context59"), ("coco-object", "coco-stuff"), ("coco-stuff", "coco-object")],
)  # fmt: skip
def test_sets_of_the_same_files_are_found_in_each_others_folders(tmp_path, folder, name):
    write_some(tmp_path / folder, name)
    assert len(load_dataset(name, tmp_path).pairs) == 2


@pytest.fixture
def folder(tmp_path):
    """A plain folder of two photos and three classes."""
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    (tmp_path / "classes.txt").write_text("cat\ndog\nsky\n")
    for index in range(2):
        Image.new("RGB", (4, 2)).save(tmp_path / f"images/{index}.jpg")
        Image.fromarray(np.full((2, 4), index, np.uint8)).save(tmp_path / f"labels/{index}.png")
    return tmp_path


def grey_png(path, values, depth):
    """A PNG of grey with few bits, as `optipng` and others make of label maps."""
    rows = [np.unpackbits(np.asarray(row, np.uint8)[:, None], axis=1)[:, -depth:].ravel()
            for row in values]  # fmt: skip
    data = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)
    head = struct.pack(">2I5B", len(values[0]), len(values), depth, 0, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_grey_of_few_bits_keeps_its_labels(folder, depth):
    (folder / "classes.txt").write_text("\n".join("abcdefghijklmnop"))
    values = np.arange(8).reshape(2, 4) % 2**depth
    grey_png(folder / "labels/0.png", values.tolist(), depth)
    dataset = load_folder(folder)
    assert dataset.truth(dataset.pairs[0][1]).tolist() == values.tolist()


@pytest.mark.parametrize("added", ["images/0.png", "labels/0.PNG"])
def test_two_files_of_one_name_are_refused(folder, added):
    part = added.partition("/")[0]
    (folder / added).write_bytes(next((folder / part).iterdir()).read_bytes())
    with pytest.raises(DataError, match=r"have the same name; remove one of them"):
        load_folder(folder)


def test_label_maps_without_a_photo_are_told(folder):
    assert load_folder(folder).lacking == ()
    (folder / "images/1.jpg").unlink()
    dataset = load_folder(folder)
    assert len(dataset.pairs) == 1
    assert dataset.lacking == (
        f"1 label maps have no photo, the first {folder / 'labels/1.png'}",
    )  # fmt: skip


def test_a_pipe_is_not_waited_for(folder):
    (folder / "labels/0.png").unlink()
    os.mkfifo(folder / "labels/0.png")
    dataset = load_folder(folder)
    with pytest.raises(DataError, match=r"0.png is not a file"):
        dataset.truth(dataset.pairs[0][1])
    (folder / "classes.txt").unlink()
    os.mkfifo(folder / "classes.txt")
    with pytest.raises(DataError, match=r"classes.txt is not a file"):
        load_folder(folder)


def test_a_missing_label_map_is_named_once(folder):
    (folder / "labels/1.png").unlink()
    dataset = load_folder(folder)
    with pytest.raises(DataError) as error:
        dataset.truth(dataset.pairs[1][1])
    assert str(error.value) == f"no label map {folder / 'labels/1.png'}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\x0cdog\nsky\n", r"class 1 of 2 is not plain text"),  # not the end of a line
        (b"\xff\xfec\0", r"classes.txt is not UTF-8 text"),
        (b"\n".join(b"%d" % k for k in range(8193)), r"8193 classes; the limit is 8192"),
        (b"a" * (2**24 + 1), "too large"),
    ],
)  # fmt: skip
def test_damaged_class_names_are_named(folder, content, message):
    (folder / "classes.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_folder(folder)
