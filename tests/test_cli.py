"""The command line as a user meets it, in a process of its own or in this one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelclip import cli
from pixelclip.backbones import save_backbone
from tests.tiny import photo, tiny_vit


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return str(save_backbone(tiny_vit(), tmp_path_factory.mktemp("run")).parent)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXELCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line here; gives exit code, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pixelclip", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


def one_line(err):
    lines = [line for line in err.splitlines() if line.startswith("pixelclip: error:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_segment_writes_labels_overlay_and_json(run, model, own_folder):
    photo(90, 60).save("a.png")
    code, out, _ = run("segment", "a.png", "-c", "cat, sofa, window", "-m", model, "-o", "out")
    assert code == 0
    assert "1 photo(s) -> out/" in out
    files = sorted(p.name for p in (own_folder / "out").iterdir())
    assert files == ["a.json", "a.labels.png", "a.overlay.png", "pixelclip.manifest.json"]
    labels = np.asarray(Image.open("out/a.labels.png"))
    assert (labels.shape, labels.dtype) == ((60, 90), np.uint8)
    record = json.loads((own_folder / "out/a.json").read_text())
    assert record["classes"] == ["cat", "sofa", "window"]
    assert (record["width"], record["height"]) == (90, 60)
    for area in record["areas"]:
        assert area["pixels"] == (labels == area["index"]).sum()
        assert 0 < area["confidence"] <= 1


def test_many_classes_are_written_with_16_bits(run, model, own_folder):
    photo(40, 30).save("a.png")
    (own_folder / "words.txt").write_text("\n".join(f"thing {i}" for i in range(256)))
    assert run("segment", "a.png", "-c", "words.txt", "-m", model, "--templates", "name")[0] == 0
    with Image.open("pixelclip-out/a.labels.png") as image:
        assert image.mode.startswith("I")


def test_folders_keep_their_shape_in_the_output(run, model, own_folder):
    (own_folder / "photos/trip").mkdir(parents=True)
    photo(40, 30).save("photos/a.jpg")
    photo(40, 30).save("photos/trip/a.jpg")
    assert run("segment", "photos", "-c", "cat, sky", "-m", model, "-q") == (0, "", "")
    assert (own_folder / "pixelclip-out/trip/a.labels.png").is_file()


def test_a_broken_photo_is_reported_at_the_end_and_the_others_are_done(run, model, own_folder):
    (own_folder / "photos").mkdir()
    for name in "abc":
        photo(40, 30).save(f"photos/{name}.png")
    (own_folder / "photos/b.png").write_bytes(b"broken")
    code, out, err = run("segment", "photos", "-c", "cat, sky", "-m", model, "--json")
    assert code == 1
    summary = json.loads(out)
    assert [p["photo"] for p in summary["photos"]] == ["photos/a.png", "photos/c.png"]
    assert summary["failed"][0]["photo"] == "photos/b.png"
    assert "failed: photos/b.png is not a photo" in err


def test_masks_and_scores_on_request(run, model, own_folder):
    photo(40, 30).save("a.png")
    code, *_ = run("segment", "a.png", "-c", "cat, sky", "-m", model, "--masks", "--scores",
                   "--no-overlay")  # fmt: skip
    assert code == 0
    assert not (own_folder / "pixelclip-out/a.overlay.png").exists()
    record = json.loads((own_folder / "pixelclip-out/a.json").read_text())
    assert set(record["rle"]) == set(record["polygons"]) <= {"cat", "sky"}
    with np.load("pixelclip-out/a.scores.npz") as stored:
        labels = np.asarray(Image.open("pixelclip-out/a.labels.png"))
        assert (stored["scores"].argmax(0) == labels).mean() > 0.95  # stored in half precision


def test_a_file_name_that_is_no_text_is_no_reason_to_stop(run, model, own_folder):
    (own_folder / "photos").mkdir()
    photo(40, 30).save("photos/z.png")
    Path("photos/z.png").rename(os.fsdecode(b"photos/n\xe9.png"))
    photo(40, 30).save("photos/z.png")
    code, out, _ = run("segment", "photos", "-c", "cat, sky", "-m", model)
    assert code == 0
    assert "2 photo(s)" in out
    assert len(list((own_folder / "pixelclip-out").iterdir())) == 7  # with the manifest


def test_when_every_photo_fails_each_is_named(run, model, own_folder):
    (own_folder / "photos").mkdir()
    for name in "ab":
        (own_folder / f"photos/{name}.png").write_bytes(b"broken")
    code, out, err = run("segment", "photos", "-c", "cat, sky", "-m", model, "--json")
    assert code == 2
    assert len(json.loads(out)["failed"]) == 2
    assert "no photo could be segmented" in one_line(err)


def test_a_photo_too_large_for_score_maps_stops_nothing_else(run, model, own_folder):
    (own_folder / "photos").mkdir()
    Image.new("RGB", (3000, 2500)).save("photos/large.png")
    photo(40, 30).save("photos/small.png")
    (own_folder / "words.txt").write_text("\n".join(f"thing {i}" for i in range(200)))
    code, _, err = run("segment", "photos", "-c", "words.txt", "-m", model, "--templates",
                         "name", "--scores")  # fmt: skip
    assert code == 1
    assert "exceed 4 GiB" in err
    assert (own_folder / "pixelclip-out/small.scores.npz").is_file()


def test_results_say_which_weights_and_attention_made_them(run, model, own_folder):
    photo(40, 30).save("a.png")
    run("segment", "a.png", "-c", "cat, sky", "-m", model, "--attention", "sclip", "-q")
    settings = json.loads((own_folder / "pixelclip-out/a.json").read_text())["settings"]
    assert settings["attention"] == "sclip"
    assert settings["weights"].endswith("model.safetensors")
    assert settings["short_side"] == 64


def test_an_output_that_cannot_take_a_letter_does_not_end_the_run(model, own_folder):
    photo(40, 30).save("a.png")
    command = [sys.executable, "-m", "pixelclip", "segment", "a.png", "-c", "caf\u00e9, sky",
               "-m", model]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0, done.stderr


def test_background_options_imply_their_mode(run, model, own_folder):
    photo(40, 30).save("a.png")
    run("segment", "a.png", "-c", "cat, sky", "-m", model, "--threshold", "1")
    record = json.loads((own_folder / "pixelclip-out/a.json").read_text())
    assert record["settings"]["background"] == "threshold"
    assert record["no_class_pixels"] == 40 * 30
    run("segment", "a.png", "-c", "cat", "-m", model, "--background-names", "sky, sea")
    record = json.loads((own_folder / "pixelclip-out/a.json").read_text())
    assert record["settings"]["background_names"] == ["sky", "sea"]


def test_sample_photos_are_segmented_when_none_is_given(run, model, own_folder):
    code, out, _ = run("segment", "-m", model)
    assert code == 0
    assert "6 photo(s)" in out
    assert (own_folder / "pixelclip-out/coffee.overlay.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jpg", "-c", "cat"], "no such photo or folder: none.jpg"),
        (["a.png"], "no class names"),
        (["a.png", "-c", ""], "no class names"),
        (["a.png", "-c", "cat,,dog"], "class 2 of 3 is empty"),
        (["a.png", "-c", "cat, cat"], "'cat' occurs twice"),
        (["broken.jpg", "-c", "cat"], "is not a photo in a known format"),
        (["cut.jpg", "-c", "cat"], "cut.jpg cannot be read"),
        (["a.png", "-c", "cat", "--max-pixels", "10"], "too large"),
        (["empty", "-c", "cat"], "no photos in empty"),
        (["a.png", "-c", "cat", "-m", "VIT-B16"], "nearest: ViT-B-16"),
        (["a.png", "-c", "cat", "-m", "RN50/openai"], "its image tower is a ResNet"),
        (["a.png", "-c", "cat", "-m", "ViT-B-16"], "is an architecture: name its weights"),
        (["a.png", "-c", "cat", "-m", "none.safetensors"], "no such weight file"),
        (["a.png", "-c", "cat", "-m", "empty"], "is not a run directory"),
        (["a.png", "-c", "cat", "-o", "a.png"], "cannot write"),
        (["a.png", "-c", "cat", "--preset", "mine"], "preset: input should be"),
        (["a.png", "-c", "cat", "--short-side", "abc"], "--short-side"),
        (["a.png", "-c", "cat", "--device", "tpu"], "unknown device 'tpu'"),
        (["a.png", "-c", "cat", "--attention", "full"], "unknown attention 'full'"),
        (["a.png", "-c", "cat", "--templates", "none.txt"], "cannot read the template set"),
        (["a.png", "-c", "cat", "--background", "names"], "needs names: --background-names"),
        (["a.png", "-c", "cat", "--templates", "a {} }"], "needs exactly one {}"),
        (["a.png", "-c", "caf\udce9"], "is not plain text"),
        (["a" * 300, "-c", "cat"], "File name too long"),
        (["a.png", "-c", "cat", "-m", ""], "no model name"),
        (["a.png", "-c", "cat", "--threshold", "2"], "threshold: input should be"),
        (["a.png", "-c", "cat", "--threshold", ".2", "--background-names", "sky"], "give one"),
        (["a.png", "-c", "cat", "--background", "none", "--threshold", ".2"], "give one"),
        (["a.png", "-c", "cat", "--bogus"], "No such option: --bogus"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, model, own_folder, arguments, message):
    photo(40, 30).save("a.png")
    (own_folder / "broken.jpg").write_bytes(b"not a photo")
    photo(300, 200).save("cut.jpg")
    (own_folder / "cut.jpg").write_bytes((own_folder / "cut.jpg").read_bytes()[:2000])
    (own_folder / "empty").mkdir()
    arguments = arguments if "-m" in arguments else [*arguments, "-m", model]
    code, out, err = run("segment", *arguments)
    assert message in one_line(err)
    assert (code, out) == (2, "")


def test_eval_prints_and_writes_the_figures(run, model, own_folder):
    for folder in ("images", "labels"):
        (own_folder / "data" / folder).mkdir(parents=True)
    (own_folder / "data/classes.txt").write_text("cat\nsky\n")
    photo(40, 30).save("data/images/a.jpg")
    Image.fromarray(np.zeros((30, 40), np.uint8)).save("data/labels/a.png")
    code, out, _ = run("eval", "--data", "data", "--model", model, "--json", "figures.json")
    assert code == 0
    report = json.loads((own_folder / "figures.json").read_text())
    assert set(report) >= {"miou", "per_class", "pixel_accuracy", "settings"}
    assert report["per_class"]["sky"] is None
    assert f"mIoU {report['miou']:.1f} over 1 classes" in out


def test_eval_names_what_is_missing(run, model, own_folder):
    (own_folder / "images").mkdir()
    code, _, err = run("eval", "--data", ".", "--model", model)
    assert "has no labels" in one_line(err)
    assert code == 2


def test_models_lists_ours_theirs_and_open_clips(run):
    code, out, _ = run("models", "--json")
    names = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert names["mini"]["cached"]
    assert names["ViT-B-16/openai"]["licence"] == "MIT"
    assert "pixelclip-vit-b16-dino" in names
    assert not any(name.startswith(("RN50", "coca", "EVA")) for name in names)
    assert all(row["parameters"] > 1e6 for row in names.values())


def test_models_that_do_not_exist_are_answered_with_the_nearest(run):
    code, _, err = run("models", "pixelklip")
    assert "nearest: pixelclip" in one_line(err)
    assert code == 2


def test_models_are_plain_lines_for_other_programs(run):
    _, out, _ = run("models", "pixelclip-")
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[0] for line in lines][:1] == ["pixelclip-vit-b16"]
    assert all(len(line) == 4 for line in lines)


def test_help_loads_no_torch():
    script = (
        "import sys; sys.argv = ['pixelclip', 'segment', '--help']\n"
        "from pixelclip.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--classes" in done.stdout


def test_python_dash_m_works():
    command = [sys.executable, "-m", "pixelclip", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.startswith("pixelclip 0.")
