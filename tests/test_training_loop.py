"""Whole training runs: they learn, and whatever stops them, they go on as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pixelclip.backbones import load_backbone, save_backbone
from pixelclip.errors import ConfigError, DataError, PixelClipError
from pixelclip.training.run import checkpoints, newest_checkpoint
from pixelclip.training.start import train
from tests.tiny import tiny_vit
from tests.training import (
    SMALL,
    assert_same_run,
    command,
    random_numbers_moved,
    read_rows,
    result,
    run,
    run_together,
    write_photos,
)

STEPS = 6
MESSAGE = "pixelclip: error: "


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Photos, masks of all but one of them, and a weight file."""
    folder = tmp_path_factory.mktemp("inputs")
    weights = save_backbone(tiny_vit(), folder / "vit.safetensors")
    return *write_photos(folder, masked=5), weights


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    code, text = run(command(*inputs, folder / "run", steps=STEPS), folder / "log")
    assert code == 0, text
    return folder / "run"


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "run"


def stopped_after(arguments: list[str], log: Path, step: int, number: int = signal.SIGINT) -> Path:
    """The folder of a run that got a signal while it was noting a step."""
    output = Path(arguments[arguments.index("-o") + 1])
    at = (number, str(output / "metrics.jsonl"), step)
    code, text = run(arguments, log, signal_at=at)
    assert code == 130, text
    assert len(read_rows(output)) == newest_checkpoint(output)["step"] == step
    return output


def newest(output: Path) -> Path:
    return checkpoints(output)[-1]


# It learns


def test_loss_falls_on_fixed_photos(inputs, output):
    photos, masks, weights = inputs
    settings = SMALL | {"steps": 25, "learning_rate": 0.002, "strong_view": False, "colour": False}
    summary = train(photos, output, masks=masks, model=str(weights), device="cpu", **settings)
    losses = [row["loss"] for row in read_rows(output)]
    assert summary.finished
    assert summary.loss == losses[-1]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:3])


def test_a_run_leaves_what_the_documents_say(whole):
    names = {path.name for path in whole.iterdir()}
    assert {"run.json", "checkpoints", "metrics.jsonl", "metrics.csv", "model.safetensors"} <= names
    assert [p.name for p in checkpoints(whole)] == [
        "step-00000005.pt", "step-00000006.pt"
    ]  # fmt: skip
    assert not [path for path in whole.rglob("*") if path.name.endswith(".part")]


def test_the_same_run_twice_is_equal(inputs, whole, output, log):
    code, text = run(command(*inputs, output, steps=STEPS), log)
    assert code == 0, text
    assert_same_run(output, whole)


# What stops a run


def test_a_run_killed_at_many_places_ends_equal(inputs, whole, output, log):
    """SIGKILL before the n-th file operation, each time n a few further: in the end all kinds."""
    codes = []
    for kill_at in (2, 5, 7, 9, 11, 12, 13, 14, 16, 19, 23):
        at = (signal.SIGKILL, str(output), kill_at)
        codes.append(run(command(*inputs, output, steps=STEPS), log, signal_at=at)[0])
        if codes[-1] == 0:
            break
    assert codes.count(-signal.SIGKILL) >= 5
    assert run(command(*inputs, output, steps=STEPS), log)[0] == 0
    assert_same_run(output, whole)
    assert set(checkpoints(output)) >= {newest(output)}


@pytest.mark.parametrize("step", [1, 4])
def test_an_interrupted_run_ends_its_step_and_goes_on_equal(inputs, whole, output, log, step):
    stopped_after(command(*inputs, output, steps=STEPS), log, step)
    assert "the same command goes on from here" in log.read_text()
    assert f"stopped after step {step}" in log.read_text()
    assert run(command(*inputs, output, steps=STEPS), log)[0] == 0
    assert_same_run(output, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_writes_a_checkpoint_between_two(inputs, whole, output, log, number):
    arguments = command(*inputs, output, steps=STEPS, checkpoint_every=5)
    stopped_after(arguments, log, 3, number)
    assert run(arguments, log)[0] == 0
    assert_same_run(output, whole)


def test_a_finished_run_is_left_alone(inputs, whole, log):
    before = {path: path.read_bytes() for path in whole.rglob("*.pt")}
    code, text = run(command(*inputs, whole, steps=STEPS), log)
    assert (code, text.split(":")[0].strip()) == (0, "done")
    assert {path: path.read_bytes() for path in whole.rglob("*.pt")} == before


# Damage


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def foreign(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [truncated, flipped, foreign])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(inputs, whole, output, log, damage):
    stopped_after(command(*inputs, output, steps=STEPS, keep_checkpoints=9), log, 3)
    path = newest(output)
    before = newest_checkpoint(output)["step"]
    path.write_bytes(damage(path.read_bytes()))
    assert newest_checkpoint(output)["step"] == before - 1
    code, text = run(command(*inputs, output, steps=STEPS), log)
    assert code == 0
    assert f"{path} is damaged; going back to the one before" in " ".join(text.split())
    assert_same_run(output, whole)


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_a_full_disk_is_one_line_and_harms_nothing(inputs, whole, output, log, share):
    """Files may not grow beyond a share of the checkpoint's size, or of the model's."""
    stopped_after(command(*inputs, output, steps=STEPS), log, 2)
    before = newest_checkpoint(output)
    sizes = [newest(output).stat().st_size, (output / "model.safetensors").stat().st_size]
    limit = int(share * max(sizes)) - 1
    code, text = run(command(*inputs, output, steps=STEPS), log, file_limit=limit)
    lines = [line for line in text.splitlines() if "error" in line]
    assert (code, len(lines)) == (2, 1), text
    assert lines[0].startswith(f"{MESSAGE}cannot write {output}")
    assert "Traceback" not in text
    assert newest_checkpoint(output)["step"] == before["step"]
    assert not [path for path in output.rglob("*") if path.name.endswith(".part")]
    assert run(command(*inputs, output, steps=STEPS), log)[0] == 0
    assert_same_run(output, whole)


# Other settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_clusters": 5}, "num_clusters was 4, now 5"),
        ({"temperature": 7, "seed": 1}, "seed was 0, now 1; temperature was 100.0, now 7.0"),
        ({"steps": 7}, "steps was 6, now 7"),
    ],
)
def test_other_settings_are_refused_by_name(inputs, whole, changes, message):
    photos, masks, weights = inputs
    with pytest.raises(ConfigError) as caught:
        train(photos, whole, masks=masks, model=str(weights), device="cpu",
              **{**SMALL, "steps": STEPS, **changes})  # fmt: skip
    assert str(caught.value) == (
        f"{whole} holds another run: {message}; give the same settings to resume it, or another -o"
    )


def test_other_photos_are_refused(inputs, whole, tmp_path):
    _, masks, weights = inputs
    photos, _ = write_photos(tmp_path)
    (photos / "0.png").rename(photos / "another.png")
    with pytest.raises(ConfigError, match=r"holds another run: images was .*photos_sha256 was"):
        train(photos, whole, masks=masks, model=str(weights), device="cpu",
              **{**SMALL, "steps": STEPS})  # fmt: skip


def test_what_does_not_touch_the_result_may_change(inputs, whole, output, log):
    stopped_after(command(*inputs, output, steps=STEPS), log, 2)
    changes = {"num_workers": 1, "checkpoint_every": 2, "keep_checkpoints": 1, "picture_every": 3}
    code, text = run(command(*inputs, output, steps=STEPS, **changes), log)
    assert code == 0, text
    assert_same_run(output, whole)
    assert len(checkpoints(output)) == 1


# Several processes


def close_runs(one: Path, other: Path, tolerance: float) -> None:
    (ours, rows), (theirs, other_rows) = result(one), result(other)
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=tolerance, atol=tolerance)
    for row, other_row in zip(rows, other_rows, strict=True):
        assert (row["loss"] is None) == (other_row["loss"] is None)
        figures = [{**r, "loss": r["loss"] or 0.0} for r in (row, other_row)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-3), row["step"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"assigner": "queue", "queue_steps": 2}, {"assigner": "none"}, {"class_vectors": "free"},
     {"micro_batches": 2, "batch_size": 5}, {"class_vectors": "words"}],
    ids=lambda settings: ",".join(map(str, settings.values())) or "plain",
)  # fmt: skip
def test_two_processes_train_what_one_does(inputs, tmp_path, log, settings):
    alone, together = tmp_path / "alone", tmp_path / "together"
    code, text = run(command(*inputs, alone, steps=3, **settings), log)
    assert code == 0, text
    run_together(command(*inputs, together, steps=3, **settings), log, 2)
    close_runs(alone, together, 2e-5)


@pytest.mark.parametrize("assigner", ["sinkhorn", "queue"])
def test_a_run_goes_on_with_another_number_of_processes(inputs, tmp_path, log, assigner):
    alone, changing = tmp_path / "alone", tmp_path / "changing"
    settings = {"steps": 8, "assigner": assigner, "queue_steps": 3}
    run(command(*inputs, alone, **settings), log)
    stopped_after(command(*inputs, changing, **settings), log, 3)
    run_together(command(*inputs, changing, **settings), log, 2)
    close_runs(alone, changing, 2e-5)


@pytest.mark.slow
def test_torchrun_trains_what_one_process_does(inputs, whole, output):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "pixelclip", *command(*inputs, output, steps=STEPS)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    close_runs(whole, output, 2e-5)


# Photos and masks


def test_photos_without_masks_take_no_part(inputs, tmp_path):
    photos, _ = write_photos(tmp_path, masked=3)
    summary = train(photos, tmp_path / "run", masks=tmp_path / "masks", model=str(inputs[2]),
                    device="cpu", **{**SMALL, "steps": 3})  # fmt: skip
    rows = read_rows(tmp_path / "run")
    assert summary.finished
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_a_batch_without_any_mask_has_no_loss(inputs, tmp_path):
    photos, masks = write_photos(tmp_path, masked=1)
    settings = {**SMALL, "steps": 6, "batch_size": 1}
    train(photos, tmp_path / "run", masks=masks, model=str(inputs[2]), device="cpu", **settings)
    rows = read_rows(tmp_path / "run")
    empty = [row for row in rows if row["loss"] is None]
    assert 0 < len(empty) < 6
    assert {(row["masks"], row["grad_norm"]) for row in empty} == {(0, 0.0)}
    text = (tmp_path / "run/metrics.jsonl").read_text()
    assert "NaN" not in text


def test_two_processes_of_which_one_has_no_mask(inputs, tmp_path, log):
    photos, masks = write_photos(tmp_path, masked=1)
    for name, count in (("alone", 1), ("together", 2)):
        arguments = command(photos, masks, inputs[2], tmp_path / name, steps=6, batch_size=2)
        run_together(arguments, log, count)
    close_runs(tmp_path / "alone", tmp_path / "together", 2e-5)
    masks_of_steps = [row["masks"] for row in read_rows(tmp_path / "alone")]
    assert min(masks_of_steps) == 0 < max(masks_of_steps)


def test_masks_of_other_photos_are_an_error(inputs, tmp_path):
    photos, masks = write_photos(tmp_path)
    for path in masks.iterdir():
        path.rename(masks / f"other-{path.name}")
    settings = {**SMALL, "steps": 30}
    with pytest.raises(DataError, match="do the masks belong to these photos"):
        train(photos, tmp_path / "run", masks=masks, model=str(inputs[2]), device="cpu", **settings)


def test_masks_of_another_size_are_an_error(inputs, tmp_path):
    photos, masks = write_photos(tmp_path)
    names = sorted(masks.iterdir())
    for path, content in zip(names, [p.read_bytes() for p in names[1:] + names[:1]], strict=True):
        path.write_bytes(content)
    with pytest.raises(DataError, match="photos in a row cannot be used for training"):
        train(photos, tmp_path / "run", masks=masks, model=str(inputs[2]), device="cpu", **SMALL)


def test_a_finetune_pattern_that_matches_nothing_is_an_error(inputs, tmp_path):
    photos, masks, weights = inputs
    with pytest.raises(ConfigError, match=r"finetune: 'blocks\.9\.\*' matches no weight"):
        train(photos, tmp_path / "run", masks=masks, model=str(weights), device="cpu",
              **SMALL, finetune="blocks.9.*")  # fmt: skip


# Neighbours


def test_global_random_numbers_are_left_alone(inputs, output, log):
    assert random_numbers_moved(command(*inputs, output), log) == []


def test_global_random_numbers_do_not_matter(inputs, whole, output):
    photos, masks, weights = inputs
    torch.manual_seed(123)
    settings = {**SMALL, "steps": STEPS}
    train(photos, output, masks=masks, model=str(weights), device="cpu", **settings)
    assert_same_run(output, whole)


def test_runs_of_other_precisions_in_one_process(inputs, tmp_path):
    photos, masks, weights = inputs
    for precision in ("float32", "bfloat16", "float32"):
        folder = tmp_path / f"{precision}-{len(list(tmp_path.iterdir()))}"
        train(photos, folder, masks=masks, model=str(weights), device="cpu",
              **SMALL, precision=precision)  # fmt: skip
        load_backbone(str(folder), device="cpu")


def test_summary_as_json(inputs, output, log):
    code, text = run([*command(*inputs, output), "--json", "--quiet"], log)
    record = json.loads(text)
    assert (code, record["steps"], record["finished"]) == (0, 2, True)
    assert record["output"] == str(output)


def test_no_photos_is_one_line(inputs, output, tmp_path, log):
    (tmp_path / "none").mkdir()
    with pytest.raises(PixelClipError):
        train(tmp_path / "none", output, masks=inputs[1], model=str(inputs[2]), device="cpu")
    assert not output.exists()
