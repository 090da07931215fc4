"""Masks drawn over their photo, contact sheets, and masks merged by cluster."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageFont

from pixelclip.backbones import load_backbone, save_backbone
from pixelclip.config import TrainConfig
from pixelclip.errors import ConfigError, DataError, ModelError
from pixelclip.masks import pictures
from pixelclip.masks.annotations import open_masks
from pixelclip.masks.layout import (
    INK,
    LINE,
    MARGIN,
    PALE,
    TEXT_SIZE,
    Key,
    captioned,
    grid,
    heading,
    legend,
    note,
    plain,
    shortened,
)
from pixelclip.masks.pictures import (
    OPACITY,
    contact_sheet,
    draw_masks,
    load_small,
    shown_photos,
)
from pixelclip.masks.runs import PhotoMasks, from_labels, from_masks
from pixelclip.overlay import palette
from pixelclip.photos import Photo, find_photos
from pixelclip.training.clustered import (
    Clusters,
    clustered_sheet,
    load_clusters,
    nearest_clusters,
)
from pixelclip.training.model import PixelClip
from pixelclip.training.pictures import ClusterPictures
from pixelclip.training.prompts import common_words
from pixelclip.training.views import ViewSettings
from tests.tiny import photo, tiny_vit
from tests.training import command, run, write_photos


class Halves:
    """A reader for tests: of each photo the left and the right half; some have none, or damage."""

    def __call__(self, photo: Photo, size: tuple[int, int]) -> PhotoMasks | None:
        if "none" in photo.path.name:
            return None
        if "damaged" in photo.path.name:
            raise DataError(f"the masks of {photo.path} are damaged")
        height, width = size
        labels = np.zeros((height, width), dtype=np.int64)
        labels[:, width // 2 :] = 1
        return from_labels(labels)


def mixed(image: Image.Image, colour: np.ndarray) -> np.ndarray:
    """What a photo looks like all under one mask."""
    return (np.asarray(image) * (1 - OPACITY) + colour * OPACITY).round().astype(np.uint8)


def rectangles(height: int, width: int, *boxes: tuple[int, int, int, int]) -> PhotoMasks:
    """Masks of rows `top` to `bottom` and columns `left` to `right`."""
    masks = np.zeros((len(boxes), height, width), dtype=bool)
    for mask, (top, bottom, left, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return from_masks(masks)


def save(path: Path, width: int = 60, height: int = 40, **options: object) -> Photo:
    photo(width, height).save(path, **options)
    return Photo(path, Path(path.stem))


# A photo and its masks


def test_every_mask_has_its_colour_and_the_rest_stays():
    image = photo(60, 40)
    masks = rectangles(40, 60, (2, 10, 5, 20), (20, 38, 5, 55))
    drawn = np.asarray(draw_masks(image, masks))
    for number, inside in enumerate([np.s_[3:9, 6:19], np.s_[21:37, 6:54]]):
        wanted = mixed(image, palette(2)[number])[inside]
        np.testing.assert_array_equal(drawn[inside], wanted)
    bare = ~masks.sample(np.arange(40), np.arange(60)).any(axis=0)
    np.testing.assert_array_equal(drawn[bare], np.asarray(image)[bare])
    assert (drawn[2, 5:20] == 255).all()
    assert (drawn[9, 5:20] == 255).all()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_smaller_masks_lie_above_larger_ones_whatever_their_order(order):
    boxes = [(0, 40, 0, 60), (5, 35, 5, 50), (10, 20, 10, 20)]
    image = photo(60, 40)
    drawn = np.asarray(draw_masks(image, rectangles(40, 60, *(boxes[i] for i in order))))
    places = [np.s_[0:5, 0:60], np.s_[22:34, 6:49], np.s_[11:19, 11:19]]
    for number, box in enumerate(order):
        wanted = mixed(image, palette(3)[number])[places[box]]
        np.testing.assert_array_equal(drawn[places[box]], wanted)


def test_of_equally_large_masks_the_later_one_is_above():
    image = photo(60, 40)
    drawn = np.asarray(draw_masks(image, rectangles(40, 60, (5, 25, 5, 25), (10, 30, 10, 30))))
    inside = np.s_[11:24, 11:24]  # of both, where the first one's outline is not
    np.testing.assert_array_equal(drawn[inside], mixed(image, palette(2)[1])[inside])


def test_a_hidden_outline_shows_through_in_its_masks_colour():
    large, small = (0, 30, 0, 40), (10, 20, 20, 60)
    drawn = np.asarray(draw_masks(photo(60, 40), rectangles(40, 60, large, small)))
    assert (drawn[11:19, 39] == palette(2)[0]).all()
    assert (drawn[10, 20:60] == 255).all()


def test_labels_of_a_map_touch_with_a_single_line():
    labels = np.zeros((40, 60), dtype=np.int64)
    labels[:, 40:] = 1
    white = (np.asarray(draw_masks(photo(60, 40), from_labels(labels))) == 255).all(axis=2)
    np.testing.assert_array_equal(white.any(axis=0).nonzero()[0], [40])


def test_masks_are_drawn_on_a_photo_of_another_size():
    masks = rectangles(400, 600, (0, 400, 0, 300))
    image = photo(60, 40)
    drawn = np.asarray(draw_masks(image, masks))
    np.testing.assert_array_equal(drawn[:, :29], mixed(image, palette(1)[0])[:, :29])
    np.testing.assert_array_equal(drawn[:, 30:], np.asarray(image)[:, 30:])


@pytest.mark.parametrize("count", [0, 1])
def test_a_photo_without_a_masked_pixel_stays(count):
    masks = from_masks(np.zeros((count, 40, 60), dtype=bool))
    image = photo(60, 40)
    assert not ImageChops.difference(draw_masks(image, masks), image).getbbox()


def test_4096_masks_are_drawn_a_few_at_a_time(monkeypatch):
    labels = np.arange(4096).reshape(64, 64).repeat(2, axis=0).repeat(2, axis=1)
    masks = from_labels(labels)
    assert masks.count == 4096
    image = photo(128, 128)
    at_once = draw_masks(image, masks)
    monkeypatch.setattr(pictures, "MAX_SAMPLED", 2**20)
    tracemalloc.start()
    drawn = draw_masks(image, masks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23  # the masks of all pixels are 2^26 bytes
    assert drawn.tobytes() == at_once.tobytes()


def test_masks_lie_right_on_a_photo_that_exif_turns(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = save(tmp_path / "a.jpg", 400, 200, exif=exif, quality=95)
    image, masks = load_small(turned, Halves(), 100)
    assert image.size == (50, 100)
    assert (masks.width, masks.height) == (200, 400)
    drawn = np.asarray(draw_masks(image, masks))
    np.testing.assert_array_equal(drawn[:, :24], mixed(image, palette(2)[0])[:, :24])
    upright = photo(400, 200).transpose(Image.Transpose.ROTATE_270).resize((50, 100))
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(upright)).mean() < 3


# The sheet


@pytest.fixture
def folder(tmp_path) -> list[Photo]:
    """Photos of all shapes; some without masks, one that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    sizes = {"a": (60, 40), "b": (40, 60), "c": (1, 1), "d": (5000, 3), "e": (3, 5000)}
    for name, (width, height) in sizes.items():
        save(folder / f"{name}.png", width, height)
    save(folder / "f-none.png")
    save(folder / "g-damaged.png")
    (folder / "h.jpg").write_bytes(b"no photo")
    return find_photos([folder])


def test_sheet_shows_every_photo_and_lists_those_that_cannot_be_shown(folder):
    image, failures = contact_sheet(folder, Halves(), columns=3, tile=64)
    assert [(photo.path.name, message) for photo, message in failures] == [
        ("g-damaged.png", f"the masks of {folder[6].path} are damaged"),
        ("h.jpg", f"{folder[7].path} is not a photo in a known format"),
    ]
    assert image.width == 3 * 132 + 4 * MARGIN  # two tiles and a gap
    pale = (np.asarray(image) == PALE).all(axis=2)
    assert pale.sum() > 2 * 64 * 20  # failures, and the photo without masks
    assert image.tobytes() == contact_sheet(folder, Halves(), columns=3, tile=64)[0].tobytes()


def test_sheet_has_photo_and_masks_side_by_side(tmp_path):
    photos = [save(tmp_path / f"{i}.png", 64, 48) for i in range(2)]
    sheet = contact_sheet(photos, Halves(), columns=2, tile=32).image
    assert sheet.size == (2 * 68 + 3 * MARGIN, 24 + 4 + 2 * LINE + 2 * MARGIN)
    fine = photo(64, 48)
    for left in (MARGIN, 2 * MARGIN + 68):
        box = (left, MARGIN, left + 68, MARGIN + 24)
        shown = np.asarray(sheet.crop(box))
        np.testing.assert_array_equal(shown[:, :32], np.asarray(fine.reduce(2)))
        drawn = draw_masks(fine, Halves()(photos[0], (48, 64))).reduce(2)
        np.testing.assert_array_equal(shown[:, 36:], np.asarray(drawn))


def test_a_photo_of_another_shape_keeps_it(tmp_path):
    wide = save(tmp_path / "wide.png", 200, 50)
    sheet = contact_sheet([wide], Halves(), tile=40).image
    assert sheet.height == 10 + 4 + 2 * LINE + 2 * MARGIN


def test_photos_elsewhere_are_fetched(tmp_path):
    save(tmp_path / "a.png", 64, 48)
    here = contact_sheet(find_photos([tmp_path]), Halves(), tile=32)
    elsewhere = contact_sheet(find_photos([f"file://{tmp_path}"]), Halves(), tile=32)
    assert elsewhere.image.tobytes() == here.image.tobytes()
    assert not elsewhere.failures


def test_chosen_photos_are_evenly_spaced_first_and_last_included():
    photos = [Photo(Path(f"{i}.jpg"), Path(f"{i}")) for i in range(101)]
    assert [photo.stem.name for photo in shown_photos(photos, 5, 256)] == [
        "0", "25", "50", "75", "100"
    ]  # fmt: skip
    assert shown_photos(photos[:3], 24, 256) == photos[:3]
    with pytest.raises(DataError, match="no photos to show"):
        shown_photos([], 5, 256)
    with pytest.raises(ConfigError, match="a sheet of 101 photos, 1024 pixels each, is too large"):
        shown_photos(photos, 500, 1024)


# Text


def test_names_are_shown_in_characters_that_the_font_has():
    assert plain("Ko\u0308ln \u4e2d\n\udcff.jpg") == r"K\xf6ln \u4e2d\n\udcff.jpg"
    assert plain("IMG_0001 (2).jpg") == "IMG_0001 (2).jpg"


def test_a_long_name_keeps_both_ends():
    font = ImageFont.load_default(size=TEXT_SIZE)
    short = shortened("a" * 100 + "0123456789.jpg", 150, font)
    assert font.getlength(short) <= 150 < font.getlength(short + "aa")
    assert short.startswith("aaa")
    assert "\u2026" in short
    assert short.endswith("89.jpg")
    assert shortened("short.jpg", 150, font) == "short.jpg"


def test_captions_notes_and_legends_have_the_size_asked_for():
    image = photo(30, 20)
    assert captioned(image, ["x" * 300, "two"], least_width=50).size == (50, 20 + 4 + 2 * LINE)
    assert note("a " * 300 + "b" * 300, (90, 40)).size == (90, 40)
    assert note("no masks", (200, 1)).getcolors() == [(200, PALE)]
    assert note("no masks", (1, 200)).getcolors() == [(200, PALE)]
    keys = [Key(f"name {i} " * 9, palette(20)[i], 0.004 * i) for i in range(20)]
    drawn = legend(keys, width=120, height=10, limit=5)
    assert drawn.size == (120, 6 * LINE)
    for number in range(5):
        middle = (TEXT_SIZE // 2, number * LINE + TEXT_SIZE // 2)
        assert drawn.getpixel(middle) == tuple(palette(20)[number])
    assert legend(keys[:2], width=120, height=300, limit=5).height == 300


def test_a_legend_says_0_percent_of_what_is_not_there_at_all():
    none, little, more = (
        legend([Key("cat", palette(1)[0], share)], width=120, height=20, limit=1).tobytes()
        for share in (0, 1e-9, 0.004)
    )
    assert none != little == more


def test_a_grid_has_room_for_a_title_and_a_line_below_it():
    plain, titled, both = (
        grid([[photo(300, 20)]], title=title, subtitle=subtitle)
        for title, subtitle in (("", ""), ("title", ""), ("title", "what it says"))
    )
    assert plain.height < titled.height < both.height
    top = titled.height - plain.height
    assert np.asarray(both)[20 + top : 20 + both.height - plain.height].min() < 100


def test_rows_of_a_grid_may_be_of_any_length():
    dark = Image.new("RGB", (10, 20), INK)
    drawn = np.asarray(grid([[dark, dark], [dark, dark, dark], [dark]], title="A title"))
    assert drawn.shape[1] > 3 * 10 + 4 * MARGIN - 1
    assert (drawn == INK).all(axis=2).sum() >= 6 * 200


# Merged by cluster


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[list[Photo], Path, Path]:
    """Photos, their masks and a run that has learned from them."""
    folder = tmp_path_factory.mktemp("trained")
    photos, masks = write_photos(folder, masked=4)
    weights = save_backbone(tiny_vit(), folder / "vit.safetensors")
    code, text = run(command(photos, masks, weights, folder / "run"), folder / "log")
    assert code == 0, text
    return find_photos([photos]), masks, folder / "run"


def saved(folder: Path, **settings: object) -> tuple[Path, PixelClip]:
    """A model with prompts as a run saves it."""
    settings = {"num_clusters": 6, "prompt_length": 2, "input_size": 64, **settings}
    config = TrainConfig.model_validate(settings)
    backbone = tiny_vit()
    model = PixelClip(backbone, config)
    training = {"settings": config.model_dump(mode="json")}
    card = backbone.card.model_copy(update={"training": training})
    prompts = dict(model.vectors.named_parameters())
    return save_backbone(backbone, folder / "run", card=card, prompts=prompts).parent, model


def load(folder: Path) -> Clusters:
    return load_clusters(str(folder), load_backbone(str(folder)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"class_vectors": "free"},
        {"train_templates": "imagenet-select"},
        {"train_templates": "imagenet-select", "authors_defects": True},
        {"train_templates": "the {} here"},
    ],
    ids=str,
)
def test_clusters_are_those_of_the_run(settings, tmp_path):
    folder, model = saved(tmp_path, **settings)
    clusters = load(folder)
    wanted = F.normalize(model.vectors(model.text).detach(), dim=1)
    torch.testing.assert_close(clusters.vectors, wanted, rtol=0, atol=1e-6)
    assert clusters.origin.startswith("6 learned prompts")
    assert len(set(clusters.names)) == 6
    assert clusters.short_side == 64


@pytest.mark.parametrize("settings", [{"class_vectors": "words"}, {"assigner": "none"}], ids=str)
def test_a_run_that_learned_no_prompts_gets_common_words(settings, tmp_path):
    clusters = load(saved(tmp_path, **settings)[0])
    assert clusters.names == common_words()
    assert "no learned prompts" in clusters.origin


def test_clusters_with_the_same_nearest_word_are_numbered(tmp_path):
    folder, model = saved(tmp_path)
    state = {"tokens": model.vectors.tokens[:1].expand(3, -1, -1)}
    backbone = load_backbone(str(folder))
    save_backbone(backbone, folder, prompts=state)
    names = load(folder).names
    assert names == (names[0], f"{names[0]} 2", f"{names[0]} 3")


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        (
            {"tokens": torch.zeros(6, 2, 5)},
            {},
            r"they have the shape \(6, 2, 5\), not \[K, L, 16\]",
        ),
        ({"tokens": torch.full((6, 2, 16), torch.nan)}, {}, "are damaged"),
        ({"vectors": torch.zeros(6, 5)}, {"class_vectors": "free"}, "are damaged"),
        ({"tokens": torch.zeros(6, 2, 16)}, {"train_templates": "a.txt"}, "in a file, 'a.txt'"),
        ({"tokens": torch.zeros(6, 99, 16)}, {}, "cannot hold prompts of 99 tokens"),
        ({}, {"class_vectors": "magic"}, "has a broken card: .*class_vectors"),
    ],
)
def test_prompts_that_do_not_fit_are_told(prompts, settings, message, tmp_path):
    backbone = tiny_vit()
    known = {"class_vectors": "prompts", "train_templates": "single", **settings}
    card = backbone.card.model_copy(update={"training": {"settings": known}})
    path = save_backbone(backbone, tmp_path / "model.safetensors", card=card, prompts=prompts)
    with pytest.raises(ModelError, match=message):
        load(path)


def test_masks_belong_to_the_vector_nearest_to_their_mean_feature():
    backbone, image = tiny_vit(), photo(128, 64)
    labels = np.asarray(Image.fromarray(
        np.random.default_rng(0).integers(0, 12, (4, 8), dtype=np.uint8)
    ).resize((128, 64), Image.Resampling.NEAREST)).astype(np.int64)  # fmt: skip
    masks = from_labels(labels)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    features = F.interpolate(backbone.dense(pixels), (256, 256), mode="bilinear")[0]
    grid_labels = labels[np.ix_(np.arange(256) // 4, np.arange(256) // 2)]
    means = torch.stack([features[:, grid_labels == v].mean(dim=1) for v in np.unique(labels)])
    vectors = F.normalize(means, dim=1).flip(0)
    clusters = Clusters(vectors, tuple(map(str, range(len(vectors)))), "", 64)
    found = nearest_clusters(image, masks, backbone, clusters)
    np.testing.assert_array_equal(found, np.arange(masks.count)[::-1])


def test_a_mask_too_small_for_the_grid_has_no_cluster():
    masks = from_masks(np.zeros((2, 1, 5000), dtype=bool))
    tiny = rectangles(1, 5000, (0, 1, 4, 5), (0, 1, 0, 5000))
    clusters = Clusters(torch.eye(16)[:3], ("a", "b", "c"), "", 64)
    for given, wanted in ((masks, [True, True]), (tiny, [True, False])):
        found = nearest_clusters(photo(500, 1), given, tiny_vit(), clusters)
        np.testing.assert_array_equal(found < 0, wanted)


def test_figure_of_a_trained_run(trained, tmp_path):
    photos, masks, folder = trained
    sheet, failures = clustered_sheet(photos, open_masks(masks, photos), folder, tile=64, count=6)
    names = [photo.path.name for photo, _ in failures]
    assert names == ["4.png", "5.png"]
    assert failures[0][1] == f"no masks for {photos[4].path}"
    assert sheet.width == 4 * 150 + 5 * MARGIN
    again = clustered_sheet(photos, open_masks(masks, photos), folder, tile=64, count=6).image
    assert sheet.tobytes() == again.tobytes()


def test_figure_shows_masks_of_a_cluster_in_one_colour(tmp_path):
    folder, _ = saved(tmp_path, class_vectors="free", num_clusters=1)
    one = save(tmp_path / "a.png", 128, 96)
    sheet = clustered_sheet([one], Halves(), folder, tile=64, count=1).image
    merged = mixed(photo(128, 96), palette(1)[0])
    left = MARGIN + 2 * (150 + MARGIN) + (150 - 64) // 2
    top = sheet.height - MARGIN - LINE - 4 - 48
    shown = sheet.crop((left, top, left + 64, top + 48))
    wanted = Image.fromarray(merged).reduce(2)
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(wanted))  # and no line between


def test_figure_of_the_plain_offline_model_says_that_it_uses_common_words(folder):
    sheet, failures = clustered_sheet([folder[0], folder[6]], Halves(), "mini", tile=64)
    assert [photo.path.name for photo, _ in failures] == ["g-damaged.png"]
    title = heading("mini: no learned prompts, 256 common words instead")
    shown = sheet.crop((MARGIN, MARGIN, MARGIN + title.width, MARGIN + title.height))
    assert shown.tobytes() == title.tobytes()


def test_figure_of_no_usable_photo_is_refused(folder, tmp_path):
    model = saved(tmp_path)[0]
    with pytest.raises(DataError, match=r"none of 2 photos can be shown: the masks of .* damaged"):
        clustered_sheet(folder[6:], Halves(), model)


def test_training_pictures_have_four_tiles_per_photo_and_a_legend(tmp_path):
    photos = [save(tmp_path / f"{name}.png", 64, 64) for name in ("a", "b-none", "c-damaged")]
    _, model = saved(tmp_path, class_vectors="free", num_clusters=1)
    settings = ViewSettings(short_side=64, crop_size=64, mask_size=32)
    ClusterPictures(photos, Halves(), settings, tmp_path).draw(model, 7)
    drawn = Image.open(tmp_path / "step-00000007.clusters.png")
    assert drawn.size[0] == 4 * 256
    assert drawn.size[1] > 2 * 256  # the damaged one is left out
    enlarged = photo(64, 64).resize((256, 256), Image.Resampling.BILINEAR)
    whole = mixed(enlarged, palette(1)[0])
    tiles = [np.asarray(drawn.crop((256 * i, 0, 256 * i + 256, 256))) for i in range(4)]
    np.testing.assert_array_equal(tiles[0], np.asarray(enlarged))
    np.testing.assert_array_equal(tiles[1][:, :127], whole[:, :127])
    np.testing.assert_array_equal(tiles[2], whole)
    np.testing.assert_array_equal(tiles[3], whole)
    without = np.asarray(drawn.crop((512, 256, 768, 512)))
    np.testing.assert_array_equal(without, np.asarray(enlarged))
