"""Jobs over processes and over a Ray cluster: nothing lost, nothing twice."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pixelclip.errors import ConfigError, DataError, ModelError
from pixelclip.jobs.run import Crew, make_crew, run
from pixelclip.jobs.work import Outcome, cut
from pixelclip.photos import Photo
from pixelclip.workers import cores

TESTS = Path(__file__).parent
PHOTOS = [Photo(Path(f"{number:02d}.jpg"), Path(f"{number:02d}")) for number in range(23)]


@dataclass(frozen=True)
class Note:
    """Writes the names of a piece; the worker that does a piece for the first time may die."""

    out: Path
    deadly: int = -1
    how: str = "kill"

    def start(self):
        return self._do

    def _do(self, piece):
        path = self.out / f"{piece.number}.txt"
        if path.exists():
            yield from (Outcome(photo, is_new=False) for photo in piece.photos)
            return
        time.sleep(0.02)
        if piece.number == self.deadly:
            self._die()
        for photo in piece.photos:
            bad = photo.stem.name.endswith("7")
            yield Outcome(photo, "a seven" if bad else "")
        with path.open("x") as file:  # a second time would be an error
            file.write(" ".join(photo.stem.name for photo in piece.photos))

    def _die(self):
        mark = self.out / "died"
        if self.how == "error":
            raise ModelError("no such model")
        if not mark.exists():
            mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)


def noted(out):
    return " ".join((out / f"{number}.txt").read_text() for number in range(6)).split()


@pytest.mark.parametrize("workers", [1, 2])
def test_every_photo_is_done_once_and_failures_come_in_order(tmp_path, workers):
    pieces = cut(PHOTOS, 4)
    assert [piece.number for piece in pieces] == list(range(6))
    summary = run(Note(tmp_path), pieces, Crew(workers=workers), what="noting", quiet=True)
    assert summary.failed == [(PHOTOS[7], "a seven"), (PHOTOS[17], "a seven")]
    assert (summary.new, summary.kept) == (21, 0)
    assert noted(tmp_path) == [photo.stem.name for photo in PHOTOS]
    again = run(Note(tmp_path), pieces, Crew(workers=workers), what="noting", quiet=True)
    assert (again.new, again.kept) == (0, 23)


def test_nothing_to_do_is_done_at_once(tmp_path):
    assert run(Note(tmp_path), [], Crew(workers=2), what="noting") == ([], 0, 0)


def test_wrong_options_are_refused():
    with pytest.raises(ConfigError, match="0 workers; at least 1"):
        make_crew(3, 0, "local", is_light=True)
    with pytest.raises(ConfigError, match="unknown engine 'dask'; available: local, ray"):
        make_crew(3, 1, "dask", is_light=True)


def test_an_error_in_a_worker_is_the_callers(tmp_path):
    with pytest.raises(ModelError, match="no such model"):
        run(Note(tmp_path, 2, "error"), cut(PHOTOS, 4), Crew(workers=2), what="noting", quiet=True)


def test_a_worker_that_dies_is_an_error_and_the_next_run_goes_on(tmp_path):
    work = Note(tmp_path, deadly=5)
    with pytest.raises(DataError, match="the same command with fewer --workers goes on"):
        run(work, cut(PHOTOS, 4), Crew(workers=2), what="noting", quiet=True)
    run(work, cut(PHOTOS, 4), Crew(workers=2), what="noting", quiet=True)
    assert noted(tmp_path) == [photo.stem.name for photo in PHOTOS]


def test_threads_do_not_depend_on_the_number_of_workers():
    for photos in (1, 63, 64, 10**6):
        for light in (False, True):
            crews = [make_crew(photos, n, "local", is_light=light) for n in (None, 1, 2, 7)]
            assert len({crew.threads for crew in crews}) == 1
    assert make_crew(64, None, "local", is_light=True)[1:3] == (cores(), 1)
    assert make_crew(64, None, "local", is_light=False)[1:3] == (1, cores())
    assert make_crew(63, None, "local", is_light=True)[1:3] == (1, cores())


def test_a_cluster_that_does_not_answer_is_told_at_once(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(DataError, match="no Ray cluster answers at RAY_ADDRESS"):
            run(Note(tmp_path), cut(PHOTOS, 4), Crew("ray", 2), what="noting", quiet=True)


ON_RAY = """
import json, logging, sys
from pathlib import Path
import ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
         runtime_env={{"env_vars": {{"PYTHONPATH": {path!r}}}}})
from tests.test_jobs import PHOTOS, Note
from pixelclip.errors import PixelClipError
from pixelclip.jobs.run import Crew, run
from pixelclip.jobs.work import cut
out = Path({out!r})
for work in {works}:
    try:
        summary = run(work, cut(PHOTOS, 4), Crew("ray", 2), what="noting", quiet=True)
        failed = [[str(photo.path), error] for photo, error in summary.failed]
        print('answer:', json.dumps([*failed, summary.new, summary.kept]))
    except PixelClipError as error:
        print('answer:', json.dumps(str(error)))
"""


def on_ray(out, works):
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    path = os.pathsep.join([str(TESTS.parent), *sys.path])
    script = ON_RAY.format(path=path, out=str(out), works=works)
    environment = {**os.environ, "PYTHONPATH": path, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    answers = (line.partition("answer: ") for line in ran.stdout.splitlines())  # Ray talks, too
    return [json.loads(text) for _, mark, text in answers if mark]


def test_on_ray_the_pieces_of_a_killed_worker_are_done_by_another(tmp_path):
    works = "[Note(out, deadly=3), Note(out), Note(out / 'other', 2, 'error')]"
    (tmp_path / "other").mkdir()
    first, again, wrong = on_ray(tmp_path, works)
    assert (tmp_path / "died").exists()
    failed = [["07.jpg", "a seven"], ["17.jpg", "a seven"]]
    assert first == [*failed, 21, 0]
    assert noted(tmp_path) == [photo.stem.name for photo in PHOTOS]
    assert again == [0, 23]
    assert wrong == "no such model"
