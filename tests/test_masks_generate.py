"""Making masks of many photos: resumable, the same whatever the number of workers."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pixelclip.errors import DataError
from pixelclip.images import read_photo
from pixelclip.jobs.run import Crew
from pixelclip.masks.generate import MadeBy, generate
from pixelclip.masks.names import photo_name
from pixelclip.masks.rounds import claim
from pixelclip.masks.runs import from_labels
from pixelclip.masks.store import MaskStore, make_row, shard_failures, shard_path
from pixelclip.photos import Photo, find_photos


def halves(image, *, threshold=128):
    """Dark and light. At the top of the module, so that workers find it."""
    return from_labels((image.mean(axis=2) > threshold).astype(np.uint8))


@dataclass(frozen=True)
class Quick:
    """A maker of masks by a function of the pixels."""

    function: Callable = halves

    def start(self):
        return lambda photos: map(self._make, photos)

    def _make(self, photo):
        try:
            image = np.asarray(read_photo(photo.path))
        except DataError as error:
            return str(error)
        return make_row(photo_name(photo), self.function(image))


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for index in range(12):
        pixels = generator.integers(0, 256, (8 + index, 10, 3), dtype=np.uint8)
        folder = "deep" if index % 2 else "."
        Image.fromarray(pixels).save(tmp_path / "photos" / folder / f"{index}.png")
    return find_photos([tmp_path / "photos"])


def make(photos, out, *, function=halves, **options):
    made_by = MadeBy(Quick(function), options.pop("source", "halves"), options.pop("settings", {}))
    crew = Crew(workers=options.pop("workers", 1))
    return generate(photos, out, made_by, crew=crew, shard_size=5, quiet=True, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_photo_gets_its_masks(photos, tmp_path):
    assert make(photos, tmp_path / "out") == ([], 12, 0)
    store = MaskStore(tmp_path / "out")
    assert sorted(store.photos()) == sorted(f"{photo.stem.as_posix()}.png" for photo in photos)
    for photo in photos:
        image = np.asarray(Image.open(photo.path))
        assert store(photo, image.shape[:2]).to_rle() == halves(image).to_rle()


def test_the_number_and_order_of_photos_and_workers_change_no_byte(photos, tmp_path):
    make(photos, tmp_path / "one")
    make(photos[::-1], tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 5  # manifest, names and three shards


def test_finished_shards_are_kept_and_missing_ones_made(photos, tmp_path):
    out = tmp_path / "out"
    make(photos, out)
    whole = contents(out)
    shard_path(out, 1).unlink()
    kept = shard_path(out, 0).stat().st_mtime_ns
    assert make(photos, out) == ([], 5, 7)
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
         function=partial(ended, end={end}, run=os.getpid()))
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
    left = contents(out)
    assert "masks.json" in left
    assert "shard-00001.parquet" not in left
    assert len(MaskStore(out)) % 5 == 0
    make(photos, out)
    make(photos, tmp_path / "undisturbed")
    whole = contents(tmp_path / "undisturbed")
    assert contents(out) == whole
    assert left.items() <= whole.items()


def test_a_worker_that_dies_is_a_clear_error(photos, tmp_path):
    with pytest.raises(DataError, match="a worker process died, perhaps for want of memory"):
        make(photos, tmp_path / "out", function=dying, workers=2)
    assert list(contents(tmp_path / "out")) == ["masks.json", "photos-00000.parquet"]


def test_broken_photos_are_reported_and_the_others_made(photos, tmp_path):
    photos[3].path.write_bytes(b"no photo")
    missing = Photo(tmp_path / "gone.jpg", Path("gone"))
    made = make([*photos, missing], tmp_path / "out")
    assert (made.new, made.kept) == (11, 0)
    assert [(photo, reason.split(str(photo.path))[1]) for photo, reason in made.failed] == [
        (photos[3], " is not a photo in a known format"),
        (missing, ""),
    ]
    assert len(MaskStore(tmp_path / "out")) == 11
    again = make([*photos, missing], tmp_path / "out")
    assert again == (made.failed, 0, 11)


def test_a_photo_that_failed_is_tried_again_on_request(photos, tmp_path):
    out, good = tmp_path / "out", photos[3].path.read_bytes()
    photos[3].path.write_bytes(b"no photo")
    make(photos, out)
    photos[3].path.write_bytes(good)
    assert make(photos, out).failed
    assert make(photos, out, retry=True) == ([], 1, 11)  # the others of the shard are kept
    make(photos, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "other"}, r"other source \('halves', now 'other'\)"),
        ({"settings": {"threshold": 3}}, r"other threshold \(None, now 3\)"),
    ],
)
def test_a_store_of_other_settings_is_refused(photos, tmp_path, change, message):
    make(photos, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=message):
        make(photos, tmp_path / "out", **change)
    assert contents(tmp_path / "out") == before


def test_a_command_that_came_to_nothing_binds_nobody(photos, tmp_path):
    with pytest.raises(ZeroDivisionError):
        make(photos, tmp_path / "out", function=lambda image: 1 / 0)
    assert make(photos[2:], tmp_path / "out", source="other").new == 10
    make(photos[2:], tmp_path / "whole", source="other")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_new_photos_are_a_further_round(photos, tmp_path):
    out = tmp_path / "out"
    make(photos[:7], out, settings={"range": (1, 2)})  # a tuple becomes a list
    first = contents(out)
    assert make(photos, out, settings={"range": (1, 2)}) == ([], 5, 7)
    assert {name: first[name] for name in first if name != "masks.json"}.items() <= contents(
        out
    ).items()
    assert sorted(MaskStore(out).photos()) == sorted(map(photo_name, photos))
    rounds = json.loads((out / "masks.json").read_text())["rounds"]
    assert [(one["photos"], one["first_shard"]) for one in rounds] == [(7, 0), (5, 2)]
    assert make(photos[4:], out, settings={"range": (1, 2)}) == ([], 0, 8)
    shard_path(out, 1).unlink()  # of the first round
    assert make(photos, out, settings={"range": (1, 2)}) == ([], 2, 10)


def test_an_unfinished_store_goes_on_though_photos_came_and_went(photos, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    make(photos[2:], whole)
    make(photos[2:], out)
    shard_path(out, 1).unlink()
    gone, others = photos[8], [photo for photo in photos if photo != photos[8]]
    assert make(others, out) == ([], 6, 5)  # four of the lost shard and two that came
    assert sorted(MaskStore(out).photos()) == sorted(map(photo_name, others))
    assert make(others, out) == ([], 0, 11)
    assert make(photos, out) == ([], 1, 11)  # it is back
    assert shard_path(out, 1).read_bytes() == shard_path(whole, 1).read_bytes()
    assert len(MaskStore(out)) == 12
    assert photo_name(gone) in MaskStore(out).photos()


def test_masks_of_photos_that_are_gone_outlive_a_retry(photos, tmp_path):
    good = photos[3].path.read_bytes()
    photos[3].path.write_bytes(b"no photo")
    make(photos, tmp_path / "out")
    photos[3].path.write_bytes(good)
    assert make(photos[3:], tmp_path / "out", retry=True) == ([], 1, 8)
    assert len(MaskStore(tmp_path / "out")) == 12


def test_jobs_that_begin_at_once_have_shards_of_their_own(photos, tmp_path):
    def begin(photo):
        return claim(tmp_path, [photo], source="halves", settings={})

    with ThreadPoolExecutor(len(photos)) as pool:
        pieces = [piece for begun in pool.map(begin, photos) for piece in begun]
    assert sorted(piece.number for piece in pieces) == list(range(12))
    assert {piece.photos for piece in pieces} == {(photo,) for photo in photos}


@pytest.mark.parametrize("content", [b"", b"PAR1", "cut", "other"])
def test_damaged_names_are_refused(photos, tmp_path, content):
    make(photos, tmp_path / "out")
    path = tmp_path / "out/photos-00000.parquet"
    if content == "other":
        pq.write_table(pa.table({"photo": ["0.png"] * 12}), path)
    else:
        path.write_bytes(path.read_bytes()[:-9] if content == "cut" else content)
    with pytest.raises(DataError, match=r"photos-00000\.parquet is damaged"):
        make(photos, tmp_path / "out")


@pytest.mark.parametrize("wrong", [{"photos": 2**80}, {"shard_size": 0}, {"photos": 2**29},
                                   {"first_shard": 1}])  # fmt: skip
def test_a_hostile_manifest_is_refused(photos, tmp_path, wrong):
    make(photos, tmp_path / "out")
    path = tmp_path / "out/masks.json"
    manifest = json.loads(path.read_text())
    manifest["rounds"][0] |= {"shard_size": 1, **wrong}
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="does not say which photos it is of"):
        make(photos, tmp_path / "out")


def test_failures_are_kept_with_their_reasons(photos, tmp_path):
    photos[0].path.write_bytes(b"")
    make(photos, tmp_path / "out")
    [(name, why)] = shard_failures(shard_path(tmp_path / "out", 0))
    assert name == photo_name(photos[0])
    assert str(photos[0].path) in why


def test_the_manifest_says_how_the_masks_were_made(photos, tmp_path):
    make(photos, tmp_path / "out", function=partial(halves, threshold=9), settings={"threshold": 9})
    manifest = json.loads((tmp_path / "out" / "masks.json").read_text())
    assert manifest["settings"] == {"threshold": 9}
    assert manifest["source"] == "halves"
    [only] = manifest["rounds"]
    assert only["photos"] == 12
    assert "scikit-image" in only["versions"]


def test_a_damaged_shard_is_an_error_not_a_finished_one(photos, tmp_path):
    make(photos, tmp_path / "out")
    shard_path(tmp_path / "out", 1).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"shard-00001\.parquet is damaged"):
        make(photos, tmp_path / "out")


def test_making_superpixels_needs_no_torch():
    code = (
        "import sys; import pixelclip.masks.make as make;"
        "make.find_source('superpixels'); print('torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert printed.stdout.strip() == b"False"
