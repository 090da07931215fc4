"""Segmenting a folder: stopped at any moment, taken up again, by any number of workers."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelclip.backbones import save_backbone
from pixelclip.backbones.means import Means
from pixelclip.config import SegmentConfig
from pixelclip.job import SegmentWork, segment_photos
from pixelclip.jobs.work import Piece
from pixelclip.output import Output
from pixelclip.photos import Photo
from pixelclip.workers import cores, threads
from tests.test_cli import model, own_folder, run  # noqa: F401 - fixtures
from tests.tiny import Watched, photo, tiny_vit
from tests.training import run as run_in_process

WORDS = ("-c", "cat, sky, sea")
SIZES = [(40, 30), (64, 48), (30, 40), (40, 30), (90, 20), (40, 30), (64, 48)]
MANIFEST = "pixelclip.manifest.json"


@pytest.fixture
def photos(own_folder):  # noqa: F811
    (own_folder / "photos/deep").mkdir(parents=True)
    for seed, (width, height) in enumerate(SIZES):
        photo(width, height, seed).save(f"photos/{'deep/' if seed % 2 else ''}{seed}.png")
    return own_folder / "photos"


def contents(folder):
    """All files but the manifest, which counts what was done when."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.name != MANIFEST and not path.name.endswith(".part")
    }


def manifest(folder):
    return json.loads((folder / MANIFEST).read_text())


def command(model, out, *more):  # noqa: F811
    return ["segment", "photos", *WORDS, "-m", model, "-o", str(out), *more]


@pytest.mark.parametrize("count", [5, 23, 40])
def test_a_killed_run_is_finished_to_the_same_bytes(run, model, photos, count):  # noqa: F811
    where = (signal.SIGKILL, ".part", count)
    code, _ = run_in_process(command(model, "out"), Path("log"), signal_at=where)
    assert code == -signal.SIGKILL
    kept = {
        path.name: path.stat().st_mtime_ns
        for path in Path("out").rglob("*.json")
        if path.name != MANIFEST
    }
    code, out, _ = run(*command(model, "out", "--json"))
    assert code == 0
    assert json.loads(out)["new"] == len(SIZES) - len(kept)
    run(*command(model, "whole"))
    assert contents(Path("out")) == contents(Path("whole"))
    for path in Path("out").rglob("*.json"):
        assert kept.get(path.name) in (None, path.stat().st_mtime_ns)


def test_workers_make_the_same_bytes_and_outlive_nobody(model, photos):  # noqa: F811
    environment = {**os.environ, "PIXELCLIP_CACHE": str(photos.parent / "cache")}

    def start(out, *more):
        arguments = [sys.executable, "-m", "pixelclip", *command(model, out, "-q", *more)]
        return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE)

    with start("one") as process:
        assert process.wait() == 0
    with start("two", "--workers", "2") as killed:
        while not any(Path("two").rglob("*.labels.png")) and killed.poll() is None:
            time.sleep(0.01)
        killed.kill()
        killed.communicate()  # until the last worker has closed its end
    left = contents(Path("two"))
    time.sleep(0.3)
    assert contents(Path("two")) == left
    with start("two", "--workers", "2") as process:
        assert process.wait() == 0
    assert contents(Path("two")) == contents(Path("one"))


def test_what_is_there_is_kept_and_told(run, model, photos):  # noqa: F811
    code, out, _ = run(*command(model, "out"))
    assert "there already" not in out
    assert (manifest(Path("out"))["new"], manifest(Path("out"))["kept"]) == (7, 0)
    code, again, _ = run(*command(model, "out"))
    assert code == 0
    assert again.splitlines()[:-1] == out.splitlines()[:-1]
    assert "7 of them were there already" in again
    assert manifest(Path("out"))["kept"] == 7


def change_photo(path="photos/0.png"):
    photo(40, 30, 99).save(path)


def empty_a_map():
    Path("out/0.labels.png").write_bytes(b"")  # as after a loss of power


def cut_a_record():
    record = Path("out/0.json")
    record.write_bytes(record.read_bytes()[:50])


@pytest.mark.parametrize("change", [change_photo, empty_a_map, cut_a_record])
def test_what_is_not_whole_or_not_of_this_photo_is_made_again(run, model, photos, change):  # noqa: F811
    run(*command(model, "out"))
    change()
    _, out, _ = run(*command(model, "out", "--json"))
    assert json.loads(out)["new"] == 1
    run(*command(model, "whole"))
    assert contents(Path("out")) == contents(Path("whole"))


@pytest.mark.parametrize(
    "more", [("--short-side", "48"), ("--threshold", "0.5"), ("--masks",), ("--no-overlay",),
             ("-c", "cat, sky, tree"), ("--attention", "sclip")]
)  # fmt: skip
def test_other_words_or_settings_are_another_job(run, model, photos, more):  # noqa: F811
    run(*command(model, "out"))
    _, out, _ = run(*command(model, "out", "--json", *more))
    assert json.loads(out)["new"] == 7


def test_other_weights_under_the_same_name_are_another_job(run, model, photos):  # noqa: F811
    shutil.copytree(model, "mine")
    run(*command("mine", "out"))
    backbone = tiny_vit()
    with_other = next(iter(backbone.visual.parameters()))
    with_other.data += 0.1
    save_backbone(backbone, Path("mine"))
    _, out, _ = run(*command("mine", "out", "--json"))
    assert json.loads(out)["new"] == 7


def test_the_manifest_says_what_failed(run, model, photos):  # noqa: F811
    (photos / "broken.jpg").write_bytes(b"broken")
    for _ in range(2):
        code, _, err = run(*command(model, "out"))
        assert code == 1
        assert "failed: photos/broken.jpg is not a photo" in err
        told = manifest(Path("out"))
        assert told["failed"][0]["photo"] == "photos/broken.jpg"
        assert told["finished"]
        assert told["photos"] == 8


def test_photos_are_read_from_any_place_that_fsspec_knows(run, model, photos):  # noqa: F811
    import fsspec

    (photos / "broken.jpg").write_bytes(b"broken")
    memory = fsspec.filesystem("memory")
    memory.put(str(photos), "/bucket/photos", recursive=True)
    try:
        arguments = [*WORDS, "-m", model, "--no-overlay", "-o"]
        code, _, err = run("segment", "memory://bucket/photos", *arguments, "remote")
        assert code == 1
        assert "memory://" in err
        assert "/tmp" not in err.split("is not a photo")[0]
        run("segment", "photos", *arguments, "local")
        for labels in Path("local").rglob("*.labels.png"):
            remote = Path("remote") / labels.relative_to("local")
            assert np.array_equal(np.asarray(Image.open(labels)), np.asarray(Image.open(remote)))
        assert len(contents(Path("remote"))) == 2 * len(SIZES)
        code, _, err = run("segment", "memory://bucket/none", *arguments, "out")
        assert (code, "no photos in memory://bucket/none" in err) == (2, True)
        code, _, err = run("segment", "nosuch://bucket/none", *arguments, "out")
        assert (code, "nosuch" in err) == (2, True)
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_photo_that_changes_while_it_is_segmented_is_made_again(model, photos):  # noqa: F811
    means = Means(str(model), device="cpu")
    do = SegmentWork(means, SegmentConfig(), (WORDS[1],), Output(Path("out"))).start()
    first, second = (Photo(photos / f"{n}.png", Path(f"{n}")) for n in (0, 4))
    doing = do(Piece(0, (first, second)))
    assert next(doing).photo == first  # both are read by now
    change_photo(second.path)
    assert [outcome.photo for outcome in doing] == [second]
    assert [outcome.is_new for outcome in do(Piece(0, (first, second)))] == [False, True]


def test_a_full_disk_ends_the_job(run, model, photos, monkeypatch):  # noqa: F811
    written = []

    def fill(path, content):
        written.append(path)
        if content.startswith(b"\x89PNG"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", fill)
    code, _, err = run(*command(model, "out"))
    assert (code, len(written)) == (2, 2)  # the manifest and the first map
    assert err.startswith("pixelclip: error: cannot write out/")
    assert err.endswith("No space left on device\n")


def test_names_of_any_bytes_are_read_from_anywhere(run, model, photos):  # noqa: F811
    (photos / "0.png").rename(photos / os.fsdecode(b"\xff\n.png"))
    arguments = (*WORDS, "-m", model, "-o", "out", "--json")
    code, out, _ = run("segment", photos.as_uri(), *arguments)
    assert code == 0
    assert json.loads(out)["new"] == 7


def test_a_pipe_is_no_photo(run, model, photos):  # noqa: F811
    os.mkfifo("pipe.jpg")
    code, _, err = run("segment", "pipe.jpg", *WORDS, "-m", model)
    assert (code, "pipe.jpg is neither a file nor a folder" in err) == (2, True)


def test_words_are_encoded_with_the_threads_of_workers(tmp_path, no_cache):
    seen = []
    means = Watched(str(save_backbone(tiny_vit(), tmp_path / "model")), seen)
    photo(40, 40).save(tmp_path / "photo.png")
    with threads(cores() + 1):
        segment_photos(
            [tmp_path / "photo.png"], classes="cat, dog", means=means, config=SegmentConfig(),
            output=Output(tmp_path / "out", quiet=True),
        )  # fmt: skip
    assert set(seen) == {cores()}
