"""Masks that are made while training, of each view, by k-means (behaviour.md 19)."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pixelclip.backbones import save_backbone
from pixelclip.backbones.dino import load_dense
from pixelclip.config import TrainConfig
from pixelclip.photos import find_photos
from pixelclip.training.batch import Batch
from pixelclip.training.data import TrainPhotos, collate
from pixelclip.training.live import LiveMasks, WholePhotos, live_source
from pixelclip.training.loop import view_settings
from pixelclip.training.run import newest_checkpoint
from tests.test_masks_kmeans import slow_kmeans
from tests.tiny import photo, tiny_vit
from tests.towers import save_tower
from tests.training import (
    SMALL,
    assert_same_run,
    command,
    random_numbers_moved,
    read_rows,
    run,
    run_together,
    write_photos,
)

STEPS = 4
COLOUR = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, object]:
    """Photos, a weight file, and settings with a tiny DINO."""
    folder = tmp_path_factory.mktemp("inputs")
    photos, _ = write_photos(folder)
    dino = save_tower(folder / "tower", "dino")
    weights = save_backbone(tiny_vit(), folder / "vit.safetensors")
    return {
        "photos": photos,
        "model": weights,
        "settings": {"mask_checkpoint": dino, "mask_clusters": 5, "mask_input": 96},
    }


def arguments(inputs: dict[str, object], output: Path, **settings: object) -> list[str]:
    settings = {"steps": STEPS, **inputs["settings"], **settings}
    return command(inputs["photos"], Path("dino"), inputs["model"], output, **settings)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    code, text = run(arguments(inputs, folder / "run", picture_every=STEPS), folder / "log")
    assert code == 0, text
    return folder / "run"


def config_of(inputs: dict[str, object], **settings: object) -> TrainConfig:
    values = SMALL | inputs["settings"] | settings
    return TrainConfig(**(values | {"mask_checkpoint": str(values["mask_checkpoint"])}))


def live_masks(config: TrainConfig) -> LiveMasks:
    return LiveMasks("dino", config, COLOUR, "cpu")


def batch_of(inputs: dict[str, object], config: TrainConfig, count: int = 6) -> Batch:
    """A batch as the loader makes it of the photos, some of which do not fill the crop."""
    photos = find_photos([inputs["photos"]])
    samples = TrainPhotos(photos, WholePhotos(), view_settings(config))
    return collate([samples[number, number] for number in range(count)]).batch


# The masks


@pytest.mark.parametrize("mask_input", [96, None, 70])
def test_masks_are_clusters_of_the_weak_view(inputs, mask_input):
    config = config_of(inputs, mask_input=mask_input, authors_defects=True, crop_size=80)
    batch = batch_of(inputs, config)
    made = live_masks(config)(batch, range(10, 16))
    tower = load_dense(checkpoint=config.mask_checkpoint, device="cpu")
    side = (mask_input or 80) // 16 * 16
    for index in range(len(batch)):
        pixels = batch.weak[index].float() / 255
        height, width = batch.sizes[index].tolist()
        pixels[:, height:] = COLOUR
        pixels[:, :, width:] = COLOUR
        views = F.interpolate(pixels[None], (side, side), mode="bilinear", align_corners=False)
        tokens = tower.dense(views)[0].flatten(1).T.numpy()
        random = np.random.default_rng([config.seed, 3, 10 + index])
        first = tokens[random.integers(len(tokens), size=5)]
        if len(np.unique(first, axis=0)) < 5:
            continue  # equal centres: rounding would decide in the slow rendering
        labels, _ = slow_kmeans(tokens, first, live_masks(config).settings)
        cells = torch.from_numpy(labels).float().reshape(1, 1, side // 16, side // 16)
        frame = F.interpolate(cells, (80, 80), mode="nearest")
        grid = F.interpolate(frame, (24, 24), mode="nearest")[0, 0]
        expected = [grid == label for label in range(5) if (grid == label).any()]
        assert torch.equal(made.masks[index], torch.stack(expected))


def test_masks_partition_what_is_left_of_the_view(inputs):
    config = config_of(inputs, crop_size=64)
    batch = batch_of(inputs, config)
    made = live_masks(config)(batch, range(6))
    places = torch.arange(24) * 64 // 24
    for masks, allowed, strong, size in zip(
        made.masks, batch.masks, batch.strong, batch.sizes.tolist(), strict=True
    ):
        assert torch.equal(masks.sum(dim=0), allowed[0].int())
        assert masks.any(dim=(1, 2)).all()
        inside = (places < size[0])[:, None] & (places < size[1])
        assert not allowed[0][~inside].any()
        is_black = (strong == 0).all(dim=0)[places][:, places]
        assert not allowed[0][is_black & inside].all()
        assert allowed[0][~is_black & inside].float().mean() > 0.95
    assert any((size < 64).any() for size in batch.sizes)  # some views are padded


def test_the_authors_masks_cover_padding_and_cut_out(inputs):
    config = config_of(inputs, crop_size=64, authors_defects=True)
    made = live_masks(config)(batch_of(inputs, config), range(6))
    assert all((masks.sum(dim=0) == 1).all() for masks in made.masks)


def test_masks_hang_on_the_samples_number_alone(inputs):
    config = config_of(inputs)
    batch, live = batch_of(inputs, config), live_masks(config)
    together = live(batch, range(20, 26)).masks
    parts = [live(part, range(20 + 3 * n, 23 + 3 * n)) for n, part in enumerate(batch.split(2))]
    apart = [masks for part in parts for masks in part.masks]
    assert all(map(torch.equal, together, apart))
    other = live(batch, range(6)).masks
    assert not all(map(torch.equal, together, other))
    seeded = live_masks(config_of(inputs, seed=7))(batch, range(20, 26)).masks
    assert not all(map(torch.equal, together, seeded))


def test_a_path_of_that_name_is_read_instead(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [live_source(name) for name in ("dino", Path("mini"), "sam", None, "a/dino")] == [
        "dino", "mini", None, None, None
    ]  # fmt: skip
    (tmp_path / "dino").mkdir()
    assert live_source("dino") is None


# The runs


def test_a_run_needs_no_mask_files(inputs, whole):
    record = json.loads((whole / "run.json").read_text())
    assert record["masks"] == "dino"
    assert len(record["mask_weights"]) >= 32
    assert not (whole / "masks").exists()
    assert (whole / "pictures" / f"step-{STEPS:08d}.clusters.png").is_file()
    rows = read_rows(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(8 <= row["masks"] <= 20 for row in rows)  # 4 photos, at most 5 masks each


def test_the_tower_is_in_no_checkpoint(whole):
    stored = newest_checkpoint(whole)["weights"]
    assert not [name for name in stored if "dino" in name or "tower.blocks" in name]


def test_an_interrupted_run_ends_equal(inputs, whole, tmp_path):
    parts = arguments(inputs, tmp_path / "run", picture_every=STEPS)
    at = (signal.SIGINT, str(tmp_path / "run" / "metrics.jsonl"), 2)
    assert run(parts, tmp_path / "log", signal_at=at)[0] == 130
    assert len(read_rows(tmp_path / "run")) == 2
    code, text = run(parts, tmp_path / "log")
    assert code == 0, text
    assert_same_run(tmp_path / "run", whole)


def test_micro_batches_change_nothing_but_rounding(inputs, whole, tmp_path):
    code, text = run(arguments(inputs, tmp_path / "run", micro_batches=2), tmp_path / "log")
    assert code == 0, text
    for one, other in zip(read_rows(tmp_path / "run"), read_rows(whole), strict=True):
        assert one["masks"] == other["masks"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_view_gets_other_masks_in_each_step(inputs, tmp_path):
    """Of one symmetric photo all views are equal, and nothing is learned: only masks differ."""
    half = np.asarray(photo(24, 48))
    (tmp_path / "photos").mkdir()
    whole_photo = Image.fromarray(np.concatenate([half, half[:, ::-1]], axis=1))
    whole_photo.save(tmp_path / "photos" / "a.png")
    settings = {"steps": 3, "batch_size": 1, "strong_view": False, "colour": False}
    parts = arguments(
        inputs | {"photos": tmp_path / "photos"}, tmp_path / "run", learning_rate=1e-12, **settings
    )
    code, text = run(parts, tmp_path / "log")
    assert code == 0, text
    assert len({round(row["loss"], 5) for row in read_rows(tmp_path / "run")}) == 3


def test_two_processes_train_on_the_same_masks(inputs, whole, tmp_path):
    run_together(arguments(inputs, tmp_path / "run"), tmp_path / "log", 2)
    for one, other in zip(read_rows(tmp_path / "run"), read_rows(whole), strict=True):
        assert one["masks"] == other["masks"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_training_moves_no_global_generator(inputs, tmp_path):
    parts = arguments(inputs, tmp_path / "run", steps=1)
    assert random_numbers_moved(parts, tmp_path / "log") == []


def test_going_on_with_another_tower_is_refused(inputs, tmp_path):
    tower = save_tower(tmp_path / "tower", "dino")
    parts = arguments(inputs, tmp_path / "run", mask_checkpoint=tower, steps=1)
    assert run(parts, tmp_path / "log")[0] == 0
    save_tower(tower, "dino", seed=1)
    code, text = run(parts, tmp_path / "log")
    assert code == 2
    assert "holds another run: mask_weights was" in text
    (tower / "config.json").unlink()
    code, text = run(parts, tmp_path / "log")
    assert code == 2
    said = f"{tower} has no config.json; give a folder that timm has saved, or a file"
    assert text == f"pixelclip: error: {said}\n"


def test_minis_tower_makes_masks_too(inputs, tmp_path):
    parts = command(
        inputs["photos"], Path("mini"), inputs["model"], tmp_path / "run",
        steps=1, mask_input=96, mask_clusters=5,
    )  # fmt: skip
    code, text = run(parts, tmp_path / "log")
    assert code == 0, text
    assert read_rows(tmp_path / "run")[0]["masks"] >= 8


def test_without_the_weights_it_is_one_line(inputs, tmp_path):
    parts = command(inputs["photos"], Path("dino"), inputs["model"], tmp_path / "run")
    code, text = run(parts, tmp_path / "log")
    assert code == 2
    assert text.startswith("pixelclip: error: cannot fetch timm/vit_small_patch16_224.dino")
    assert text.count("\n") == 1
