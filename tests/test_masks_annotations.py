"""Readers of masks beside photos: every kind is read, nothing in a file is taken for granted."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from pixelclip.errors import DataError
from pixelclip.images import photo_size, read_photo
from pixelclip.masks.annotations import open_masks
from pixelclip.photos import Photo, find_photos

SIZE = (6, 8)
LEFT = np.arange(48).reshape(SIZE) % 8 < 3
MASKS = np.array([LEFT, ~LEFT])
PHOTO = Photo(Path("photos/deep/a.jpg"), Path("deep/a"))
RECTANGLE = [[2, 1, 6, 1, 6, 4, 2, 4]]


def code(mask):
    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def per_photo():
    """An annotation in SA-1B's layout."""
    return {
        "image": {"image_id": 7, "width": 8, "height": 6, "file_name": "a.jpg"},
        "annotations": [
            {"segmentation": code(LEFT), "predicted_iou": 0.75, "stability_score": 0.9},
            {"segmentation": code(~LEFT), "predicted_iou": 1.02},
        ],
    }


def instances():
    counts = [int(count) for count in (18, 30)]
    return {
        "images": [
            {"id": 3, "file_name": "deep/a.jpg", "height": 6, "width": 8},
            {"id": "x", "file_name": "b.jpg", "height": 6, "width": 8},
            {"id": 5, "file_name": "other/b.jpg"},
        ],
        "annotations": [
            {"image_id": 3, "segmentation": code(LEFT), "score": 0.5},
            {"image_id": "x", "segmentation": RECTANGLE},
            {"image_id": 3, "segmentation": {"size": list(SIZE), "counts": counts}},
            {"image_id": 9, "segmentation": RECTANGLE},
        ],
    }


def panoptic(name="deep_a.png"):
    return {
        "images": [{"id": 3, "file_name": "deep/a.jpg"}, {"id": 4, "file_name": "empty.jpg"}],
        "annotations": [{"image_id": 3, "file_name": name, "segments_info": [{"id": 70000}]}],
    }


def write_json(path, document):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def write_segments(path):
    segments = np.where(LEFT, 70000, 300)
    segments[0, 0] = 0  # nothing
    pixels = np.stack([segments % 256, segments // 256 % 256, segments // 65536], axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def decoded(masks):
    return masks.sample(np.arange(masks.height), np.arange(masks.width))


@pytest.mark.parametrize("name", ["deep/a.json", "a.json"])
def test_per_photo_json_is_found_by_stem_or_file_name(tmp_path, name):
    write_json(tmp_path / name, per_photo())
    masks = open_masks(tmp_path)(PHOTO, SIZE)
    np.testing.assert_array_equal(decoded(masks), MASKS)
    np.testing.assert_allclose(masks.scores, [0.75, 1.0])


def test_json_beside_the_photos_needs_no_path(tmp_path):
    write_json(tmp_path / "in" / "a.json", per_photo())
    photo = Photo(tmp_path / "in" / "a.jpg", Path("a"))
    np.testing.assert_array_equal(decoded(open_masks()(photo, SIZE)), MASKS)


def test_instances_are_found_by_name_or_by_base_name_if_only_one_has_it(tmp_path):
    reader = open_masks(write_json(tmp_path / "instances.json", instances()))
    masks = reader(PHOTO, SIZE)
    np.testing.assert_array_equal(decoded(masks), [LEFT, ~LEFT])
    np.testing.assert_allclose(masks.scores, [0.5, 1.0])
    same_name = Photo(Path("elsewhere/a.jpg"), Path("a"))
    assert reader(same_name, SIZE).count == 2
    assert reader(Photo(Path("photos/b.jpg"), Path("b")), SIZE).areas().tolist() == [12]
    assert reader(Photo(Path("photos/more/b.jpg"), Path("more/b")), SIZE) is None  # or other/b?
    assert reader(Photo(Path("photos/other/b.jpg"), Path("other/b")), SIZE).count == 0


def test_a_base_name_of_several_photos_is_nobodys(tmp_path):
    document = instances()
    document["images"][1]["file_name"] = "more/b.jpg"
    reader = open_masks(write_json(tmp_path / "instances.json", document))
    assert reader(Photo(Path("photos/b.jpg"), Path("b")), SIZE) is None


@pytest.mark.parametrize("folder", ["", "panoptic"])
def test_panoptic_segments_are_masks_but_for_zero(tmp_path, folder):
    path = write_json(tmp_path / "panoptic.json", panoptic())
    write_segments(tmp_path / folder / "deep_a.png")
    reader = open_masks(path)
    right, left = decoded(reader(PHOTO, SIZE))  # 300 and 70000
    assert not left[0, 0]
    assert (left | right).sum() == 47
    np.testing.assert_array_equal(right, ~LEFT)
    assert reader(Photo(Path("empty.jpg"), Path("empty")), SIZE) is None


@pytest.mark.parametrize(
    "name", ["../deep_a.png", "/etc/deep_a.png", "x/../../deep_a.png", "..\\deep_a.png",
             "C:\\deep_a.png", "", ".", "a" * 5000, "a\0b", "\ud800.png", "gone.png"]
)  # fmt: skip
def test_panoptic_names_never_lead_out_of_the_folder(tmp_path, name):
    for folder in (tmp_path, tmp_path / "in"):
        write_segments(folder / "deep_a.png")
        write_segments(folder / "..\\deep_a.png")
    (tmp_path / "in" / "x").mkdir()
    path = write_json(tmp_path / "in" / "panoptic.json", panoptic(name))
    with pytest.raises(DataError, match="names the PNG"):
        open_masks(path)(PHOTO, SIZE)


@pytest.mark.parametrize(("dtype", "ignored"), [(np.uint8, 255), (np.uint16, 65535)])
def test_every_value_of_a_label_map_is_a_mask(tmp_path, dtype, ignored):
    labels = np.where(LEFT, 0, 7).astype(dtype)
    labels[0, 7] = ignored
    (tmp_path / "deep").mkdir()
    Image.fromarray(labels).save(tmp_path / "deep" / "a.png")
    zero, seven = decoded(open_masks(tmp_path)(PHOTO, SIZE))
    np.testing.assert_array_equal(zero, LEFT)
    np.testing.assert_array_equal(seven, labels == 7)


def test_photos_without_annotations_have_no_masks(tmp_path):
    write_json(tmp_path / "sa" / "b.json", per_photo())
    write_segments(tmp_path / "maps" / "b.png")
    path = write_json(tmp_path / "instances.json", instances())
    unknown = Photo(Path("photos/unknown.jpg"), Path("unknown"))
    for reader in (open_masks(tmp_path / "sa"), open_masks(tmp_path / "maps"), open_masks(path)):
        assert reader(unknown, SIZE) is None
    assert open_masks()(unknown, SIZE) is None


def all_readers(folder):
    """One reader of each kind, of files that fit `PHOTO`."""
    write_json(folder / "sa" / "a.json", per_photo())
    write_segments(folder / "deep_a.png")
    (folder / "maps").mkdir()
    Image.fromarray(LEFT.astype(np.uint8)).save(folder / "maps" / "a.png")
    return {
        "sa": open_masks(folder / "sa"),
        "maps": open_masks(folder / "maps"),
        "instances": open_masks(write_json(folder / "instances.json", instances())),
        "panoptic": open_masks(write_json(folder / "panoptic.json", panoptic())),
    }


@pytest.mark.parametrize("kind", ["sa", "maps", "instances", "panoptic"])
def test_readers_go_to_other_processes(tmp_path, kind):
    reader = all_readers(tmp_path)[kind]
    there = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(decoded(there(PHOTO, SIZE)), decoded(reader(PHOTO, SIZE)))


@pytest.mark.parametrize("kind", ["sa", "maps", "instances", "panoptic"])
def test_masks_of_another_size_are_refused(tmp_path, kind):
    reader = all_readers(tmp_path)[kind]
    message = r"has masks of 8 x 6 pixels, but the upright photo has 6 x 8"
    with pytest.raises(DataError, match=message):
        reader(PHOTO, (8, 6))


def test_damaged_masks_are_counted_and_the_others_kept(tmp_path):
    document = per_photo()
    document["annotations"] += [{"segmentation": "no dict"}, 3, {}, {"segmentation": None}]
    write_json(tmp_path / "a.json", document)
    masks = open_masks(tmp_path)(PHOTO, SIZE)
    assert (masks.count, masks.broken) == (2, 4)


def test_an_annotation_without_one_good_mask_is_an_error(tmp_path):
    document = per_photo()
    document["annotations"] = [{"segmentation": {"size": [6, 8], "counts": "zzz"}}]
    write_json(tmp_path / "a.json", document)
    with pytest.raises(DataError, match=r"a\.json: none of the 1 masks can be read"):
        open_masks(tmp_path)(PHOTO, SIZE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON that can be read"),
        (b"\xff\xfe\x00", "is not JSON that can be read"),
        (b"[" * 100_000, "is not JSON that can be read"),
        (b"[1]", "is not a JSON object but a list"),
        (b"{}", "has no list 'annotations'"),
        (b'{"annotations": {"a": 1}}', "has no list 'annotations'"),
        (b'{"annotations": [{"a": ' + b"9" * 5000 + b"}]}", "is not JSON that can be read"),
    ],
)
def test_json_that_is_no_annotation_is_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_masks(tmp_path)(PHOTO, SIZE)
    with pytest.raises(DataError, match=r"a\.json"):
        open_masks(tmp_path / "a.json")


def test_a_huge_json_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**24 + 1)  # takes no space on the disk
    with pytest.raises(DataError, match="is too large: 17 MB"):
        open_masks(tmp_path)(PHOTO, SIZE)


def test_a_huge_label_map_is_refused_before_it_is_decoded(tmp_path):
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (10**6).to_bytes(4) * 2 + b"\x08\0\0\0\0"
    (tmp_path / "a.png").write_bytes(header)
    with pytest.raises(DataError, match="has masks of 1000000 x 1000000 pixels"):
        open_masks(tmp_path)(PHOTO, SIZE)


@pytest.mark.parametrize("content", [b"", b"GIF89a" * 10])
def test_a_label_map_that_is_no_png_is_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png"):
        open_masks(tmp_path)(PHOTO, SIZE)


def test_a_panoptic_png_has_colours(tmp_path):
    path = write_json(tmp_path / "panoptic.json", panoptic())
    Image.fromarray(LEFT.astype(np.uint8)).save(tmp_path / "deep_a.png")
    with pytest.raises(DataError, match="its pixels are not RGB"):
        open_masks(path)(PHOTO, SIZE)


def test_other_kinds_are_refused_with_those_accepted(tmp_path):
    with pytest.raises(DataError, match=r"no such file or folder; accepted: a mask store, .*COCO"):
        open_masks(tmp_path / "gone")
    with pytest.raises(DataError, match=r"no masks in .*; accepted: a mask store, .*STEM\.png"):
        open_masks(tmp_path)
    write_json(tmp_path / "a.json", per_photo())
    with pytest.raises(DataError, match="has no list 'images'"):
        open_masks(tmp_path / "a.json")
    write_json(tmp_path / "b.json", {"images": [{"id": [], "file_name": 3}], "annotations": []})
    with pytest.raises(DataError, match="names no photo"):
        open_masks(tmp_path / "b.json")


def test_nesting_at_any_depth_gives_masks_or_an_error(tmp_path):
    for depth in (100, 500, 900, 950, 990, 1000, 2000, 50_000):
        nested = "[" * depth + "]" * depth
        path = tmp_path / "a.json"
        path.write_text(
            '{"images": [{"id": 1, "file_name": "a.jpg"}],'
            f' "annotations": [{{"image_id": 1, "segmentation": {nested}}}]}}'
        )
        with pytest.raises(DataError, match=r"a\.json"):
            open_masks(path)(PHOTO, SIZE)
        with pytest.raises(DataError, match=r"a\.json"):
            open_masks(tmp_path)(PHOTO, SIZE)


@pytest.mark.parametrize(
    ("folder", "file", "count"),
    [("sa_layout", None, 256), ("coco_instances", "instances.json", 42),
     ("coco_panoptic", "panoptic.json", 50)],
)  # fmt: skip
def test_real_annotations_are_read(shared_dir, folder, file, count):
    folder = shared_dir / "data" / "sa1b" / folder
    reader = open_masks(folder / file if file else None)
    found = 0
    for photo in find_photos([folder]):
        if photo.path.suffix == ".jpg":
            width, height = photo_size(read_photo(photo.path))
            masks = reader(photo, (height, width))
            assert masks.broken == 0
            found += masks.count
    assert found == count


def test_real_codes_and_polygons_decode_as_coco_does(shared_dir):
    folder = shared_dir / "data" / "sa1b" / "sa_layout"
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        image = document["image"]
        photo = Photo(path.with_suffix(".jpg"), Path(path.stem))
        masks = open_masks(folder)(photo, (image["height"], image["width"]))
        annotations = document["annotations"]
        expected = [coco.decode(annotation["segmentation"]) for annotation in annotations]
        np.testing.assert_array_equal(decoded(masks), np.array(expected) > 0)
        np.testing.assert_array_equal(masks.areas(), [a["area"] for a in annotations])
