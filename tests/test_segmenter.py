"""The segmenter against a slow, obvious rendering of what it promises."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pixelclip.config import SegmentConfig
from pixelclip.errors import ConfigError, DataError
from pixelclip.plan import window_starts
from pixelclip.segmenter import Segmenter
from pixelclip.vocabulary import check_distinct
from tests.tiny import photo, tiny_vit

WORDS = ("cat", "sofa, couch", "window", "red bicycle", "tree", "road", "sky", "person", "cup")


@pytest.fixture(scope="module")
def backbone():
    return tiny_vit()


def make(backbone, classes=WORDS, **settings):
    """A segmenter whose text features spread over what the random image tower gives."""
    config = SegmentConfig(**{"templates": "name", **settings})
    segmenter = Segmenter(backbone, classes, config=config, cache=False)
    pixels = torch.from_numpy(np.array(photo(96, 64))).permute(2, 0, 1)[None] / 255
    mean = F.normalize(backbone.dense(pixels).mean(dim=(0, 2, 3)), dim=0)
    draw = torch.randn(segmenter.text.shape, generator=torch.Generator().manual_seed(5))
    segmenter.text = F.normalize(draw - (draw @ mean)[:, None] * mean, dim=1)
    return segmenter


def obvious_scores(segmenter, image, net_width, net_height):
    """Resize, pad with the mean, dense, cosine, upsample every map, crop: one photo at a time."""
    backbone, stride = segmenter.backbone, segmenter.backbone.stride
    small = np.asarray(image.resize((net_width, net_height), Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(small / np.float32(255)).permute(2, 0, 1)[None].float()
    features = F.normalize(backbone.dense(pixels), dim=1)[0]
    scores = torch.einsum("dhw,kd->khw", features, segmenter.text)
    height, width = image.height, image.width
    y = ((torch.arange(height) + 0.5) * net_height / height / stride - 0.5).clamp(min=0)
    x = ((torch.arange(width) + 0.5) * net_width / width / stride - 0.5).clamp(min=0)
    grid_y = (y / max(1, scores.shape[1] - 1)) * 2 - 1
    grid_x = (x / max(1, scores.shape[2] - 1)) * 2 - 1
    grid = torch.stack(torch.meshgrid(grid_y, grid_x, indexing="ij")[::-1], -1)[None].float()
    return F.grid_sample(scores[None], grid, "bilinear", "border", align_corners=True)[0]


@pytest.mark.parametrize("size", [(64, 64), (97, 131), (200, 70), (33, 64), (640, 480)])
def test_labels_equal_upsampling_every_map(backbone, size):
    image = photo(*size)
    segmenter = make(backbone)
    plan = segmenter.plan(*size)
    expected = obvious_scores(segmenter, image, plan.width, plan.height)
    result = segmenter(image, scores=True)
    np.testing.assert_allclose(result.scores, expected.numpy(), atol=2e-6)
    margin = expected.topk(2, dim=0).values
    clear = ((margin[0] - margin[1]) > 1e-5).numpy()
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(result.labels[clear], expected.argmax(0).numpy()[clear])


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (300, 2), (7, 9)])
def test_the_smallest_photos_get_a_label_per_pixel(backbone, size):
    result = make(backbone)(photo(*size))
    assert result.labels.shape == (size[1], size[0])
    assert result.labels.max() < len(WORDS)


@pytest.mark.parametrize("count", [1, 2, 255, 256, 1000, 10_000])
def test_any_number_of_names(backbone, count):
    segmenter = make(backbone, [f"thing {index}" for index in range(count)])
    image = photo(80, 60)
    plan = segmenter.plan(80, 60)
    expected = obvious_scores(segmenter, image, plan.width, plan.height)
    result = segmenter(image)
    assert result.labels.dtype == (np.uint8 if count <= 255 else np.uint16)
    best = expected.max(0).values.numpy()
    chosen = np.take_along_axis(expected.numpy(), result.labels[None].astype(np.int64), 0)[0]
    np.testing.assert_allclose(chosen, best, atol=2e-6)


def test_a_list_equals_one_by_one(backbone):
    photos = [photo(90, 60, 1), photo(60, 90, 2), photo(90, 60, 3), photo(64, 64, 4)]
    segmenter = make(backbone, batch_size=3)
    together = segmenter(photos)
    for single, batched in zip(map(segmenter, photos), together, strict=True):
        assert (single.labels != batched.labels).mean() < 1e-3  # ties within float rounding


def test_path_pil_and_array_give_the_same(backbone, tmp_path):
    image = photo(70, 50)
    image.save(tmp_path / "a.png")
    segmenter = make(backbone)
    expected = segmenter(image).labels
    np.testing.assert_array_equal(segmenter(tmp_path / "a.png").labels, expected)
    np.testing.assert_array_equal(segmenter(str(tmp_path / "a.png")).labels, expected)
    np.testing.assert_array_equal(segmenter(np.asarray(image)).labels, expected)


def test_exif_turned_photo_gets_upright_labels(backbone, tmp_path):
    image = photo(90, 50)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying; upright after a quarter turn
    image.save(tmp_path / "turned.png", exif=exif)
    segmenter = make(backbone)
    upright = segmenter(image.transpose(Image.Transpose.ROTATE_270)).labels
    np.testing.assert_array_equal(segmenter(tmp_path / "turned.png").labels, upright)


def test_windows_cover_every_cell_evenly():
    for cells in range(1, 200):
        for overlap in (0.0, 0.25, 0.75):
            config = SegmentConfig(window=160, overlap=overlap)
            starts, length = window_starts(cells, config, 16)
            covered = {c for start in starts for c in range(start, start + length)}
            assert covered == set(range(cells))
            for first, second in pairwise(starts):
                assert first < second <= first + length - int(length * overlap * 0.99)


def test_windowed_features_are_tapered_means_of_the_windows(backbone):
    image = photo(330, 210)
    segmenter = make(backbone, short_side=210, window=96, batch_size=2)
    plan = segmenter.plan(330, 210)
    assert len(plan.rows) > 1
    assert len(plan.columns) > 2
    stride = backbone.stride
    height, width = -(-plan.height // stride), -(-plan.width // stride)
    total, weight = torch.zeros(height, width, backbone.dim), torch.zeros(height, width, 1)
    for row in plan.rows:
        for column in plan.columns:
            bottom = min((row + plan.window[0]) * stride, plan.height)
            right = min((column + plan.window[1]) * stride, plan.width)
            crop = image.crop((column * stride, row * stride, right, bottom))
            pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None] / 255
            features = F.normalize(backbone.dense(pixels), dim=1)[0].permute(1, 2, 0)
            for y in range(features.shape[0]):
                for x in range(features.shape[1]):
                    near_y = min(y + 1, features.shape[0] - y)
                    near_x = min(x + 1, features.shape[1] - x)
                    total[row + y, column + x] += features[y, x] * near_y * near_x
                    weight[row + y, column + x] += near_y * near_x
    bands = segmenter.grid_features(segmenter.prepare(image))
    torch.testing.assert_close(bands, total / weight, atol=1e-5, rtol=0)


def test_a_photo_cut_into_blocks_equals_one_block(backbone, monkeypatch):
    image = photo(330, 210)
    segmenter = make(backbone, short_side=210, window=96)
    whole = segmenter(image, confidence=True, scores=True)
    monkeypatch.setattr("pixelclip.labelling.PIXELS_PER_BLOCK", 330 * 40)
    blocks = segmenter(image, confidence=True, scores=True)
    np.testing.assert_array_equal(whole.labels, blocks.labels)
    np.testing.assert_allclose(whole.scores, blocks.scores, atol=1e-6)
    np.testing.assert_allclose(whole.confidence, blocks.confidence, atol=2e-3)
    np.testing.assert_allclose(whole.mean_confidence, blocks.mean_confidence, atol=1e-5)


@pytest.mark.parametrize(("temperature", "worst", "mean"), [(5.0, 0.02, 0.002), (100.0, 0.3, 0.01)])
def test_confidence_is_the_softmax_of_the_upsampled_scores(
    backbone, monkeypatch, temperature, worst, mean
):
    # Classes that cannot win in a cell are summed in the logarithm, which shows where the scores
    # of several jump between two cells, as random features and words do at a high temperature.
    monkeypatch.setattr(type(backbone), "temperature", temperature)
    for size in ((97, 131), (64, 64), (200, 70)):
        result = make(backbone)(photo(*size), confidence=True, scores=True)
        chances = torch.from_numpy(temperature * result.scores).softmax(0).amax(0).numpy()
        difference = np.abs(chances - result.confidence.astype(np.float32))
        assert difference.max() < worst
        assert difference.mean() < mean


def test_names_the_model_cannot_tell_apart_are_refused():
    with pytest.raises(ConfigError, match="'cat' and 'dog' are the same to this model"):
        check_distinct(torch.ones(3, 4), ["cat", "dog", "sky"])
    check_distinct(torch.eye(3), ["cat", "dog", "sky"])


def test_a_text_of_classes_is_parsed_not_spelled_out(backbone):
    assert make(backbone, "cat, sky").classes == ("cat", "sky")


def test_what_is_no_photo_is_refused(backbone):
    segmenter = make(backbone)
    with pytest.raises(DataError, match="no such photo"):
        segmenter("nowhere.png")


def test_contrast_names_that_are_classes_are_refused(backbone):
    with pytest.raises(ConfigError, match="'cat' occurs twice"):
        make(backbone, ["cat"], background="names", background_names=("cat",))


def test_threshold_background_takes_unsure_pixels(backbone):
    image = photo(96, 64)
    sure = make(backbone)(image, confidence=True)
    limit = float(np.median(sure.confidence))
    result = make(backbone, background="threshold", threshold=limit)(image)
    unsure = sure.confidence.astype(np.float32) < limit
    assert 0.2 < (result.labels == 255).mean() < 0.8
    assert ((result.labels == 255) == unsure).mean() > 0.99  # float16 rounds the kept map
    kept = result.labels != 255
    np.testing.assert_array_equal(result.labels[kept], sure.labels[kept])


def test_contrast_names_win_their_pixels_as_no_class(backbone):
    image = photo(96, 64)
    plain = make(backbone)(image)
    names, contrast = WORDS[:5], WORDS[5:]
    result = make(backbone, names, background="names", background_names=contrast)(image)
    assert 0.1 < (plain.labels >= 5).mean() < 0.9
    np.testing.assert_array_equal(result.labels, np.where(plain.labels >= 5, 255, plain.labels))


def test_authors_preset_equals_their_steps(backbone):
    image = photo(300, 200)
    segmenter = make(backbone, preset="authors")
    resized = np.array(image.resize((960, 640), Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(resized).permute(2, 0, 1)[None] / 255
    squashed = F.interpolate(pixels, (64, 64), mode="bilinear", align_corners=False)
    maps = F.interpolate(backbone.dense(squashed), (64, 64), mode="bilinear", align_corners=False)
    scores = torch.einsum("bdhw,kd->bkhw", F.normalize(maps, dim=1), segmenter.text)
    expected = F.interpolate(scores, (200, 300), mode="bilinear", align_corners=False)[0]
    result = segmenter(image, scores=True)
    np.testing.assert_allclose(result.scores, expected.numpy(), atol=1e-5)
    assert (result.labels != expected.argmax(0).numpy()).mean() < 1e-4


def test_authors_preset_encodes_names_as_they_do(backbone):
    def text(**settings):
        return Segmenter(backbone, WORDS, config=SegmentConfig(**settings), cache=False).text

    exact, theirs = text(), text(preset="authors")
    assert torch.equal(theirs, text(half_text=True))
    assert torch.equal(exact, text(preset="authors", half_text=False))
    assert 0 < (exact - theirs).abs().max() < 5e-3


def test_large_photos_keep_a_pixel_in_eight(backbone):
    plan = make(backbone).plan(4000, 3000)
    assert (plan.width, plan.height) == (500, 375)
    assert make(backbone, short_side=64).plan(4000, 3000).height == 64


def test_strips_are_not_enlarged_beyond_measure(backbone):
    segmenter = make(backbone)
    assert segmenter.plan(20_000, 10)[:2] == (10, 20_000)
    assert segmenter.plan(32, 32)[:2] == (64, 64)
    assert segmenter(photo(3000, 3)).labels.shape == (3, 3000)


def test_score_maps_that_would_not_fit_are_refused(backbone):
    segmenter = make(backbone, [f"thing {index}" for index in range(1000)])
    with pytest.raises(DataError, match="exceed 4 GiB"):
        segmenter(Image.new("RGB", (2000, 1000)), scores=True)


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)],
)
def test_arrays_that_are_no_photo_are_refused(backbone, wrong):
    with pytest.raises(DataError, match="an array must be uint8"):
        make(backbone)(wrong)


def test_two_runs_give_equal_bits(backbone):
    image = photo(200, 150)
    first, second = (make(backbone)(image, confidence=True) for _ in range(2))
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(first.confidence, second.confidence)
