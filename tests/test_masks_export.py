"""Masks come in and go out as they were, whatever the format; pycocotools agrees with each."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO

from pixelclip.errors import DataError
from pixelclip.images import read_size
from pixelclip.masks.annotations import open_masks
from pixelclip.masks.details import MAX_DETAILS, details_text
from pixelclip.masks.export import (
    export_coco,
    export_labels,
    export_sa1b,
    label_map,
    stored_photos,
)
from pixelclip.masks.names import photo_name
from pixelclip.masks.runs import from_labels, from_masks, from_rle
from pixelclip.masks.store import (
    SCHEMA,
    MaskStore,
    make_row,
    shard_path,
    write_manifest,
    write_shard,
)
from pixelclip.photos import Photo, find_photos

HEIGHT, WIDTH = SIZE = (20, 30)


def shapes():
    """Nested, overlapping, touching, in two parts, with a hole, everything, and nothing."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    disc = (rows - 9) ** 2 + (columns - 12) ** 2
    return np.array([
        disc < 80, disc < 20, columns > 10, columns <= 10, (columns < 3) | (columns > 26),
        (disc < 60) & (disc > 10), rows >= 0, rows < 0, (rows == 0) & (columns == 29),
    ])  # fmt: skip


def code(mask):
    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def plain(mask):
    """Plain run lengths, as COCO has them for crowds."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    edges = [0, *np.flatnonzero(flat[1:] != flat[:-1]), mask.size]
    return {"size": list(mask.shape), "counts": [int(count) for count in np.diff(edges)]}


def decoded(masks):
    return masks.sample(np.arange(masks.height), np.arange(masks.width))


def write_photo(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(path)
    return path


def image(path, **others):
    return {"image_id": 7, "width": WIDTH, "height": HEIGHT, "file_name": path.name, **others}


def stored(folder, reader, photos):
    """A store of what the reader gives, details and all."""
    rows = []
    for photo in photos:
        width, height = read_size(photo.path)
        read = getattr(reader, "with_details", reader)
        rows.append(make_row(photo_name(photo), read(photo, (height, width))))
    write_manifest(folder, {})
    write_shard(folder, 0, rows)
    return MaskStore(folder)


@pytest.fixture
def sa_dir(tmp_path):
    """Photos with files in SA-1B's layout: what SA-1B has, and what others make of it."""
    folder = tmp_path / "sa"
    usual = [
        {"id": 70 + at, "segmentation": code(mask), "bbox": [0.0, 1.5, 3.25, 4.0], "area": 12,
         "predicted_iou": 1.0000001, "point_coords": [[1.5, 2]], "crop_box": [0, 0, 30, 20]}
        for at, mask in enumerate(shapes())
    ]  # fmt: skip
    odd = [
        {"segmentation": {"counts": code(shapes()[0])["counts"], "size": [HEIGHT, WIDTH], "x": []}},
        {"note": "é雪", "segmentation": plain(shapes()[1]), "iscrowd": 1, "deep": {"b": [1e-9]}},
        {"segmentation": [[2, 1, 6, 1, 6.5, 4, 2, 4], [9, 9, 15, 9, 9, 18]], "score": None},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": code(shapes()[6])["counts"] + "0"}},
    ]
    flat = from_rle(HEIGHT, WIDTH, [odd[3]["segmentation"]])
    assert flat.count == 1  # a code that is not the shortest
    assert flat.to_rle()[0].decode() != odd[3]["segmentation"]["counts"]
    documents = {
        "1.jpg": {"image": image(Path("1.jpg")), "annotations": usual},
        "deep/2.png": {"v": 2, "annotations": odd, "image": image(Path("2.png"), date=None)},
        "deep/3.png": {"annotations": []},
        "4.jpg": {"annotations": usual[:1], "info": {"licence": "é"}},
    }
    for name, document in documents.items():
        path = write_photo(folder / name)
        path.with_suffix(".json").write_text(json.dumps(document))
    return folder


def test_files_in_the_layout_of_sa1b_come_out_byte_by_byte(tmp_path, sa_dir):
    photos = find_photos([sa_dir])
    store = stored(tmp_path / "store", open_masks(sa_dir, photos), photos)
    done = export_sa1b(store, photos, tmp_path / "out")
    assert (done.photos, done.masks, done.left_out) == (4, 9 + 4 + 0 + 1, [])
    for photo in photos:
        name = f"{photo.stem}.json"
        assert (tmp_path / "out" / name).read_bytes() == (sa_dir / name).read_bytes()


def test_the_shared_files_in_the_layout_of_sa1b_come_out_byte_by_byte(tmp_path, shared_dir):
    folder = shared_dir / "data" / "sa1b" / "sa_layout"
    photos = find_photos([folder])
    store = stored(tmp_path / "store", open_masks(folder, photos), photos)
    done = export_sa1b(store, stored_photos(store), tmp_path / "out")
    assert (done.photos, done.masks) == (6, 256)
    for photo in photos:
        name = f"{photo.stem}.json"
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_every_kind_of_segmentation_is_the_mask_that_coco_decodes(sa_dir):
    photos = {photo.stem.as_posix(): photo for photo in find_photos([sa_dir])}
    reader = open_masks(sa_dir, list(photos.values()))
    np.testing.assert_array_equal(decoded(reader(photos["1"], SIZE)), shapes())
    document = json.loads((sa_dir / "deep" / "2.json").read_text())
    expected = []
    for annotation in document["annotations"]:
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, list):
            segmentation = coco.merge(coco.frPyObjects(segmentation, *SIZE))
        elif isinstance(segmentation["counts"], list):
            segmentation = coco.frPyObjects(segmentation, *SIZE)
        expected.append(coco.decode(segmentation))
    np.testing.assert_array_equal(decoded(reader(photos["deep/2"], SIZE)), np.array(expected) > 0)


def test_damaged_masks_are_missing_and_the_others_as_they_were(tmp_path):
    photo = Photo(write_photo(tmp_path / "in" / "a.jpg"), Path("a"))
    own = [{"id": at, "segmentation": code(mask)} for at, mask in enumerate(shapes())]
    own[3]["segmentation"]["counts"] += "1"
    document = {"image": image(photo.path), "annotations": [None, *own, {"id": 99}]}
    photo.path.with_suffix(".json").write_text(json.dumps(document))
    masks = open_masks().with_details(photo, SIZE)
    assert (masks.count, masks.broken) == (8, 3)
    assert open_masks()(photo, SIZE).details is None
    export_sa1b(open_masks(), [photo], tmp_path)
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "image": image(photo.path),
        "annotations": own[:3] + own[4:],
    }


@pytest.mark.parametrize(
    "value", [float("nan"), float("-inf"), "x" * MAX_DETAILS], ids=["NaN", "infinity", "large"]
)
def test_details_that_cannot_be_kept_are_counted_and_the_masks_stay(tmp_path, value):
    photo = Photo(write_photo(tmp_path / "in" / "a.jpg"), Path("a"))
    own = [{"segmentation": code(mask), "predicted_iou": 0.5} for mask in shapes()]
    own[4]["stability_score"] = value
    photo.path.with_suffix(".json").write_text(json.dumps({"annotations": own}))
    masks = open_masks().with_details(photo, SIZE)
    assert details_text(masks) == "9"
    store = stored(tmp_path / "store", open_masks(), [photo])
    assert store.with_details(photo).details is None
    export_sa1b(store, [photo], tmp_path)
    again = open_masks(tmp_path)(photo, SIZE)
    assert again.to_rle() == masks.to_rle()
    np.testing.assert_array_equal(again.scores, masks.scores)


def test_masks_of_ours_are_told_in_the_fields_of_sa1b(tmp_path):
    masks = from_rle(*SIZE, from_masks(shapes()[:2]).to_rle(), [0.9, 0.25])
    masks = replace(masks, details=({"stability_score": 0.5, "predicted_iou": 1.01}, {}))
    write_manifest(tmp_path / "store", {})
    rows = [make_row("in/a.b.jpg", masks), make_row("c.jpg", masks)]
    write_shard(tmp_path / "store", 0, rows)
    store = MaskStore(tmp_path / "store")
    export_sa1b(store, stored_photos(store), tmp_path / "out")
    document = json.loads((tmp_path / "out" / "c.json").read_text())
    assert document["image"] == image(Path("c.jpg")) | {"image_id": 2}
    first, second = document["annotations"]
    assert first == {
        "id": 3,
        "segmentation": code(shapes()[0]),
        "area": int(shapes()[0].sum()),
        "bbox": coco.toBbox(code(shapes()[0])).tolist(),
        "predicted_iou": 1.01,
        "stability_score": 0.5,
    }
    assert second["predicted_iou"] == 0.25
    assert (tmp_path / "out" / "in" / "a.b.json").is_file()


def instances(folder):
    """Two photos and a COCO file with polygons, a crowd, and overlapping and nested masks."""
    for name in ("a.jpg", "in/b.jpg"):
        write_photo(folder / name)
    own = [
        {"segmentation": [[2, 1, 6, 1, 6.5, 4, 2, 4], [9, 9, 15, 9, 9, 18]], "iscrowd": 0},
        {"segmentation": plain(shapes()[0]), "iscrowd": 1},
        {"segmentation": code(shapes()[1]), "iscrowd": 0, "score": 0.7},
        {"segmentation": code(shapes()[2]), "iscrowd": 0},
    ]
    document = {
        "images": [
            {"id": 5, "file_name": "in/b.jpg", "height": HEIGHT, "width": WIDTH},
            {"id": 6, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH},
        ],
        "annotations": [
            {"id": 30 + at, "image_id": 5, "category_id": 44, "bbox": [0, 0, 1, 1], **fields}
            for at, fields in enumerate(own)
        ],
    }
    (folder / "coco.json").write_text(json.dumps(document))
    return folder / "coco.json"


def test_an_exported_coco_file_is_read_by_coco_mask_by_mask(tmp_path):
    path = instances(tmp_path / "in")
    photos = find_photos([tmp_path / "in"])
    reader = open_masks(path, photos, details=True)
    store = stored(tmp_path / "store", reader, photos)
    done = export_coco(store, iter(photos), tmp_path / "out" / "coco.json")
    assert (done.photos, done.masks) == (2, 4)
    before, after = COCO(path), COCO(tmp_path / "out" / "coco.json")
    assert [image["file_name"] for image in after.imgs.values()] == ["a.jpg", "in/b.jpg"]
    (ours,) = (store(photo, SIZE) for photo in photos if photo.stem.name == "b")
    assert [fields["iscrowd"] for fields in after.anns.values()] == [0, 1, 0, 0]
    assert [fields["score"] for fields in after.anns.values()] == [1.0, 1.0, 0.7, 1.0]
    assert after.getCatIds() == [1]
    for old, new, mask in zip(before.dataset["annotations"], after.anns.values(), decoded(ours),
                              strict=True):  # fmt: skip
        np.testing.assert_array_equal(before.annToMask(old), mask)
        np.testing.assert_array_equal(after.annToMask(new), mask)
        assert new["area"] == coco.area(new["segmentation"])
        assert new["bbox"] == coco.toBbox(new["segmentation"]).tolist()


def test_the_fields_of_a_coco_file_are_kept_in_a_store(tmp_path):
    path = instances(tmp_path / "in")
    photos = find_photos([tmp_path / "in"])
    photo = photos[1]
    store = stored(tmp_path / "store", open_masks(path, photos, details=True), photos)
    details = store.with_details(photo, SIZE).details
    assert details[1] == {"id": 31, "category_id": 44, "bbox": [0, 0, 1, 1], "iscrowd": 1}
    assert store(photo, SIZE).details is None
    assert open_masks(path, photos).with_details(photo, SIZE).details is None


def test_real_polygons_are_the_masks_of_coco(tmp_path, shared_dir):
    folder = shared_dir / "data" / "sa1b" / "coco_instances"
    photos = find_photos([folder])
    reader, theirs = open_masks(folder / "instances.json", photos), COCO(folder / "instances.json")
    by_name = {image["file_name"]: image for image in theirs.imgs.values()}
    export_coco(reader, photos, tmp_path / "coco.json")
    ours = COCO(tmp_path / "coco.json")
    compared = 0
    for number, photo in enumerate(photos, start=1):
        image = by_name[photo.path.name]
        masks = reader(photo, (image["height"], image["width"]))
        expected = [theirs.annToMask(own) for own in theirs.imgToAnns[image["id"]]]
        exported = [ours.annToMask(own) for own in ours.imgToAnns[number]]
        np.testing.assert_array_equal(decoded(masks), np.array(expected) > 0)
        np.testing.assert_array_equal(exported, expected)
        compared += len(expected)
    assert compared == 42


def test_real_panoptic_pngs_give_their_segments(shared_dir):
    folder = shared_dir / "data" / "sa1b" / "coco_panoptic"
    photos = [photo for photo in find_photos([folder]) if photo.path.suffix == ".jpg"]
    reader = open_masks(folder / "panoptic.json", photos)
    document = json.loads((folder / "panoptic.json").read_text())
    segments = {own["file_name"]: own["segments_info"] for own in document["annotations"]}
    compared = 0
    for photo in photos:
        name = photo.path.with_suffix(".png")
        with Image.open(name) as segmented:
            labels = np.array(segmented).astype(int) @ [1, 256, 65536]
        identities = sorted(own["id"] for own in segments[name.name])
        masks = reader(photo, labels.shape)
        np.testing.assert_array_equal(decoded(masks), [labels == i for i in identities])
        compared += masks.count
    assert compared == 50


@pytest.mark.parametrize(("count", "kind"), [(1, "L"), (255, "L"), (256, "I;16"), (300, "I;16")])
def test_label_maps_come_back_as_the_same_masks(tmp_path, count, kind):
    labels = np.arange(HEIGHT * WIDTH).reshape(SIZE) * count // (HEIGHT * WIDTH)
    half = np.where(labels % 2, labels, -1)
    write_manifest(tmp_path / "store", {})
    rows = [make_row("in/a.jpg", from_labels(labels)),
            make_row("b.jpg", from_labels(half, ignore=(-1,)))]  # fmt: skip
    write_shard(tmp_path / "store", 0, rows)
    store = MaskStore(tmp_path / "store")
    photos = stored_photos(store)
    done = export_labels(store, photos, tmp_path / "maps")
    assert (done.photos, done.covered) == (2, 0)
    with Image.open(tmp_path / "maps" / "in" / "a.png") as written:
        assert written.mode == kind
    reader = open_masks(tmp_path / "maps", photos)
    for photo in photos:
        assert reader(photo, SIZE).to_rle() == store(photo, SIZE).to_rle()


def test_small_masks_lie_on_large_ones_in_a_label_map(tmp_path):
    masks = from_masks(shapes())
    labels, covered = label_map(masks)
    areas = shapes().sum(axis=(1, 2))
    expected = np.full(SIZE, 255)
    for index in np.argsort(-areas, kind="stable"):
        expected[shapes()[index]] = index
    np.testing.assert_array_equal(labels, expected)
    visible = [(labels == index).sum() for index in range(9)]
    assert covered == np.count_nonzero(visible < areas) == 6
    nested, covered = label_map(masks.select(np.array([0, 1])))
    np.testing.assert_array_equal(nested == 1, shapes()[1])
    assert covered == 1


def test_a_photo_without_masks_has_a_label_map_without_masks():
    labels, covered = label_map(from_masks(np.zeros((0, *SIZE), dtype=bool)))
    assert (labels == 255).all()
    assert covered == 0


def test_a_label_map_that_no_memory_holds_is_refused():
    with pytest.raises(DataError, match="65535 x 65535 pixels is too large"):
        label_map(from_rle(65535, 65535, []))


def test_photos_that_share_a_stem_get_files_of_their_own(tmp_path):
    write_manifest(tmp_path / "store", {})
    names = ["a.jpg", "a.png", "a.jpg.png", "a", "in/b.jpg", "/in/%FF.jpg"]
    rows = [make_row(name, from_masks(shapes()[:at])) for at, name in enumerate(names)]
    write_shard(tmp_path / "store", 0, rows)
    store = MaskStore(tmp_path / "store")
    photos = stored_photos(store)
    assert [photo_name(photo) for photo in photos] == names
    assert export_sa1b(store, photos, tmp_path / "out").photos == 6
    assert len(list((tmp_path / "out").rglob("*.json"))) == 6


@pytest.mark.parametrize(
    "name", ["../x.jpg", "/x.jpg", "/%2Fx.jpg", "a/../../x.jpg", "..", "", ".", "a\0b.jpg",
             "/%00.jpg", "x" * 300]
)  # fmt: skip
def test_nothing_is_written_outside_the_folder(tmp_path, name):
    write_manifest(tmp_path / "store", {})
    good = make_row("good.jpg", from_masks(shapes()))
    write_shard(tmp_path / "store", 0, [good, make_row(name, from_masks(shapes()))])
    store = MaskStore(tmp_path / "store")
    if name != "/x.jpg":  # which stands for a name that is no UTF-8
        with pytest.raises(DataError, match="which is no path below a folder"):
            stored_photos(store)
    if not Path(name).name:
        return
    photos = [Photo(Path(name), Path(name)), Photo(Path("good.jpg"), Path("good"))]
    done = export_sa1b(store, photos, tmp_path / "out" / "in")
    assert [path for path, _ in done.left_out] == [Path(name)]
    export_labels(store, photos, tmp_path / "out" / "in")
    files = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(files) == ["good.json", "good.png"]


def test_photos_without_masks_are_left_out_and_named(tmp_path, sa_dir):
    (sa_dir / "1.jpg").write_bytes(b"no photo")
    (sa_dir / "deep" / "2.json").write_text("[")
    photos = [*find_photos([sa_dir]), Photo(write_photo(tmp_path / "x.png"), Path("x"))]
    reader = open_masks(sa_dir, photos)
    done = export_coco(reader, photos, tmp_path / "coco.json")
    lines = {path.name: line for path, line in done.left_out}
    assert set(lines) == {"1.jpg", "2.png", "x.png"}
    assert "is not a photo" in lines["1.jpg"]
    assert "is not JSON" in lines["2.png"]
    assert lines["x.png"].endswith("x.png has no masks there")
    assert len(COCO(tmp_path / "coco.json").imgs) == 2


def test_an_export_that_ends_early_leaves_no_file(tmp_path, sa_dir):
    photos = find_photos([sa_dir])

    def until_it_stops():
        yield photos[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_coco(open_masks(sa_dir, photos), until_it_stops(), tmp_path / "out" / "coco.json")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, sa_dir):
    photos = find_photos([sa_dir])
    reader = open_masks(sa_dir, photos)
    (tmp_path / "file").touch()
    for export in (export_sa1b, export_labels, export_coco):
        with pytest.raises(DataError, match="cannot write"):
            export(reader, photos, tmp_path / "file" / "out")


def test_details_are_not_read_with_the_masks(tmp_path):
    """Damage to them shows that training does not even touch the column."""
    masks = from_masks(shapes())
    details = tuple({"stability_score": index / 7} for index in range(9))
    write_manifest(tmp_path, {})
    write_shard(tmp_path, 0, [make_row("a.jpg", replace(masks, details=details))])
    path = shard_path(tmp_path, 0)
    column = pq.read_metadata(path).row_group(0).column(len(SCHEMA.names) - 1)
    assert column.path_in_schema == "details"
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    store, photo = MaskStore(tmp_path), Photo(Path("a.jpg"), Path("a"))
    np.testing.assert_array_equal(decoded(store(photo, SIZE)), shapes())
    with pytest.raises(DataError, match=r"shard-00000\.parquet is damaged"):
        store.with_details(photo, SIZE)


@pytest.mark.parametrize(
    "details", ["[]", "[{}, {}]", "[1]", "null", '"x"', "1.5", "{}", '{"annotations": {}}',
                '{"annotations": [[]]}', "[" * 5000, "[{}]" + " " * MAX_DETAILS]
)  # fmt: skip
def test_details_of_other_masks_are_refused(tmp_path, details):
    row = make_row("a.jpg", from_masks(shapes()[:1]))._replace(details=details)
    write_manifest(tmp_path, {})
    write_shard(tmp_path, 0, [row])
    with pytest.raises(DataError, match=shard_path(tmp_path, 0).name):
        MaskStore(tmp_path).with_details(Photo(Path("a.jpg"), Path("a")))
