"""The run directory: what is in it, written so that a run killed at any moment goes on.

run.json            what is trained on what, settings, versions
checkpoints/        step-00000500.pt: all that training needs to go on
metrics.jsonl, .csv a row per step
problems.jsonl      photos and annotations that could not be used
pictures/           clusters on a few photos, every so many steps
model.safetensors   the result so far, for segment, eval and load
"""

import csv
import hashlib
import io
import json
import logging
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict, TypeGuard

import torch
from torch import Tensor

from pixelclip.checkpoint import read_json
from pixelclip.config import FREE_TO_CHANGE
from pixelclip.errors import ConfigError, DataError
from pixelclip.files import replacing
from pixelclip.images import check_writable, write_bytes

log = logging.getLogger("pixelclip")

Row = dict[str, object]

CHECKPOINT = re.compile(r"step-\d{8}\.pt")
FORMAT = {"format": "pixelclip-run", "version": 1}


class Checkpoint(TypedDict):
    """All that training needs to go on after `step` steps."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, object]
    past: list[Tensor]
    clusters: Tensor
    run: str


class RunDir:
    """A run directory.

    Attributes:
        folder: with the files named above.
        identity: hash of all that decides the result, which checkpoints carry.
    """

    def __init__(self, folder: Path, record: Mapping[str, object]):
        self.folder = folder
        self.record: dict[str, object] = json.loads(json.dumps(record))  # as it will be read
        fixed = {k: v for k, v in _flat(self.record).items() if k not in FREE_TO_CHANGE}
        self.identity = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()

    def begin(self) -> None:
        """Write `run.json`, or make sure that the run there is this one.

        A folder without a checkpoint has nothing to lose: its record is written anew.

        Raises:
            ConfigError: the folder holds another run.
            DataError: it cannot be written.
        """
        check_writable(self.folder / "checkpoints")
        path = self.folder / "run.json"
        if path.is_file() and checkpoints(self.folder):
            self._compare(read_json(path), self.record)
        else:
            text = json.dumps({**FORMAT, **self.record}, indent=2) + "\n"
            write_bytes(path, text.encode())

    def _compare(self, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
        if any(found.get(key) != value for key, value in FORMAT.items()):
            raise ConfigError(f"{self.folder}/run.json is not a training run of this version")
        old, new = (_flat(part) for part in (found, wanted))
        changed = [
            f"{key} was {old.get(key)!r}, now {new[key]!r}"
            for key in new
            if old.get(key) != new[key] and key not in FREE_TO_CHANGE
        ]
        if changed:
            raise ConfigError(
                f"{self.folder} holds another run: {'; '.join(changed[:3])}; give the same"
                " settings to resume it, or another -o"
            )

    def save(self, state: Checkpoint, keep: int) -> None:
        """Write a checkpoint, wholly or not at all, then drop the oldest beyond `keep`.

        Raises:
            DataError: there is no room for it; the previous ones are left as they are.
        """
        path = self._path(state["step"])
        try:
            with replacing(path) as part:
                torch.save(dict(state), part)
                with part.open("rb") as file:
                    os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
            raise DataError(
                f"cannot write {path}: {str(error).splitlines()[0]}; the last checkpoint is whole:"
                " make room and run the same command again"
            ) from error
        found = checkpoints(self.folder)
        end = found.index(path) + 1
        for other in (*found[: max(0, end - keep)], *found[end:]):  # newer ones were damaged
            other.unlink(missing_ok=True)

    def load(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None.

        Raises:
            ConfigError: it is of another run.
        """
        state = newest_checkpoint(self.folder)
        if state is not None and state["run"] != self.identity:
            raise ConfigError(
                f"the checkpoints in {self.folder} are of another run; give another -o"
            )
        return state

    def _path(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:08d}.pt"


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in a run directory, oldest first."""
    paths = (folder / "checkpoints").glob("step-*.pt")
    return sorted(path for path in paths if CHECKPOINT.fullmatch(path.name) and path.is_file())


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in a run directory that is whole, or None."""
    for path in reversed(checkpoints(folder)):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # compares every part with its checksum
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file raises anything
            damaged, content = str(error), None
        if damaged is None and _is_checkpoint(content):
            return content
        log.info("%s is damaged; going back to the one before", path)
    return None


def _flat(record: Mapping[str, object]) -> dict[str, object]:
    """What must not change: the record without versions, settings beside the rest."""
    settings = record.get("settings")
    rest = {k: v for k, v in record.items() if k not in {"settings", "versions", *FORMAT}}
    return rest | (settings if isinstance(settings, dict) else {})


def _is_checkpoint(content: object) -> TypeGuard[Checkpoint]:
    return isinstance(content, dict) and content.keys() == Checkpoint.__annotations__.keys()


class Rows:
    """A table that grows by a row per step, as JSON lines and, if wanted, as CSV."""

    def __init__(self, path: Path, step: int, *, columns: Sequence[str] = ()):
        """Open for appending after `step`: rows of later steps are from before an interruption.

        Args:
            path: of the JSON lines.
            step: the last one whose rows are kept.
            columns: of a CSV file beside it; none: there is no such file.

        Raises:
            DataError: a file cannot be written.
        """
        self.path, self.columns = path, columns
        self.rows = read_rows(path, step)
        write_bytes(path, "".join(map(_line, self.rows)).encode())
        if columns:
            header = ",".join(columns) + "\n"
            write_bytes(path.with_suffix(".csv"), header.encode() + self._csv(self.rows).encode())

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows.

        Raises:
            DataError: the disk is full.
        """
        try:
            if rows:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("".join(map(_line, rows)))
            if rows and self.columns:
                with self.path.with_suffix(".csv").open("a", encoding="utf-8") as file:
                    file.write(self._csv(rows))
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _csv(self, rows: Sequence[Row]) -> str:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self.columns, extrasaction="ignore", lineterminator="\n")
        writer.writerows(rows)
        return buffer.getvalue()


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def read_rows(path: Path, last_step: int) -> list[Row]:
    """The rows of a JSON-lines table up to a step; what follows a broken line is passed over."""
    rows: list[Row] = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            break
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(step, int):
            break
        if step <= last_step:
            rows.append(row)
    return rows
