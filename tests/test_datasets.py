"""Data sets as their official archives unpack: tiny files in the same layout."""

import hashlib
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from pixelclip.errors import ConfigError, DataError
from pixelclip.evaluation.datasets import (
    dataset_names,
    load_dataset,
    load_folder,
    read_spec,
    spec_classes,
)
from pixelclip.evaluation.label_values import LabelValues, read_classes
from pixelclip.vocabulary import check_classes, class_lists

COUNTS = {
    "ade150": 150, "ade847": 847, "cityscapes": 19, "coco-object": 81, "coco-stuff": 171,
    "context459": 459, "context59": 59, "context60": 60, "voc20": 20, "voc21": 21,
}  # fmt: skip

# Where one archive after the other, unpacked into a folder, puts a photo and its label map, and
# where other people's instructions have them.
LAYOUTS = {
    "ade150": [
        ("ADEChallengeData2016/images/validation/{}.jpg",
         "ADEChallengeData2016/annotations/validation/{}.png"),
        ("images/validation/{}.jpg", "annotations/validation/{}.png"),
    ],
    "ade847": [
        ("ADE20K_2021_17_01/images/ADE/validation/urban/street/{}.jpg",
         "ADE20K_2021_17_01/images/ADE/validation/urban/street/{}_seg.png"),
        ("images/ADE/validation/work_place/office/{}.jpg",
         "images/ADE/validation/work_place/office/{}_seg.png"),
    ],
    "cityscapes": [
        ("leftImg8bit/val/lindau/{}_leftImg8bit.png", "gtFine/val/lindau/{}_gtFine_labelIds.png"),
        ("leftImg8bit_trainvaltest/leftImg8bit/val/lindau/{}_leftImg8bit.png",
         "gtFine_trainvaltest/gtFine/val/lindau/{}_gtFine_labelIds.png"),
    ],
    "coco-stuff": [
        ("val2017/{}.jpg", "stuffthingmaps_trainval2017/val2017/{}.png"),
        ("val2017/{}.jpg", "val2017/{}.png"),
        ("coco-stuff/images/val2017/{}.jpg", "coco-stuff/annotations/val2017/{}.png"),
        ("images/val2017/{}.jpg", "stuffthingmaps/val2017/{}.png"),
    ],
    "context459": [
        ("VOCdevkit/VOC2010/JPEGImages/{}.jpg", "trainval/{}.mat"),
        ("VOCdevkit/VOC2010/JPEGImages/{}.jpg", "VOCdevkit/VOC2010/trainval/{}.mat"),
        ("JPEGImages/{}.jpg", "trainval/{}.mat"),
    ],
    "voc21": [
        ("VOCdevkit/VOC2012/JPEGImages/{}.jpg", "VOCdevkit/VOC2012/SegmentationClass/{}.png"),
        ("VOC2012/JPEGImages/{}.jpg", "VOC2012/SegmentationClass/{}.png"),
        ("JPEGImages/{}.jpg", "SegmentationClass/{}.png"),
    ],
}  # fmt: skip
LAYOUTS["coco-object"] = LAYOUTS["coco-stuff"]
LAYOUTS["context59"] = LAYOUTS["context60"] = LAYOUTS["context459"]
LAYOUTS["voc20"] = LAYOUTS["voc21"]
SPLITS = {
    "voc20": "ImageSets/Segmentation/val.txt", "voc21": "ImageSets/Segmentation/val.txt",
    "context59": "ImageSets/Main/val.txt", "context60": "ImageSets/Main/val.txt",
    "context459": "ImageSets/Main/val.txt",
}  # fmt: skip
NAMES = ["2007_000033", "2007_000042"]

# COCO's ids of things, 1 to 90, that no photo has.
COCO_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
# The numbers of the 59 classes among the 459, in the order in which conversions list them.
CONTEXT_59 = [
    2, 259, 260, 415, 324, 9, 258, 144, 18, 19, 22, 23, 397, 25, 284, 158, 159, 416, 33, 162, 420,
    454, 295, 296, 427, 44, 45, 46, 308, 59, 440, 445, 31, 232, 65, 354, 424, 68, 326, 72, 458, 34,
    207, 80, 355, 85, 347, 220, 349, 360, 98, 187, 104, 105, 366, 189, 368, 113, 115,
]  # fmt: skip
# Id and train id in the script that comes with Cityscapes.
CITYSCAPES = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12,
    26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip


def write_labels(path, values):
    """A label map of these values, stored as the official files are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.asarray(values)
    if path.suffix == ".mat":
        savemat(path, {"LabelMap": values.astype(np.uint16)}, do_compression=True)
    elif path.name.endswith("_seg.png"):
        colours = np.stack([values // 256 * 10, values % 256, values % 7], axis=-1)
        Image.fromarray(colours.astype(np.uint8)).save(path)
    elif "SegmentationClass" in str(path):
        picture = Image.fromarray(values.astype(np.uint8)).convert("P")
        picture.putdata([int(v) for v in values.ravel()])
        picture.putpalette([c for v in range(256) for c in (v, 255 - v, v // 2)])
        picture.save(path)
    else:
        Image.fromarray(values.astype(np.uint8)).save(path)


def write_set(root, name, maps, layout=0):
    """A data set with one photo per label map, in one of its layouts."""
    photo, label = LAYOUTS[name][layout]
    for stem, values in maps.items():
        path = root / photo.replace("{}", stem)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", np.shape(values)[::-1]).save(path)
        write_labels(root / label.replace("{}", stem), values)
    if name in SPLITS:
        split = root / photo.partition("JPEGImages")[0] / SPLITS[name]
        split.parent.mkdir(parents=True, exist_ok=True)
        split.write_text("".join(f"{stem}\n" for stem in maps))
    return root


def official_values(name):
    """All values that the official label maps of a set can hold."""
    if name.startswith("coco"):
        return [i - 1 for i in range(1, 183) if i not in COCO_GAPS] + [255]
    if name.startswith("context"):
        return list(range(1, 460))
    return {"ade150": list(range(151)), "ade847": list(range(26 * 256)),
            "cityscapes": list(range(34)), "voc20": [*range(21), 255],
            "voc21": [*range(21), 255]}[name]  # fmt: skip


def expected_class(name, value):
    """The class of a value, or None: written down from the sets' own documents, case by case."""
    if name == "ade150":
        return value - 1 if value else None
    if name == "voc20":
        return value - 1 if 1 <= value <= 20 else None
    if name == "voc21":
        return value if value <= 20 else None
    if name == "cityscapes":
        return CITYSCAPES.get(value)
    if name == "context459":
        return value - 1
    if name in {"context59", "context60"}:
        kept = sorted(CONTEXT_59)
        place = kept.index(value) if value in kept else None
        if name == "context59":
            return place
        return 0 if place is None else place + 1
    ids = [i for i in range(1, 183) if i not in COCO_GAPS]
    if name == "coco-stuff":
        return ids.index(value + 1) if value != 255 else None
    return ids.index(value + 1) + 1 if value < 90 else 0


@pytest.mark.parametrize("name", dataset_names())
def test_every_set_has_a_spec_and_as_many_names_as_classes(name):
    spec = read_spec(name)
    classes = spec_classes(spec)
    assert len(classes) == COUNTS[name] == spec.values.num_classes
    assert check_classes(classes) == classes
    assert (spec.values.first == 1) <= (classes[0] == "background")
    assert "http" in spec.photos.get
    assert "http" in spec.labels.get


def test_there_are_the_sets_of_the_protocols():
    assert dataset_names() == sorted(COUNTS)


@pytest.mark.parametrize("name", sorted(set(COUNTS) - {"ade847"}))
def test_every_official_value_becomes_its_class(tmp_path, name):
    values = official_values(name)
    grid = np.resize(values, (7, -(-len(values) // 7)))
    dataset = load_dataset(name, write_set(tmp_path, name, {NAMES[0]: grid}))
    truth = dataset.truth(dataset.pairs[0][1])
    slow = [[expected_class(name, int(v)) for v in row] for row in grid]
    np.testing.assert_array_equal(
        truth, [[dataset.ignore if v is None else v for v in row] for row in slow]
    )
    assert set(np.unique(truth)) - {dataset.ignore} == set(range(COUNTS[name]))


def test_ade847_is_decoded_from_its_colours(tmp_path):
    grid = np.arange(26 * 256).reshape(64, 104)
    dataset = load_dataset("ade847", write_set(tmp_path, "ade847", {NAMES[0]: grid}))
    path = dataset.pairs[0][1]
    truth, colours = dataset.truth(path), np.asarray(Image.open(path)).astype(int)
    assert dataset.ignore == 65535
    wanted = list(read_spec("ade847").values.values)
    for row in range(0, 64, 5):
        for column in range(104):
            red, green, _ = colours[row, column]
            number = red // 10 * 256 + green
            expected = wanted.index(number) if number in wanted else 65535
            assert truth[row, column] == expected
    assert set(np.unique(truth)) == {*range(847), 65535}


# Of the index that comes with ADE20K_2021_17_01, with the place of the class among the 847.
@pytest.mark.parametrize(
    ("number", "name"),
    [(2978, "wall"), (312, "building, edifice"), (2420, "sky"), (2855, "tree"),
     (447, "ceiling"), (165, "bed"), (1474, "loudspeaker, speaker, speaker unit, loudspeaker"
      " system, speaker system"), (6, "ad, advertisement, advertizement, advertising,"
      " advertizing, advert")],
)  # fmt: skip
def test_ade847_numbers_belong_to_their_names(number, name):
    spec = read_spec("ade847")
    assert spec_classes(spec)[spec.values.values.index(number)] == name


def test_the_59_classes_are_those_of_the_459_by_name():
    names = class_lists()["pascal-context-459"]
    spec = read_spec("context59")
    found = [names[value - 1] for value in spec.values.values]
    found[found.index("table")] = "diningtable"  # the authors' word
    assert tuple(found) == spec_classes(spec)
    assert read_spec("context60").values.values == spec.values.values


def test_coco_objects_are_the_things_of_coco_stuff():
    stuff, objects = read_spec("coco-stuff"), read_spec("coco-object")
    assert objects.values.values == stuff.values.values[:80]
    assert spec_classes(objects) == ("background", *spec_classes(stuff)[:80])
    # COCO's instances.json: 1 person, 13 stop sign, 44 bottle, 67 dining table, 90 toothbrush
    for number, name in [(1, "person"), (13, "stop sign"), (44, "bottle"), (67, "dining table"),
                         (90, "toothbrush")]:  # fmt: skip
        assert spec_classes(stuff)[stuff.values.values.index(number - 1)] == name


@pytest.mark.shared
def test_class_lists_are_the_authors(shared_dir):
    authors = json.loads((shared_dir / "reference/class_names.json").read_text())
    lists = {spec.classes: spec_classes(spec) for spec in map(read_spec, dataset_names())}
    for name, names in authors.items():
        assert lists[name] == tuple(names)


@pytest.mark.parametrize(
    ("name", "layout"), [(n, k) for n in sorted(LAYOUTS) for k in range(len(LAYOUTS[n]))]
)
def test_each_layout_is_found(tmp_path, name, layout):
    value = 24 if name == "cityscapes" else 15
    maps = {stem: np.full((3, 4), value) for stem in NAMES}
    dataset = load_dataset(name, write_set(tmp_path, name, maps, layout))
    assert dataset.expected == read_spec(name).expected
    assert len(dataset.pairs) == 2
    for (photo, label), stem in zip(dataset.pairs, NAMES, strict=True):
        assert photo.name.startswith(stem)
        assert label.name.startswith(stem)
        assert photo.is_file()
        assert dataset.truth(label).shape == (3, 4)


def test_voc20_leaves_out_photos_of_background_only_and_voc21_does_not(tmp_path):
    maps = {"2007_000001": [[0, 255]], "2007_000002": [[0, 5]], "2007_000003": [[255, 255]]}
    write_set(tmp_path, "voc20", maps)
    twenty, all_classes = load_dataset("voc20", tmp_path), load_dataset("voc21", tmp_path)
    assert [photo.stem for photo, _ in twenty.pairs] == ["2007_000002"]
    assert len(all_classes.pairs) == 3
    path = twenty.pairs[0][1]
    assert twenty.truth(path).tolist() == [[255, 4]]
    assert all_classes.truth(path).tolist() == [[0, 5]]
    assert twenty.classes == all_classes.classes[1:]


def test_an_unreadable_label_map_is_not_left_out_in_silence(tmp_path):
    write_set(tmp_path, "voc20", {key: [[1, 2]] for key in NAMES})
    path = tmp_path / f"VOCdevkit/VOC2012/SegmentationClass/{NAMES[0]}.png"
    path.write_bytes(path.read_bytes()[:60])
    dataset = load_dataset("voc20", tmp_path)
    assert len(dataset.pairs) == 2
    with pytest.raises(DataError, match=NAMES[0]):
        dataset.truth(path)


def test_the_split_decides_which_photos_count_and_in_which_order(tmp_path):
    write_set(tmp_path, "voc21", {f"2007_{k:06d}": [[k]] for k in range(9)})
    split = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    split.write_bytes(b"\xef\xbb\xbf2007_000007\r\n2007_000002\r\n\r\n2007_000099\r\n")
    dataset = load_dataset("voc21", tmp_path)
    assert [photo.stem for photo, _ in dataset.pairs] == ["2007_000007", "2007_000002"]
    assert dataset.expected == 1449


@pytest.mark.parametrize("place", ["", "VOC2010/"])
def test_the_list_of_published_figures_goes_before_voc2010s_own(tmp_path, place):
    write_set(tmp_path, "context59", {stem: [[2]] for stem in NAMES}, layout=2)
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "pascalcontext_val.txt").write_text(NAMES[1])
    assert [p.stem for p, _ in load_dataset("context59", tmp_path).pairs] == [NAMES[1]]


def test_half_a_download_is_usable_and_says_of_how_many(tmp_path):
    write_set(tmp_path, "coco-stuff", {f"{k:012d}": [[k]] for k in range(5)})
    (tmp_path / "val2017/000000000001.jpg").unlink()
    (tmp_path / "stuffthingmaps_trainval2017/val2017/000000000002.png").unlink()
    dataset = load_dataset("coco-stuff", tmp_path)
    assert [int(photo.stem) for photo, _ in dataset.pairs] == [0, 3, 4]
    assert dataset.expected == 5000


def test_files_of_other_programs_are_passed_over(tmp_path):
    write_set(tmp_path, "coco-stuff", {"000000000139": [[1]]}, layout=2)
    folder = tmp_path / "coco-stuff/images/val2017"
    (folder / "._000000000139.jpg").write_bytes(b"x")
    (folder / "Thumbs.db").write_bytes(b"x")
    labels = tmp_path / "coco-stuff/annotations/val2017"
    for name in ("000000000139_labelTrainIds.png", "._000000000139.png"):
        (labels / name).write_bytes(b"x")
    dataset = load_dataset("coco-stuff", tmp_path)
    assert [label.name for _, label in dataset.pairs] == ["000000000139.png"]


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("voc20", "VOCdevkit/VOC2012/SegmentationClass", r"voc20 in .*: no label maps of its photos"
         r" \(looked for SegmentationClass/\*.png; also in VOC2012, VOCdevkit/VOC2012\); get"
         r" http.*VOCtrainval_11-May-2012.tar"),
        ("voc20", "VOCdevkit/VOC2012/JPEGImages", r"no photos .*JPEGImages/\*.jpg"),
        ("voc21", "VOCdevkit/VOC2012/ImageSets", r"no list of photos .*Segmentation/val.txt"),
        ("context459", "trainval", r"no label maps .*trainval/\*.mat.* get http.*trainval.tar.gz"),
        ("coco-stuff", "val2017", r"no photos .*get http.*val2017.zip"),
        ("coco-stuff", "stuffthingmaps_trainval2017", r"no label maps .*stuffthingmaps_trainval"),
        ("cityscapes", "gtFine", r"no label maps .*_gtFine_labelIds.png.*gtFine_trainvaltest.zip"),
        ("ade150", "ADEChallengeData2016/annotations", "no label maps .*ADEChallengeData2016.zip"),
        ("ade847", "ADE20K_2021_17_01", "no photos .*ADE20K_2021_17_01.zip"),
    ],
)  # fmt: skip
def test_a_missing_part_is_named_with_where_to_get_it(tmp_path, name, part, message):
    write_set(tmp_path, name, {key: [[8]] for key in NAMES})
    (tmp_path / part).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=message) as error:
        load_dataset(name, tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_folder_and_an_unknown_set_are_named(tmp_path):
    with pytest.raises(DataError, match=r"voc20: no folder .*nowhere; unpack there http"):
        load_dataset("voc20", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="unknown data set 'voc'; available: ade150, ade847"):
        load_dataset("voc", tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("voc21", 21), ("ade150", 151), ("coco-stuff", 11), ("coco-object", 182), ("cityscapes", 34),
     ("context459", 460)],
)  # fmt: skip
def test_a_value_that_no_official_file_holds_is_named(tmp_path, name, value):
    dataset = load_dataset(name, write_set(tmp_path, name, {NAMES[0]: [[8, value]]}))
    path = dataset.pairs[0][1]
    with pytest.raises(DataError, match=f"{path.name} holds the value {value}, which is none"):
        dataset.truth(path)


@pytest.mark.parametrize(
    "line", ["../../etc/passwd", "/etc/passwd", "..", "a/b", "a\\b", "a\0b", "-rf", "x" * 300, "{}"]
)
def test_a_list_of_photos_cannot_name_other_files(tmp_path, line):
    write_set(tmp_path, "voc21", {NAMES[0]: [[1]]})
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_text(f"{line}\n")
    with pytest.raises(DataError, match=r"val.txt lists .* which is no name of a photo"):
        load_dataset("voc21", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n \n", "lists no photos"), (b"a\nb\na\n", "lists a 2 times"), (b"\xff\xfe", "not UTF-8"),
     (b"a\n" * 2**23 + b"a", "too large")],
)  # fmt: skip
def test_a_damaged_list_of_photos_is_named(tmp_path, content, message):
    write_set(tmp_path, "voc21", {NAMES[0]: [[1]]})
    split = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    split.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_dataset("voc21", tmp_path)
    split.unlink()
    split.mkdir()
    with pytest.raises(DataError, match="is not a file"):
        load_dataset("voc21", tmp_path)


@pytest.fixture
def mat(tmp_path):
    """A function that writes the one label map of a set of MATLAB files, and reads it."""
    dataset = load_dataset("context459", write_set(tmp_path, "context459", {NAMES[0]: [[1]]}))
    path = dataset.pairs[0][1]

    def read(content):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            savemat(path, content, do_compression=True)
        return dataset.truth(path)

    return read


@pytest.mark.parametrize("kind", [np.uint16, np.float64, np.int32])
def test_matrices_of_any_number_type_are_read(mat, kind):
    assert mat({"LabelMap": np.array([[1, 459], [0, 2]], kind)}).tolist() == [[0, 458], [65535, 1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read label map"),
        (b"MATLAB 5.0 MAT-file" + b"\xff" * 500, "cannot read label map"),
        (b"x" * (2**20 + 1), "too large: the limit is 1 MB"),
        ({"LabelMap": np.zeros((5000, 5000), np.uint8)}, "no matrix LabelMap"),
        ({"Labels": np.eye(2)}, "no matrix LabelMap"),
        ({"LabelMap": np.array([["a"]], object)}, "no matrix LabelMap"),
        ({"LabelMap": {"a": 1}}, "no matrix LabelMap"),
        ({"LabelMap": np.zeros((2, 2, 2))}, "no matrix LabelMap"),
        ({"LabelMap": np.array([[1.5]])}, "no integer"),
        ({"LabelMap": np.array([[np.nan]])}, "no labels"),
        ({"LabelMap": np.array([[-3]], np.int16)}, "the value -3"),
        ({"LabelMap": np.array([[2**17]], np.int32)}, "the value 131072"),
    ],
)
def test_a_damaged_matrix_is_named(mat, content, message):
    with pytest.raises(DataError, match=message) as error:
        mat(content)
    assert f"{NAMES[0]}.mat" in str(error.value)


def test_labels_of_16_bits_are_read(tmp_path):
    values = LabelValues(values=("300-1300",), ignored=(65535,))
    stored = np.array([[300, 1300, 65535]], np.uint16)
    Image.fromarray(stored).save(tmp_path / "wide.png")
    assert read_classes(tmp_path / "wide.png", values, 65535).tolist() == [[0, 1000, 65535]]
    Image.fromarray(stored + np.uint16(1)).save(tmp_path / "wide.png")
    with pytest.raises(DataError, match="the value 1301"):
        read_classes(tmp_path / "wide.png", values, 65535)


def test_a_huge_label_map_is_refused_before_it_is_decoded(tmp_path):
    write_set(tmp_path, "voc21", {NAMES[0]: [[1]]})
    dataset = load_dataset("voc21", tmp_path)
    path = dataset.pairs[0][1]
    content = bytearray(path.read_bytes())
    content[16:24] = b"\0\0\xff\xff" * 2
    path.write_bytes(content)
    with pytest.raises(DataError, match="too large: 65535 x 65535 pixels"):
        dataset.truth(path)


def test_a_label_map_in_colour_is_refused_and_one_without_too(tmp_path):
    write_set(tmp_path, "voc21", {NAMES[0]: [[1]]})
    write_set(tmp_path, "ade847", {NAMES[0]: [[1]]})
    voc, ade = load_dataset("voc21", tmp_path), load_dataset("ade847", tmp_path)
    Image.new("RGB", (1, 1)).save(voc.pairs[0][1])
    Image.new("L", (1, 1)).save(ade.pairs[0][1])
    with pytest.raises(DataError, match="several channels"):
        voc.truth(voc.pairs[0][1])
    with pytest.raises(DataError, match="is not a PNG in RGB"):
        ade.truth(ade.pairs[0][1])


def test_a_set_travels_to_worker_processes(tmp_path):
    dataset = load_dataset("voc20", write_set(tmp_path, "voc20", {NAMES[0]: [[0, 3, 255]]}))
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy == dataset
    assert copy.truth(copy.pairs[0][1]).tolist() == [[255, 2, 255]]


def test_the_hash_is_that_of_names_and_order(tmp_path):
    dataset = load_dataset("cityscapes", write_set(tmp_path, "cityscapes", {NAMES[0]: [[7]]}))
    text = json.dumps(list(class_lists()["cityscapes-19"]), ensure_ascii=False)
    assert dataset.classes_sha256 == hashlib.sha256(text.encode()).hexdigest()
    turned = replace(dataset, classes=dataset.classes[::-1])
    assert turned.classes_sha256 != dataset.classes_sha256


OWN = """
title = "ours"
classes = ["sky", "tree, bush"]
expected = 2
photos = { at = ["photos/{}.jpg"], get = "our server" }
labels = { at = ["truth/{}.png"], get = "our server" }
values = { values = [10, 20], ignored = [0] }
"""


def write_own(root, text=OWN):
    for folder in ("photos", "truth"):
        (root / folder).mkdir(exist_ok=True)
    Image.new("RGB", (3, 1)).save(root / "photos/a.jpg")
    Image.fromarray(np.array([[0, 10, 20]], np.uint8)).save(root / "truth/a.png")
    (root / "ours.toml").write_text(text)
    return str(root / "ours.toml")


def test_a_set_of_ones_own_is_one_toml_file(tmp_path):
    dataset = load_dataset(write_own(tmp_path), tmp_path)
    assert (dataset.name, dataset.classes) == ("ours", ("sky", "tree, bush"))
    assert dataset.truth(dataset.pairs[0][1]).tolist() == [[255, 0, 1]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("photos/{}.jpg", "../{}.jpg", "photos: .*inside the data set's folder"),
        ("photos/{}.jpg", "/etc/{}.jpg", "photos: .*inside the data set's folder"),
        ("photos/{}.jpg", "photos/**/{}.jpg", "photos: .*inside the data set's folder"),
        ("photos/{}.jpg", "photos/a.jpg", "photos: .*begins with {}"),
        ("photos/{}.jpg", "{}/a.jpg", "photos: .*begins with {}"),
        ("[10, 20]", "[10, 10]", "the label value 10 stands there 2 times"),
        ("[10, 20]", '["20-10"]', "'20-10' is no span"),
        ("[10, 20]", "[10, 70000]", "less than or equal to 65535"),
        ("[10, 20]", '["1-3"]', "2 class names, but values for 3"),
        ("ignored = [0]", "background = [0]", "first is 1 if"),
        ('"sky", ', '"sky", "sky", ', "class name 'sky' occurs twice"),
        ('["sky", "tree, bush"]', '"sky"', "unknown class list 'sky'; available: coco-stuff-171"),
        ("expected = 2", "expected = 0", "expected: .*greater than or equal to 1"),
        ("expected", "expecte", "expected: field required"),
        ('title = "ours"', "title = ours", "is not TOML"),
    ],
)
def test_a_wrong_spec_is_named(tmp_path, old, new, message):
    assert old in OWN
    with pytest.raises(ConfigError, match=message):
        read_spec(write_own(tmp_path, OWN.replace(old, new)))


def test_a_missing_spec_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none.toml: No such file"):
        read_spec(str(tmp_path / "none.toml"))


def test_a_plain_folder_has_no_expected_number_and_a_hash(tmp_path):
    write_own(tmp_path)
    (tmp_path / "photos").rename(tmp_path / "images")
    (tmp_path / "truth").rename(tmp_path / "labels")
    (tmp_path / "classes.txt").write_text("\n".join(f"class {k}" for k in range(21)))
    dataset = load_folder(tmp_path)
    assert dataset.expected is None
    assert len(dataset.classes_sha256) == 64
    assert dataset.truth(dataset.pairs[0][1]).tolist() == [[0, 10, 20]]
