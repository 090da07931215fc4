"""Making masks of many photos: resumable, the same whatever the number of workers."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from pixelclip.errors import DataError
from pixelclip.images import Photo, find_photos, resized
from pixelclip.masks.generate import generate
from pixelclip.masks.runs import from_labels
from pixelclip.masks.store import MaskStore, shard_path
from pixelclip.masks.superpixels import superpixels


def halves(image, *, threshold=128):
    """A quick source: dark and light. At the top of the module, so that workers find it."""
    return from_labels((image.mean(axis=2) > threshold).astype(np.uint8))


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for index in range(12):
        pixels = generator.integers(0, 256, (8 + index, 10, 3), dtype=np.uint8)
        folder = "deep" if index % 2 else "."
        Image.fromarray(pixels).save(tmp_path / "photos" / folder / f"{index}.png")
    return find_photos([tmp_path / "photos"])


def make(photos, out, **options):
    return generate(
        photos,
        out,
        **{"source": halves, "name": "halves", "settings": {}, "shard_size": 5, "quiet": True}
        | options,
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_photo_gets_its_masks(photos, tmp_path):
    assert make(photos, tmp_path / "out") == []
    store = MaskStore(tmp_path / "out")
    assert sorted(store.photos()) == sorted(f"{photo.stem.as_posix()}.png" for photo in photos)
    for photo in photos:
        image = np.asarray(Image.open(photo.path))
        assert store(photo, image.shape[:2]).to_rle() == halves(image).to_rle()


def test_the_number_and_order_of_photos_and_workers_change_no_byte(photos, tmp_path):
    make(photos, tmp_path / "one")
    make(photos[::-1], tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 4  # the manifest and three shards


def test_finished_shards_are_kept_and_missing_ones_made(photos, tmp_path):
    out = tmp_path / "out"
    make(photos, out)
    whole = contents(out)
    shard_path(out, 1).unlink()
    kept = shard_path(out, 0).stat().st_mtime_ns
    make(photos, out)
    assert contents(out) == whole
    assert shard_path(out, 0).stat().st_mtime_ns == kept


def ended(image, *, end, run):
    """A source that ends the run in the second of three shards: Ctrl-C reaches all processes."""
    if len(image) == 19:
        os.kill(0 if end == signal.SIGINT else run, end)
    return halves(image)


def dying(image):
    os.kill(os.getpid(), signal.SIGKILL)


RUN = """
import os, sys
from functools import partial
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_masks_generate import ended, find_photos, make

if __name__ == "__main__":
    make(find_photos([Path({photos!r})]), Path({out!r}), workers={workers},
         source=partial(ended, end={end}, run=os.getpid()))
"""


@pytest.mark.parametrize(
    ("end", "workers"),
    [(signal.SIGKILL, 1), (signal.SIGKILL, 2), (signal.SIGINT, 1), (signal.SIGINT, 2)],
)
def test_an_ended_run_leaves_whole_files_and_is_taken_up(photos, tmp_path, end, workers):
    out, script = tmp_path / "out", tmp_path / "run.py"
    tests = str(Path(__file__).parent)
    values = {"photos": str(tmp_path / "photos"), "out": str(out), "end": int(end)}
    script.write_text(RUN.format(tests=tests, workers=workers, **values))
    # Waits until the last process that could write to stderr has ended: workers do so, too.
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, start_new_session=True, timeout=60
    )
    assert run.returncode != 0
    assert list(contents(out)) == ["masks.json", "shard-00000.parquet"]
    assert len(MaskStore(out)) == 5
    make(photos, out)
    make(photos, tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_a_worker_that_dies_is_a_clear_error(photos, tmp_path):
    with pytest.raises(DataError, match="a worker process died, perhaps for want of memory"):
        make(photos, tmp_path / "out", source=dying, workers=2)
    assert list(contents(tmp_path / "out")) == ["masks.json"]


def test_broken_photos_are_reported_and_the_others_made(photos, tmp_path):
    photos[3].path.write_bytes(b"no photo")
    missing = Photo(tmp_path / "gone.jpg", Path("gone"))
    failures = make([*photos, missing], tmp_path / "out")
    assert {path: reason.split(str(path))[1] for path, reason in failures} == {
        photos[3].path: " is not a photo in a known format",
        missing.path: "",
    }
    assert len(MaskStore(tmp_path / "out")) == 11
    again = make([*photos, missing], tmp_path / "out")
    assert again == [(path, "failed in an earlier run") for path, _ in failures]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "other"}, r"other source \('halves', now 'other'\)"),
        ({"settings": {"threshold": 3}}, r"other settings \({}, now {'threshold': 3}\)"),
    ],
)
def test_a_store_of_other_settings_is_refused(photos, tmp_path, change, message):
    make(photos, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=message):
        make(photos, tmp_path / "out", **change)
    assert contents(tmp_path / "out") == before


def test_a_store_of_other_photos_is_refused(photos, tmp_path):
    make(photos, tmp_path / "out", settings={"range": (1, 2)})
    make(photos, tmp_path / "out", settings={"range": (1, 2)})  # a tuple becomes a list
    with pytest.raises(DataError, match=r"holds masks with other photos \(12, now 11\); choose"):
        make(photos[1:], tmp_path / "out", settings={"range": (1, 2)})
    renamed = [Photo(Path("renamed.png"), Path("renamed")), *photos[1:]]
    with pytest.raises(DataError, match="other photos_sha256"):
        make(renamed, tmp_path / "out", settings={"range": (1, 2)})


def test_the_manifest_says_how_the_masks_were_made(photos, tmp_path):
    make(photos, tmp_path / "out", source=partial(halves, threshold=9), settings={"threshold": 9})
    manifest = json.loads((tmp_path / "out" / "masks.json").read_text())
    assert manifest["settings"] == {"threshold": 9}
    assert manifest["source"] == "halves"
    assert manifest["photos"] == 12
    assert "scikit-image" in manifest["versions"]


def test_a_damaged_shard_is_an_error_not_a_finished_one(photos, tmp_path):
    make(photos, tmp_path / "out")
    shard_path(tmp_path / "out", 1).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"shard-00001\.parquet is damaged"):
        make(photos, tmp_path / "out")


def test_making_masks_needs_no_torch():
    code = (
        "import pixelclip.masks.generate, pixelclip.masks.superpixels, sys;"
        "print('torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert printed.stdout.strip() == b"False"


@settings(max_examples=20, deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))))
def test_superpixels_cover_every_pixel_once(image):
    masks = superpixels(image)
    pixels = masks.sample(np.arange(image.shape[0]), np.arange(image.shape[1]))
    assert (pixels.sum(axis=0) == 1).all()
    assert masks.to_rle() == superpixels(image).to_rle()


def test_large_photos_are_looked_at_small():
    image = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    image = image.repeat(60, axis=0).repeat(60, axis=1)
    small = superpixels(np.asarray(resized(image, (512, 354))))
    rows, columns = np.arange(540) * 354 // 540, np.arange(780) * 512 // 780
    large = superpixels(image).sample(np.arange(540), np.arange(780))
    assert np.array_equal(large, small.sample(rows, columns))


def test_superpixels_follow_colours_and_leave_no_crumbs():
    image = np.zeros((900, 1300, 3), dtype=np.uint8)
    image[:, 650:] = 200
    image[5, 5] = 255
    masks = superpixels(image)
    assert masks.areas().min() > 0.0009 * 900 * 1300
    left, right = masks.select(np.argsort(masks.areas())[-2:].astype(np.int64)).sample(
        np.arange(900), np.arange(1300)
    )
    if right[0, 0]:
        left, right = right, left
    assert left[:, :610].all()  # the edge between is blurred in the small photo
    assert right[:, 690:].all()
    assert superpixels(image, min_share=0.6).count == 1
