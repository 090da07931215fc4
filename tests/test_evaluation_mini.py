"""The same bytes from `pixelclip eval` with mini and a rival, whoever does the work."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pixelclip.backbones.means import Means
from pixelclip.evaljob import EvalJob, run_eval_job
from tests.test_evaluation_job import make_set

PIECES = 4  # of 20 photos, mini and a rival


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("sets") / "data", 20)


def contents(output):
    """Every file of results, by its path; pieces are no results."""
    files = (path for path in output.rglob("*") if path.is_file())
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in files
        if path.relative_to(output).parts[0] != "pieces"
    }


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The results of one process that was not disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    job = EvalJob(
        Means("mini", device="cpu"), data=(data,), rivals=("proxy",), output=output, workers=1,
        settings={"short_side": 64}, quiet=True,
    )  # fmt: skip
    assert run_eval_job(job) == 0
    return contents(output)


def begin(data, output, *more):
    """The same evaluation by the command."""
    command = [
        sys.executable, "-m", "pixelclip", "eval", "--data", str(data), "--rival", "proxy", "-o",
        str(output), "--short-side", "64", "--device", "cpu", "-q", *more,
    ]  # fmt: skip
    return subprocess.Popen(command, env=os.environ | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"})


def test_there_is_something_to_compare(whole):
    parts = {"results.json", "table.csv", "report.md"}
    for row in ("mini-base", "mini-base-proxy"):
        parts |= {f"data/{row}/{name}" for name in ("classes.csv", "confusion.csv", "worst.png")}
    assert set(whole) == parts
    assert whole["data/mini-base/confusion.csv"] != whole["data/mini-base-proxy/confusion.csv"]


def test_two_processes_give_the_same_bytes(data, whole, tmp_path):
    assert begin(data, tmp_path / "out", "--workers", "2").wait() == 0
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_killed_run_goes_on_to_the_same_bytes(data, whole, tmp_path, workers):
    output = tmp_path / "out"
    process = begin(data, output, "--workers", workers)
    while not (done := list(output.glob("pieces/*/*.npz"))) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(done) < PIECES
    assert not contents(output)
    assert begin(data, output, "--workers", "1").wait() == 0
    assert contents(output) == whole
    assert begin(data, output, "--workers", "1").wait() == 0  # nothing to do
    assert contents(output) == whole


def test_a_cluster_gives_the_same_bytes(data, whole, tmp_path):
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    assert begin(data, tmp_path / "out", "--engine", "ray", "--workers", "2").wait() == 0
    assert contents(tmp_path / "out") == whole
