"""`pixelclip eval --masks`: processes, resumed runs, where masks come from, what is written."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from pixelclip import cli
from pixelclip.backbones import load_backbone, save_backbone
from pixelclip.backbones.means import Means
from pixelclip.config import SegmentConfig
from pixelclip.errors import ConfigError, DataError
from pixelclip.evaljob import EvalJob, run_eval_job
from pixelclip.evaluation.datasets import load_folder
from pixelclip.evaluation.maskclass import classify_masks
from pixelclip.evaluation.maskclass_pieces import NamedMasks, NamedPiece, read_named, write_named
from pixelclip.maskeval import MaskQuestion, run_mask_eval
from pixelclip.masks.make import make_masks
from pixelclip.segmenter import Segmenter
from tests.tiny import photo, tiny_vit

SETTINGS = {"templates": "name", "short_side": 64}
SPEC = """
title = "of the test"
classes = ["cat", "dog", "sky"]
expected = {count}
[photos]
at = ["images/{below}{{}}.png"]
get = "x"
[labels]
at = ["labels/{below}{{}}.png"]
get = "x"
[values]
values = [0, 1, 2]
ignored = [255]
"""
FILES = {"masks.json", "masks.csv", "masks-classes.csv", "masks.md"}


def make_set(folder, count, seed=0):
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    (folder / "classes.txt").write_text("cat\ndog\nsky\n")
    draw = np.random.default_rng(seed)
    for index in range(count):
        height, width = (40, 50) if index % 3 else (50, 40)
        photo(width, height, seed + index).save(folder / f"images/{index:02d}.png")
        labels = np.kron(draw.integers(0, 3, (height // 10, width // 10)), np.ones((10, 10)))
        labels = labels.astype(np.uint8)
        labels[:5] = 255
        Image.fromarray(labels).save(folder / f"labels/{index:02d}.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_backbone(tiny_vit(), tmp_path_factory.mktemp("model")).parent)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """35 photos: three pieces; one of them is broken."""
    folder = make_set(tmp_path_factory.mktemp("sets") / "first", 35)
    (folder / "images/33.png").write_bytes(b"broken")
    return folder


def evaluate(model, *data, masks="truth", variants=(), mask_settings=None, **options):
    options = {"settings": SETTINGS, "quiet": True, "workers": 1} | options
    job = EvalJob(Means(model, device="cpu"), data=data, **options)
    return run_mask_eval(job, MaskQuestion(masks, mask_settings or {}, variants))


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """The files of one process that was not disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert evaluate(model, data, output=folder) == 1  # one photo is broken
    return folder


def written(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def test_two_processes_give_the_same_bytes(model, data, whole, tmp_path):
    assert evaluate(model, data, output=tmp_path, workers=2) == 1
    assert written(tmp_path) == written(whole)


def test_a_killed_run_goes_on_and_gives_the_same_bytes(model, data, whole, tmp_path):
    output = tmp_path / "out"
    command = [
        sys.executable, "-m", "pixelclip", "eval", "--data", str(data), "--masks", "truth",
        "--model", model, "-o", str(output), "--templates", "name", "--short-side", "64",
        "--device", "cpu", "--workers", "1", "-q",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    deadline = time.monotonic() + 300
    while not list(output.glob("pieces/*/*.npz")) and time.monotonic() < deadline:
        if process.poll() is not None:
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in output.glob("pieces/*/0000[01]-*.npz")}
    assert done  # the third piece has a broken photo, which is tried again
    evaluate(model, data, output=output)
    assert written(output) == written(whole)
    assert len(list(output.glob("pieces/*/*.npz"))) == 9
    assert {p: p.stat().st_mtime_ns for p in done} == done  # kept, not done again


def test_the_figures_are_those_of_classify_masks(model, data, whole):
    dataset = load_folder(data)
    segmenter = Segmenter(
        load_backbone(model, device="cpu"), dataset.classes, config=SegmentConfig(**SETTINGS)
    )
    for stored in json.loads((whole / "masks.json").read_text())["results"]:
        report = classify_masks(segmenter, dataset, variant=stored["variant"])
        assert stored["per_class"] == report.per_class
        for name in ("num_masks", "left_out", "accuracy", "mean_accuracy", "miou", "ap", "masks"):
            assert stored[name] == getattr(report, name), name


def test_broken_photos_are_listed(whole):
    for report in json.loads((whole / "masks.json").read_text())["results"]:
        assert report["photos"] == 34
        assert len(report["failed"]) == 1
        assert "33.png" in report["failed"][0]


def test_table_json_and_csv_agree(model, data, tmp_path, capsys):
    other, output = make_set(tmp_path / "second", 2, seed=50), tmp_path / "out"
    evaluate(model, data, other, rivals=("superpixels",), output=output, quiet=False,
             json_file=tmp_path / "figures.json")  # fmt: skip
    document = json.loads((output / "masks.json").read_text())
    assert document == json.loads((tmp_path / "figures.json").read_text())
    rows = document["table"]["rows"]
    assert [row["name"] for row in rows] == [
        "tiny-vit: pooled", "tiny-vit: crop", "tiny-vit: masked-crop",
        "tiny-vit, superpixels: pooled",
    ]  # fmt: skip
    assert document["table"]["sets"] == ["first", "second"]
    lines = list(csv.DictReader((output / "masks.csv").read_text().splitlines()))
    assert len(lines) == 8
    for line, report in zip(lines, document["results"], strict=True):
        assert (line["dataset"], line["variant"]) == (report["dataset"], report["variant"])
        assert float(line["ap"]) == report["ap"]
    for row in rows:
        for figure, mean in row["mean"].items():
            values = [row["figures"][name][figure] for name in ("first", "second")]
            assert mean == pytest.approx(sum(values) / 2, abs=1e-3)
    classes = list(csv.DictReader((output / "masks-classes.csv").read_text().splitlines()))
    assert len(classes) == 8 * 3
    per_class = document["results"][0]["per_class"]
    assert float(classes[1]["accuracy"]) == per_class["dog"]["accuracy"]
    page = (output / "masks.md").read_text()
    first = rows[0]["figures"]["first"]
    cell = f"{first['accuracy']:.1f} / {first['miou']:.1f} / {first['ap']:.1f}"
    assert f"| tiny-vit: pooled | {cell} |" in page
    shown = capsys.readouterr()
    assert "tiny-vit: masked-crop" in shown.out
    assert "33.png" in shown.err


def pieces_done(output, change):
    before = {p: p.stat().st_mtime_ns for p in output.glob("pieces/*/*.npz")}
    change()
    after = {p: p.stat().st_mtime_ns for p in output.glob("pieces/*/*.npz")}
    return sorted(p.name for p in after if before.get(p) != after[p])


def test_pieces_of_other_photos_masks_or_settings_are_not_used(model, tmp_path):
    data, output = make_set(tmp_path / "data", 20), tmp_path / "out"
    masks = tmp_path / "maps"
    masks.mkdir()
    for path in (data / "labels").iterdir():
        (masks / path.name).write_bytes(path.read_bytes())

    def again(**options):
        kind = {"masks": str(masks), "variants": ("pooled",)} | options
        return lambda: evaluate(model, data, output=output, **kind)

    both = ["00000-pooled.npz", "00001-pooled.npz"]
    assert pieces_done(output, again()) == both
    assert pieces_done(output, again()) == []
    crops = ("crop", "pooled")
    assert pieces_done(output, again(variants=crops)) == ["00000-crop.npz", "00001-crop.npz"]
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(data / "labels/17.png")
    assert pieces_done(output, again()) == both[1:]
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(masks / "17.png")
    assert pieces_done(output, again()) == both
    assert pieces_done(output, again(settings=SETTINGS | {"short_side": 80})) == both
    assert pieces_done(output, again(masks="superpixels")) == both
    changed = again(masks="superpixels", mask_settings={"threshold": "0.5"})
    assert pieces_done(output, changed) == both
    report = json.loads((output / "masks.json").read_text())["results"][0]
    assert report["settings"]["masks"]["threshold"] == 0.5


def results(folder):
    return json.loads((folder / "masks.json").read_text())["results"]


def test_masks_made_before_give_what_their_source_gives(model, tmp_path):
    one, two = make_set(tmp_path / "one", 3), make_set(tmp_path / "two", 3, seed=9)
    for data in (one, two):
        make_masks(data / "images", tmp_path / "masks" / data.name, source="superpixels")
    kind = {"variants": ("pooled",)}
    evaluate(model, one, two, masks="superpixels", output=tmp_path / "made", **kind)
    evaluate(model, one, two, masks=str(tmp_path / "masks"), output=tmp_path / "read", **kind)
    for made, read in zip(results(tmp_path / "made"), results(tmp_path / "read"), strict=True):
        assert made["per_class"] == read["per_class"]
        assert made["masks"] == "superpixels"
        assert read["masks"] == str(tmp_path / "masks" / read["dataset"])
    (tmp_path / "three/images").mkdir(parents=True)
    for part in ("labels", "classes.txt"):
        (one / part).rename(tmp_path / "three" / part)
    (one / "images/01.png").rename(tmp_path / "three/images/other.png")
    (tmp_path / "three/labels/01.png").rename(tmp_path / "three/labels/other.png")
    with pytest.raises(DataError, match=r"three: none of the photos has masks in .*; names must"):
        evaluate(model, tmp_path / "three", masks=str(tmp_path / "masks/one"))


def test_fewer_photos_are_evenly_spaced_and_said(model, data, tmp_path):
    evaluate(model, data, photos=3, variants=("pooled",), output=tmp_path)
    (report,) = results(tmp_path)
    assert report["photos"] == 3
    assert "3 of 35 photos, evenly spaced" in report["departures"]
    path = tmp_path / "figures.json"
    job = EvalJob(
        Means(model, device="cpu"), data=(data,), photos=2, json_file=path, settings=SETTINGS,
        quiet=True, workers=1,
    )  # fmt: skip
    assert run_eval_job(job) == 0
    report = json.loads(path.read_text())
    assert report["photos"] == 2
    assert "2 of 35 photos, evenly spaced" in report["departures"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": "superpixel"}, "no masks at superpixel; --masks takes truth, superpixels, dino"),
        ({"masks": "superpixels", "mask_settings": {"size": "3"}}, "source superpixels: .*size"),
        ({"mask_settings": {"threshold": "3"}}, "--mask-set is for sources"),
        ({"variants": ("box",)}, "unknown variant 'box'; available: pooled, crop, masked-crop"),
        ({"rivals": ("naclip",), "variants": ("crop",)}, "--rival is about dense features"),
        ({"photos": 0}, "--photos 0: at least 1"),
    ],
)
def test_what_cannot_work_is_said_at_once(model, data, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(model, data, **options)


def test_results_are_not_written_among_the_masks(model, data):
    with pytest.raises(ConfigError, match="lies among the masks of --masks; choose"):
        evaluate(model, data, masks=str(data / "labels"), output=data / "labels/out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "crop"], "--mask-set and --variant go with --masks"),
        (["--masks", "mini", "--mask-set", "abc"], "--mask-set abc: write name=value"),
        (["--masks", "nowhere"], "no masks at nowhere; --masks takes truth"),
    ],
)
def test_the_command_ends_with_one_line_and_2(monkeypatch, capsys, data, arguments, message):
    monkeypatch.setattr(sys, "argv", ["pixelclip", "eval", "--data", str(data), *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pixelclip: error: {message}")


def test_a_piece_is_read_back_only_whole(tmp_path):
    path = tmp_path / "0.npz"
    named = NamedMasks(
        truth=np.array([0, 847]),
        scores=np.random.default_rng(0).random((2, 847), dtype=np.float32),
        found=np.array([3, 847]),
        matrix=np.arange(847 * 848).reshape(847, 848) % 7 // 6,
    )
    write_named(path, "stamp", NamedPiece(named, ["", "broken \N{SNOWMAN}"]))
    found = read_named(path, "stamp", 847, 2)
    for before, after in zip(named, found.named, strict=True):
        np.testing.assert_array_equal(before, after)
    assert found.errors == ["", "broken \N{SNOWMAN}"]
    assert read_named(path, "other", 847, 2) is None
    assert read_named(path, "stamp", 846, 2) is None
    assert read_named(path, "stamp", 847, 3) is None
    content = path.read_bytes()
    for size in range(0, len(content), 9973):
        path.write_bytes(content[:size])
        assert read_named(path, "stamp", 847, 2) is None


def test_templates_of_single_classes_name_no_masks(model, data, tmp_path):
    lists = {"format": "pixelclip-templates", "default": ["a {}"], "classes": {"cat": ["the {}"]}}
    (tmp_path / "own.json").write_text(json.dumps(lists))
    settings = SETTINGS | {"templates": str(tmp_path / "own.json")}
    with pytest.raises(ConfigError, match="masks cannot be named with templates of single classes"):
        evaluate(model, data, settings=settings, photos=1)


def test_sets_that_share_photos_find_the_masks_each_by_its_own_names(model, tmp_path):
    root = tmp_path / "root"
    make_set(root, 1)
    for part in ("images", "labels"):
        (root / part / "deep").mkdir()
        shutil.copy(root / part / "00.png", root / part / "deep/01.png")
    for name, below, count in (("whole", "", 2), ("deep", "deep/", 1)):
        (tmp_path / f"{name}.toml").write_text(SPEC.format(below=below, count=count))
        shutil.copytree(root / "labels" / below, tmp_path / "masks" / name)
    assert evaluate(
        model, datasets=(str(tmp_path / "whole.toml"), str(tmp_path / "deep.toml")), root=root,
        masks=str(tmp_path / "masks"), variants=("pooled",), json_file=tmp_path / "figures.json",
    ) == 0  # fmt: skip
    reports = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert [report["photos"] for report in reports] == [2, 1]
