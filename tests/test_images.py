"""Photos of every kind, broken ones too; label maps."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from pixelclip import images
from pixelclip.errors import DataError
from pixelclip.photos import find_photos
from tests.tiny import photo


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    source = photo(20, 10)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(source.convert("L")).astype(np.uint16) * 257)
    else:
        image = source.convert(mode)
    path = tmp_path / ("a.tif" if mode in {"CMYK", "YCbCr"} else "a.png")
    image.save(path)
    read = images.read_photo(path)
    assert (read.mode, read.size) == ("RGB", (20, 10))
    if mode == "I;16":
        grey = np.asarray(source.convert("L"))
        np.testing.assert_allclose(np.asarray(read)[..., 0], grey, atol=1)


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, turn):
    image = photo(30, 20)
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / "a.png", exif=exif)
    read = images.read_photo(tmp_path / "a.png")
    assert read.size == ((20, 30) if turn >= 5 else (30, 20))


def test_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [photo(20, 10, seed).convert("P") for seed in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    expected = np.asarray(frames[0].convert("RGB"))
    np.testing.assert_array_equal(np.asarray(images.read_photo(tmp_path / "a.gif")), expected)


def test_a_huge_photo_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    with pytest.raises(DataError, match=r"20000 x 10000 = 200 megapixels.*--max-pixels 200000000"):
        images.read_photo(tmp_path / "huge.png")
    assert images.read_photo(tmp_path / "huge.png", max_pixels=200_000_000).size == (20_000, 10_000)


def test_a_truncated_photo_is_an_error(tmp_path):
    path = tmp_path / "cut.jpg"
    photo(200, 200).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"cut\.jpg cannot be read"):
        images.read_photo(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" * 9])
def test_what_is_no_photo_is_an_error(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png"):
        images.read_photo(tmp_path / "a.png")


def test_random_damage_never_escapes_as_another_error(tmp_path):
    draw = np.random.default_rng(0)
    for suffix in ("jpg", "png", "webp", "gif", "tif", "bmp"):
        path = tmp_path / f"a.{suffix}"
        photo(40, 30).save(path)
        good = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(40):
            bad = good.copy()
            bad[draw.integers(0, len(bad), 5)] = draw.integers(0, 256, 5)
            path.write_bytes(bad.tobytes()[: draw.integers(1, len(bad) + 1)])
            try:
                read = images.read_photo(path, max_pixels=1_000_000)
            except DataError:
                continue
            assert read.mode == "RGB"


@pytest.mark.parametrize("size", [(33, 21), (200, 150), (7, 90), (97, 61)])
def test_resizing_in_bands_leaves_no_trace(monkeypatch, size):
    image = photo(97, 61)
    monkeypatch.setattr(images, "RESIZE_BAND_PIXELS", 97 * 7)
    whole = np.asarray(image.resize(size, Image.Resampling.BILINEAR)).astype(int)
    for source in (image, np.asarray(image)):
        difference = np.abs(np.asarray(images.resized(source, size)).astype(int) - whole)
        assert difference.max() <= 1  # rounding of the band's offset
        assert (difference > 0).mean() < 0.01


def test_missing_photo_is_named(tmp_path):
    with pytest.raises(DataError, match="no such photo"):
        images.read_photo(tmp_path / "none.png")


def test_folders_are_searched_with_subfolders_in_order(tmp_path):
    for name in ("b.png", "a.jpg", "sub/c.png", ".hidden.png", "a.labels.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = find_photos([tmp_path])
    assert [str(p.stem) for p in found] == ["a", "b", "sub/c"]


def test_photos_that_share_a_stem_get_one_each(tmp_path):
    for name in ("x/a.png", "y/a.png", "a.png", "a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    paths = [tmp_path / name for name in ("x/a.png", "y/a.png", "a.png", "a.jpg")]
    stems = [str(p.stem) for p in find_photos(paths)]
    assert len(set(stems)) == 4


def test_the_same_photo_twice_is_one(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    assert len(find_photos([tmp_path / "a.png", tmp_path / "a.png"])) == 1


def test_folder_without_photos_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no photos in"):
        find_photos([tmp_path])


def test_write_leaves_nothing_half_done(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write"):
        images.write_bytes(tmp_path / "file" / "a.png", b"x")
    images.write_bytes(tmp_path / "deep" / "a.png", b"x")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.png"]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_label_maps_come_back_as_written(tmp_path, dtype):
    labels = np.arange(600, dtype=np.int64).reshape(20, 30) % np.iinfo(dtype).max
    labels = labels.astype(dtype)
    images.write_bytes(tmp_path / "a.png", images.png_bytes(Image.fromarray(labels)))
    np.testing.assert_array_equal(images.read_labels(tmp_path / "a.png"), labels)


def test_a_palette_label_map_keeps_its_indices(tmp_path):
    image = Image.fromarray(np.array([[0, 5], [255, 3]], np.uint8), mode="L").convert("P")
    image.save(tmp_path / "a.png")
    indices = np.asarray(Image.open(tmp_path / "a.png"))
    np.testing.assert_array_equal(images.read_labels(tmp_path / "a.png"), indices)


def test_a_label_map_with_channels_is_refused(tmp_path):
    photo(5, 5).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="several channels"):
        images.read_labels(tmp_path / "a.png")


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_large_turned_photo_is_turned_when_it_is_small(tmp_path, monkeypatch, turn):
    image = photo(90, 60)
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / "a.png", exif=exif)
    decoded = images.load_photo(tmp_path / "a.png")
    size = tuple(side // 3 for side in images.photo_size(decoded))
    expected = np.asarray(images.resized(decoded, size)).astype(int)
    monkeypatch.setattr(images, "OVERLAY_PIXELS", 100)
    turned_late = np.asarray(images.resized(decoded, size)).astype(int)
    assert np.abs(turned_late - expected).max() <= 2


def test_a_16_bit_photo_keeps_its_orientation(tmp_path):
    grey = Image.fromarray(np.asarray(photo(30, 20).convert("L")).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    grey.save(tmp_path / "a.png", exif=exif)
    assert images.read_photo(tmp_path / "a.png").size == (20, 30)


def test_a_float_image_between_0_and_1_is_not_black(tmp_path):
    values = np.linspace(0, 1, 200, dtype=np.float32).reshape(10, 20)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.asarray(images.read_photo(tmp_path / "a.tif")).max() == 255


def test_formats_whose_readers_start_programs_are_not_tried(tmp_path):
    header = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    (tmp_path / "a.jpg").write_bytes(header)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "EPS"  # Pillow alone would take it
    with pytest.raises(DataError, match="not a photo in a known format"):
        images.read_photo(tmp_path / "a.jpg")


def test_pillows_own_limit_survives_many_threads(tmp_path):
    photo(20, 20).save(tmp_path / "a.png")
    limit = Image.MAX_IMAGE_PIXELS
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(images.read_photo, [tmp_path / "a.png"] * 200))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_pictures_of_no_size_or_no_kind_are_refused():
    for wrong in (Image.new("RGB", (0, 0)), None, b"bytes", 7):
        with pytest.raises(DataError):
            images.as_photo(wrong)


def test_hidden_folders_are_passed_over(tmp_path):
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / ".thumbnails/a.png").write_bytes(b"x")
    (tmp_path / "a.png").write_bytes(b"x")
    assert len(find_photos([tmp_path])) == 1
