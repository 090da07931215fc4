"""What is told of a long run where stderr is no terminal."""

import logging
import time
from pathlib import Path

from pixelclip import progress
from pixelclip.jobs.run import Crew, run
from pixelclip.jobs.work import Outcome, cut
from pixelclip.photos import Photo
from pixelclip.progress import Shown, progress_bar

PHOTOS = [Photo(Path(f"{number}.jpg"), Path(f"{number}")) for number in range(12)]


class Slow:
    """Starts long and then takes no time; a third of the pieces is there already."""

    def start(self):
        time.sleep(0.5)
        return self._do

    def _do(self, piece):
        time.sleep(0.05)
        for photo in piece.photos:
            yield Outcome(photo, is_new=piece.number > 0)


def test_the_time_left_is_that_of_what_was_measured_after_the_start():
    shown = Shown("x", 102, 0, quiet=True)
    time.sleep(0.5)
    assert shown.seconds_left() is None
    shown.update(1, "")
    assert shown.seconds_left() is None  # one says how long the start took
    time.sleep(0.01)
    shown.update(2, "")
    assert 0.9 < shown.seconds_left() < 20  # by the start it were 50 / 2 * 1


def test_what_was_there_says_nothing_of_the_time_left():
    shown = Shown("x", 20, 0, quiet=True)
    for done in range(1, 11):
        shown.first += 1
        shown.update(done, "")
    assert shown.seconds_left() is None
    shown.update(11, "")
    time.sleep(0.1)
    shown.update(12, "")
    assert 0.8 <= shown.seconds_left() < 8


def test_lines_come_while_nothing_is_done_yet_and_have_a_unit(caplog, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE", 0.1)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.1)
    with caplog.at_level(logging.INFO, "pixelclip"):
        run(Slow(), cut(PHOTOS, 4), Crew(), what="noting")
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "noting: 0 of 12 photos"
    assert all(line.startswith("noting: ") for line in lines)


def test_photos_that_come_several_times_are_counted_as_passes(caplog, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE", 0.1)
    pieces = [*cut(PHOTOS, 4), *cut(PHOTOS, 4, 3)]
    with caplog.at_level(logging.INFO, "pixelclip"):
        run(Slow(), pieces, Crew(), what="noting")
    assert caplog.records[0].getMessage() == "noting: 0 of 24 passes over 12 photos"


def test_a_short_run_and_a_quiet_one_say_nothing(caplog, capfd, monkeypatch):
    with caplog.at_level(logging.INFO, "pixelclip"):
        run(Slow(), cut(PHOTOS, 4), Crew(), what="noting")
        monkeypatch.setattr(progress, "FIRST_LINE", 0.1)
        run(Slow(), cut(PHOTOS, 4), Crew(), what="noting", quiet=True)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_a_bar_leaves_no_empty_line_where_there_is_no_terminal(capfd):
    with progress_bar(quiet=False) as bar:
        bar.advance(bar.add_task("x", total=2))
    assert capfd.readouterr() == ("", "")
