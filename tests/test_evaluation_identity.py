"""Pieces of an evaluation are used again only where nothing that decides figures has changed."""

import json

import numpy as np
import pytest
from PIL import Image

from pixelclip.backbones import load_backbone, save_backbone
from pixelclip.backbones.means import Means, all_that_tells
from pixelclip.evaljob import EvalJob, run_eval_job
from pixelclip.evaluation.rivals import RivalSettings, make_rival
from pixelclip.masks.superpixels import Superpixels, SuperpixelSettings
from tests.test_evaluation_job import SETTINGS, make_set, pieces_done_again
from tests.tiny import photo, tiny_vit, vit_card
from tests.towers import save_tower


@pytest.fixture
def data(tmp_path):
    """One piece."""
    return make_set(tmp_path / "data", 2)


def pieces_of(tmp_path, data, means, change=lambda: None, **options):
    """How many pieces are done again after a change, which may give other means."""
    output = tmp_path / "out"

    def run(means):
        options["settings"] = SETTINGS
        run_eval_job(EvalJob(means, data=(data,), output=output, quiet=True, workers=1, **options))

    run(means)
    assert list(output.glob("pieces/*/*.npz"))
    return pieces_done_again(output, lambda: run(change() or means))


@pytest.fixture
def model(tmp_path):
    return save_backbone(tiny_vit(), tmp_path / "model")


def test_of_the_same_model_they_are_used(tmp_path, data, model):
    assert pieces_of(tmp_path, data, Means(str(model)), rivals=("sclip", "superpixels")) == 0


def test_the_same_weights_elsewhere_are_the_same_model(tmp_path, data, model):
    moved = tmp_path / "moved.safetensors"
    change = lambda: Means(str(model.rename(moved)))  # noqa: E731
    assert pieces_of(tmp_path, data, Means(str(model)), change) == 0


def test_the_models_own_last_block_counts_below_a_rival(tmp_path, data, model):
    before, after = (Means(str(model), attention=name) for name in ("naclip", "maskclip"))
    assert pieces_of(tmp_path, data, before, lambda: after, rivals=("superpixels",)) == 2


def test_a_card_says_what_weights_do_not(tmp_path, data, model):
    def change():
        save_backbone(tiny_vit(), model, card=vit_card(mean=(0.1, 0.2, 0.3)))

    assert pieces_of(tmp_path, data, Means(str(model)), change) == 1


def test_a_dino_towers_description_counts_with_the_same_weights(tmp_path, data, model):
    folder = save_tower(tmp_path / "dino", "dino")
    config = folder / "config.json"

    def change():
        content = json.loads(config.read_text())
        content["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
        config.write_text(json.dumps(content))

    options = {"rivals": ("proxyclip",), "dino": str(folder)}
    assert pieces_of(tmp_path, data, Means(str(model)), change, **options) == 1


def test_a_dino_towers_weights_count(tmp_path, data, model):
    folder = save_tower(tmp_path / "dino", "dino")
    change = lambda: save_tower(folder, "dino", seed=1) and None  # noqa: E731
    options = {"rivals": ("proxyclip",), "dino": str(folder)}
    assert pieces_of(tmp_path, data, Means(str(model)), change, **options) == 1


def test_photos_that_failed_are_tried_again(tmp_path, data, model):
    photo(90, 90).save(data / "images/large.png")
    Image.fromarray(np.zeros((90, 90), np.uint8)).save(data / "labels/large.png")
    codes = [
        run_eval_job(
            EvalJob(
                Means(str(model)), data=(data,), output=tmp_path / "out", quiet=True, workers=1,
                settings=SETTINGS | {"max_pixels": limit},
            )
        )
        for limit in (3000, None)
    ]  # fmt: skip
    assert codes == [1, 0]


def test_every_number_of_a_rival_counts():
    mini = load_backbone("mini", device="cpu")
    rivals = [
        mini,
        make_rival("proxy", mini),
        make_rival("proxy", mini, settings=RivalSettings(beta=1.2000001)),
        make_rival("proxy", mini, settings=RivalSettings(gamma=4)),
        make_rival("superpixels", mini),
        make_rival("superpixels", mini, source=Superpixels(SuperpixelSettings(scale=31))),
    ]
    assert len({all_that_tells(rival) for rival in rivals}) == len(rivals)
    assert all_that_tells(make_rival("proxy", mini)) == all_that_tells(rivals[1])
