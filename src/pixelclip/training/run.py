"""The run directory: what is in it, written so that a run killed at any moment goes on.

run.json            what is trained on what, settings, versions
checkpoints/        step-00000500.pt: all that training needs to go on
metrics.jsonl, .csv a row per step
problems.jsonl      photos and annotations that could not be used
pictures/           clusters on a few photos, every so many steps
model.safetensors   the result so far, for segment, eval and load
"""

import csv
import json
import logging
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from pixelclip.checkpoint import read_json
from pixelclip.config import FREE_TO_CHANGE
from pixelclip.errors import ConfigError, DataError, ModelError
from pixelclip.files import replacing
from pixelclip.images import write_bytes

log = logging.getLogger("pixelclip")

Row = dict[str, object]

FORMAT = {"format": "pixelclip-run", "version": 1}


class Checkpoint(TypedDict):
    """All that training needs to go on after `step` steps."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, object]
    past: list[Tensor]
    clusters: Tensor


class RunDir:
    """A run directory; only the main process writes."""

    def __init__(self, folder: Path, *, writes: bool = True):
        self.folder = folder
        self.writes = writes

    def begin(self, record: Mapping[str, object]) -> None:
        """Write `run.json`, or make sure that the run there is this one.

        Raises:
            ConfigError: the folder holds another run.
            DataError: it cannot be written.
        """
        path = self.folder / "run.json"
        if path.is_file():
            self._compare(read_json(path), json.loads(json.dumps(record)))
        elif self.writes:
            text = json.dumps({**FORMAT, **record}, indent=2) + "\n"
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
        for old in self.checkpoints()[:-keep]:
            old.unlink(missing_ok=True)

    def load(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None."""
        for path in reversed(self.checkpoints()):
            try:
                with zipfile.ZipFile(path) as archive:
                    damaged = archive.testzip()  # compares every part with its checksum
                if damaged is None:
                    return _checked(torch.load(path, map_location="cpu", weights_only=True))
            except Exception as error:  # a damaged file raises anything
                log.debug("%s: %s", path, error)
            log.info("%s is damaged; going back to the one before", path)
        return None

    def checkpoints(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted((self.folder / "checkpoints").glob("step-*.pt"))

    def _path(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:08d}.pt"


def _flat(record: Mapping[str, object]) -> dict[str, object]:
    """What must not change: the record without versions, settings beside the rest."""
    settings = record.get("settings")
    rest = {k: v for k, v in record.items() if k not in {"settings", "versions", *FORMAT}}
    return rest | (settings if isinstance(settings, dict) else {})


def _checked(content: object) -> Checkpoint:
    keys = Checkpoint.__annotations__.keys()
    if not isinstance(content, dict) or content.keys() != keys:
        raise ModelError("not a training checkpoint")
    return content  # type: ignore[return-value]


class Rows:
    """A table that grows by a row per step, as JSON lines and, if wanted, as CSV."""

    def __init__(self, path: Path, step: int, *, with_csv: bool = False):
        """Open for appending after `step`: rows of later steps are from before an interruption.

        Raises:
            DataError: the file cannot be written.
        """
        self.path, self.with_csv = path, with_csv
        self.rows = read_rows(path, step)
        write_bytes(path, "".join(map(_line, self.rows)).encode())
        if with_csv:
            self._rewrite_csv(self.rows)

    def _rewrite_csv(self, rows: list[Row]) -> None:
        with replacing(self.path.with_suffix(".csv")) as part, part.open("w", newline="") as file:
            if rows:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)

    def add(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Append rows.

        Raises:
            DataError: the disk is full.
        """
        rows = list(rows)
        if not rows:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(map(_line, rows)))
            if self.with_csv:
                self._add_csv(rows)
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _add_csv(self, rows: list[Mapping[str, object]]) -> None:
        path = self.path.with_suffix(".csv")
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            if not path.stat().st_size:
                writer.writeheader()
            writer.writerows(rows)


def _line(row: Mapping[str, object]) -> str:
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
