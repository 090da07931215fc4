"""Evaluation as a job: processes, resumed runs, several sets and rivals, what is written."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelclip.backbones import save_backbone
from pixelclip.backbones.means import Means
from pixelclip.errors import ConfigError, DataError
from pixelclip.evaljob import EvalJob, run_eval_job
from pixelclip.evaluation.metrics import count_photo
from pixelclip.evaluation.pieces import (
    PieceCounts,
    read_piece,
    sum_pieces,
    worst_of,
    write_piece,
)
from pixelclip.evaluation.protocols import SUITES
from pixelclip.evaluation.report import row_name
from pixelclip.evaluation.table import Row, absent_line, print_table
from pixelclip.workers import cores, threads
from tests.tiny import Watched, photo, tiny_vit

SETTINGS = {"templates": "name", "short_side": 64}


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
    """37 photos: three pieces."""
    folder = make_set(tmp_path_factory.mktemp("sets") / "first", 37)
    (folder / "images/33.png").write_bytes(b"broken")  # in the last piece, which is done again
    return folder


def job(model, *data, **options):
    options = {"settings": SETTINGS, "quiet": True, "workers": 1} | options
    return EvalJob(Means(model, device="cpu"), data=data, **options)


def figures(path):
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """The figures of one process that was not disturbed."""
    path = tmp_path_factory.mktemp("whole") / "figures.json"
    assert run_eval_job(job(model, data, json_file=path)) == 1  # one photo is broken
    return figures(path)


def test_two_processes_give_the_same_bytes(model, data, whole, tmp_path):
    path = tmp_path / "figures.json"
    assert run_eval_job(job(model, data, json_file=path, workers=2)) == 1
    assert figures(path) == whole


def test_broken_photos_are_listed_and_the_worst_come_first(whole):
    report = json.loads(whole)
    assert report["photos"] == 36
    assert len(report["failed"]) == 1
    assert "33.png" in report["failed"][0]
    mious = [case["miou"] for case in report["worst"]]
    assert mious == sorted(mious)
    assert len(mious) == 8


def test_a_killed_run_goes_on_and_gives_the_same_bytes(model, data, whole, tmp_path):
    output, path = tmp_path / "out", tmp_path / "figures.json"
    command = [
        sys.executable, "-m", "pixelclip", "eval", "--data", str(data), "--model", model, "-o",
        str(output), "--json", str(path), "--templates", "name", "--short-side", "64", "--device",
        "cpu", "--workers", "1", "-q",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    deadline = time.monotonic() + 120
    while not list(output.glob("pieces/*/*.npz")) and time.monotonic() < deadline:
        if process.poll() is not None:
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in output.glob("pieces/*/*.npz")}
    assert done
    run_eval_job(job(model, data, output=output, json_file=path))
    assert figures(path) == whole
    assert len(list(output.glob("pieces/*/*.npz"))) == 3
    kept = {p: t for p, t in done.items() if p.stem != "00002"}
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # not done again


def pieces_done_again(output, change):
    before = {p: p.stat().st_mtime_ns for p in output.glob("pieces/*/*.npz")}
    change()
    after = {p: p.stat().st_mtime_ns for p in output.glob("pieces/*/*.npz")}
    return len([p for p in after if before.get(p) != after[p]])


def test_pieces_of_other_photos_or_settings_are_not_used(model, tmp_path):
    data, output = make_set(tmp_path / "data", 20), tmp_path / "out"
    run_eval_job(job(model, data, output=output))
    again = lambda **options: lambda: run_eval_job(job(model, data, output=output, **options))  # noqa: E731
    assert pieces_done_again(output, again()) == 0
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(data / "labels/17.png")
    assert pieces_done_again(output, again()) == 1
    assert pieces_done_again(output, again(settings=SETTINGS | {"short_side": 80})) == 2
    first = sorted(output.glob("pieces/*/00000.npz"))
    for path in first:
        path.write_bytes(path.read_bytes()[:-200])
    assert pieces_done_again(output, again()) == 1
    (data / "classes.txt").write_text("cat\ndog\nsea\n")
    assert pieces_done_again(output, again()) == 2


def test_several_sets_and_rivals_make_one_table(model, data, tmp_path):
    other = make_set(tmp_path / "second", 2, seed=50)
    output = tmp_path / "out"
    options = {"rivals": ("naclip", "superpixels"), "output": output}
    run_eval_job(job(model, data, other, json_file=tmp_path / "all.json", **options))
    stored = json.loads((tmp_path / "all.json").read_text())
    assert stored == json.loads((output / "results.json").read_text())
    assert stored["table"]["sets"] == ["first", "second"]
    rows = stored["table"]["rows"]
    assert [row["name"] for row in rows] == [
        "tiny-vit", "tiny-vit, naclip", "tiny-vit, superpixels"
    ]  # fmt: skip
    assert rows[0]["mean"] == pytest.approx(sum(rows[0]["miou"].values()) / 2, abs=1e-3)
    assert rows[0]["miou"] != rows[1]["miou"]
    reports = stored["results"]
    assert len({report["settings"]["classes_sha256"] for report in reports}) == 1
    table = list(csv.reader((output / "table.csv").read_text().splitlines()))
    assert table[0] == ["mIoU %", "first", "second", "mean", "not whole"]
    assert float(table[1][1]) == reports[0]["miou"]
    assert "| tiny-vit, naclip |" in (output / "report.md").read_text()


def test_figures_that_are_not_of_all_photos_are_marked_wherever_they_stand(model, tmp_path, capsys):
    data, other = make_set(tmp_path / "first", 2), make_set(tmp_path / "second", 2)
    (data / "images/01.png").write_bytes(b"broken")
    output = tmp_path / "out"
    assert run_eval_job(job(model, data, other, output=output, quiet=False)) == 1
    stored = json.loads((output / "results.json").read_text())
    assert [report["whole"] for report in stored["results"]] == [False, True]
    assert stored["table"]["rows"][0]["not_whole"] == ["first"]
    (line,) = csv.DictReader((output / "table.csv").read_text().splitlines())
    assert line["not whole"] == "first"
    first, second = (f"{report['miou']:.1f}" for report in stored["results"])
    text = (output / "report.md").read_text()
    assert f"| tiny-vit | {first} * | {second} |" in text
    assert "\\* not of all photos" in text
    assert "1 photo could not be used" in text
    said = capsys.readouterr().out
    assert f"{first} *" in said
    assert said.count("* not of all photos") == 1
    assert run_eval_job(job(model, data, quiet=False)) == 1
    assert f"mIoU {first} * over" in capsys.readouterr().out
    assert run_eval_job(job(model, other, quiet=False, output=tmp_path / "whole")) == 0
    assert "*" not in capsys.readouterr().out + (tmp_path / "whole/report.md").read_text()


def test_results_do_not_depend_on_where_the_data_lie(model, tmp_path):
    files = []
    for folder in ("here", "deep/down/there"):
        data, path = make_set(tmp_path / folder / "data", 3), tmp_path / folder / "all.json"
        run_eval_job(job(model, data, json_file=path))
        files.append(path.read_bytes())
    assert files[0] == files[1]
    report = json.loads(files[0])
    assert {case["photo"] for case in report["worst"]} == {"00.png", "01.png", "02.png"}
    assert report["settings"]["torch"] == version("torch")


def test_rows_say_that_masks_or_templates_of_single_classes_decide(model, tmp_path):
    data, output = make_set(tmp_path / "data", 1), tmp_path / "out"
    run_eval_job(job(model, data, output=output, refine="superpixels"))
    document = json.loads((output / "results.json").read_text())
    (row,) = document["table"]["rows"]
    assert row["name"] == "tiny-vit, refined by superpixels"
    (report,) = document["results"]
    report["settings"] |= {"refine": {"masks": "/deep/store", "state": ""}, "fused": True}
    assert row_name(report) == "tiny-vit, refined by store, templates of single classes"


def test_the_files_of_a_set_agree_with_its_figures(model, tmp_path):
    data, output = make_set(tmp_path / "data", 4), tmp_path / "out"
    assert run_eval_job(job(model, data, output=output)) == 0
    (report,) = json.loads((output / "results.json").read_text())["results"]
    folder = output / "data/tiny-vit"
    confusion = list(csv.reader((folder / "confusion.csv").read_text().splitlines()))
    matrix = np.array([[int(cell) for cell in row[1:]] for row in confusion[1:]])
    assert confusion[0][1:] == ["cat", "dog", "sky", "no class"]
    assert report["pixel_accuracy"] == round(100 * np.trace(matrix) / matrix.sum(), 3)
    assert list(report["per_class_pixels"].values()) == matrix.sum(axis=1).tolist()
    classes = list(csv.DictReader((folder / "classes.csv").read_text().splitlines()))
    assert [float(row["iou"]) for row in classes] == list(report["per_class"].values())
    ious = np.diagonal(matrix) / (matrix.sum(1) + matrix[:, :3].sum(0) - np.diagonal(matrix))
    assert [float(row["iou"]) for row in classes] == np.round(100 * ious, 3).tolist()
    with Image.open(folder / "worst.png") as picture:
        assert picture.width > 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to evaluate on"),
        ({"datasets": ("voc20",)}, "need --root"),
        ({"datasets": ("voc20",), "root": Path(), "engine": "ray"}, "--engine ray needs -o"),
        ({"suite": "nine"}, "unknown --suite 'nine'; available: paper, eight"),
    ],
)
def test_what_cannot_work_is_said_at_once(model, options, message):
    with pytest.raises(ConfigError, match=message):
        run_eval_job(job(model, **options))


def test_a_rival_is_refused_before_the_work(model, data, tmp_path):
    with pytest.raises(ConfigError, match="unknown rival 'nclip'"):
        run_eval_job(job(model, data, rivals=("nclip",), output=tmp_path / "out"))
    assert not list(tmp_path.glob("out/pieces/*"))


def test_a_suite_names_what_is_missing_and_runs_the_rest(model, tmp_path, capsys):
    root = tmp_path / "root"
    folder = root / "cityscapes"
    photos, labels = folder / "leftImg8bit/val/ulm", folder / "gtFine/val/ulm"
    photos.mkdir(parents=True)
    labels.mkdir(parents=True)
    photo(64, 32).save(photos / "ulm_000000_000019_leftImg8bit.png")
    Image.fromarray(np.full((32, 64), 7, np.uint8)).save(
        labels / "ulm_000000_000019_gtFine_labelIds.png"
    )
    path = tmp_path / "all.json"
    code = run_eval_job(job(model, suite="paper", root=root, json_file=path, settings={}))
    assert code == 1
    stored = json.loads(path.read_text())
    assert stored["table"]["sets"] == ["coco-stuff", "ade150", "context59", "cityscapes", "voc20"]
    assert len(stored["missing"]) == 4
    ours, *theirs = stored["table"]["rows"]
    assert ours["miou"]["voc20"] is None
    assert ours["mean"] is None
    assert {row["name"]: row["miou"]["cityscapes"] for row in theirs}["SCLIP ViT-B/16"] is None
    (report,) = stored["results"]
    assert report["protocol"] == "authors"
    assert "1 photos were found; the set has 500" in report["departures"]
    assert "not evaluated: voc20" in capsys.readouterr().err


def test_a_suite_without_any_set_is_an_error_that_names_them_all(model, tmp_path, capsys):
    with pytest.raises(DataError, match="none of the 8 data sets is there"):
        run_eval_job(job(model, suite="eight", root=tmp_path))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8
    for line, name in zip(lines, SUITES["eight"].sets, strict=True):
        assert line.startswith(f"pixelclip: not evaluated: {name}")


def piece_of(mious, first):
    """A piece of photos with these mIoUs, whose label maps say which they are."""
    labels = {number: np.full((2, 3), first + number, np.uint8) for number in worst_of(mious)}
    truth = np.zeros((2, 3), np.int64)
    return PieceCounts(count_photo(truth, truth, 3), mious, [""] * len(mious), labels)


def test_of_all_pieces_the_label_maps_of_the_worst_photos_are_kept():
    mious = np.random.default_rng(0).integers(0, 9, 40) / 9  # with equal ones
    mious[3] = np.nan
    total = sum_pieces(piece_of(mious[at : at + 16], at) for at in (0, 16, 32))
    assert list(total.drawn) == worst_of(mious)
    assert [int(labels[0, 0]) for labels in total.drawn.values()] == worst_of(mious)
    assert total.counts.confusion.sum() == 3 * 6


def test_a_printed_table_keeps_its_figures_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    rows = [Row("model " * 9, "", (12.25,) * 9)]
    report = {"photos": 5, "classes_present": 2, "per_class": {"a": 1.0, "b": 2.0, "c": None}}
    sets = [f"a-set-{number}" for number in range(9)]
    print_table(rows, sets, [{"dataset": name, **report} for name in sets])
    said = capsys.readouterr().out
    assert any(line.count("12.2") == 10 for line in said.splitlines())  # the mean, too
    assert "a-set-3 5 photos, 2 of 3 classes" in said


def test_classes_that_do_not_occur_are_counted_not_listed(model, tmp_path):
    data = make_set(tmp_path / "data", 2)
    names = [f"thing {number}" for number in range(5)]
    (data / "classes.txt").write_text("\n".join(["cat", "dog", "sky", *names]))
    run_eval_job(job(model, data, output=tmp_path / "out"))
    text = (tmp_path / "out/report.md").read_text()
    assert "| sky |" in text
    assert "| thing" not in text
    listed = ", ".join(names)
    assert f"5 classes do not occur: {listed}." in text
    assert "| class | IoU % | boundary IoU % | pixels |" in text
    assert "mean |" not in text.split("##")[0]  # of one set


def test_of_many_classes_that_do_not_occur_ten_are_named():
    assert absent_line(["cat"]) == "1 class does not occur: cat."
    names = [f"c{number}" for number in range(12)]
    said = f"12 classes do not occur: {', '.join(names[:10])}, and 2 more."
    assert absent_line(names) == said


def test_a_piece_is_read_back_only_whole(tmp_path):
    path = tmp_path / "0.npz"
    labels = np.random.default_rng(0).integers(0, 847, (30, 30), dtype=np.uint16)
    counts = count_photo(labels, labels, 847)
    mious, errors = np.array([1.0, np.nan]), ["", "broken \N{SNOWMAN}"]
    piece = PieceCounts(counts, mious, errors, {0: labels})
    write_piece(path, "stamp", piece)
    found = read_piece(path, "stamp", 847, 2)
    np.testing.assert_array_equal(found.counts.confusion, counts.confusion)
    np.testing.assert_array_equal(found.counts.boundary, counts.boundary)
    assert found.errors == piece.errors
    np.testing.assert_array_equal(found.drawn[0], labels)
    assert read_piece(path, "other", 847, 2) is None
    assert read_piece(path, "stamp", 846, 2) is None
    assert read_piece(path, "stamp", 847, 3) is None
    content = path.read_bytes()
    for size in range(0, len(content), 97):
        path.write_bytes(content[:size])
        assert read_piece(path, "stamp", 847, 2) is None


def test_words_are_encoded_with_the_threads_of_workers(model, data, no_cache):
    seen = []
    with threads(cores() + 1):
        run_eval_job(replace(job(model, data, photos=2), means=Watched(model, seen)))
    assert set(seen) == {cores()}


def test_a_piece_with_any_byte_changed_is_read_whole_or_not_at_all(tmp_path):
    path, draw = tmp_path / "0.npz", np.random.default_rng(0)
    truth, labels = draw.integers(0, 5, (2, 20, 30))
    piece = PieceCounts(count_photo(truth, labels, 5), np.array([0.5]), [""], {0: labels})
    write_piece(path, "stamp", piece)
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
        found = read_piece(path, "stamp", 5, 1)
        if found is not None:
            np.testing.assert_array_equal(found.counts.confusion, piece.counts.confusion)
