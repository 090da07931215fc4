"""Figures of a run: a row per step, problems, TensorBoard, the line behind the progress bar."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from pixelclip.config import TrainConfig
from pixelclip.errors import DataError, MissingExtra
from pixelclip.files import printable
from pixelclip.training.data import LoadedBatch
from pixelclip.training.parameters import schedule
from pixelclip.training.run import Row, Rows, read_rows
from pixelclip.training.step import StepResult

log = logging.getLogger("pixelclip")

RECENT_STEPS = 50  # over which the clusters in use are counted
COLUMNS = (
    "step", "loss", "grad_norm", "rate", "masks", "assignment_entropy", "step_clusters",
    "used_clusters", "usage_entropy", "seconds", "loader_seconds",
)  # fmt: skip
PATIENCE = 20  # steps without any mask before that is worth a word


@dataclass(frozen=True)
class TrainSummary:
    """How a run stands when `train` returns.

    Attributes:
        steps: done, of all calls together.
        finished: whether these are all; not after an interrupt.
        loss: of the last step with masks; None without any.
        used_clusters: clusters that got a mask in the last steps.
        failed: photos that could not be used, each with one line that says why.
        broken_masks: annotations that were left out, counted each time they were met.
        seconds: of this call.
    """

    steps: int
    finished: bool
    loss: float | None
    used_clusters: int
    failed: dict[str, str]
    broken_masks: int
    seconds: float


class Report:
    """What a run says of itself; metrics are written by the main process only."""

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        step: int,
        recent: Int[Tensor, "S K"] | None,
        *,
        process: int = 0,
    ):
        self.config = config
        self.recent = torch.zeros(0, config.num_clusters).long() if recent is None else recent
        self.folder, self.is_main = folder, process == 0
        name = "problems.jsonl" if self.is_main else f"problems-{process}.jsonl"
        self.problems = Rows(folder / name, step)
        self.failed = {str(row["path"]) for row in self.problems.rows if "path" in row}
        self.metrics = (
            Rows(folder / "metrics.jsonl", step, columns=COLUMNS) if self.is_main else None
        )
        self.board = _tensorboard(folder, step) if config.tensorboard and self.is_main else None
        self.note = ""
        self.loss: float | None = None
        self.empty_steps = 0

    def add(
        self, step: int, result: StepResult, loaded: LoadedBatch, *, seconds: float, waited: float
    ) -> None:
        """Take in a step.

        Args:
            step: steps done, this one included.
            result: what it did.
            loaded: the batch and its problems.
            seconds: it took, with loading.
            waited: of these, for the loader.

        Raises:
            DataError: the loss is no number, or the disk is full.
        """
        self.recent = torch.cat([self.recent, result.clusters[None]])[-RECENT_STEPS:]
        self._check(step, result)
        row = self._row(step, result, seconds, waited)
        loss = "no mask yet" if self.loss is None else f"loss {self.loss:.4f}"
        self.note = f"{loss}, {self.used_clusters} clusters, entropy {result.entropy:.2f}"
        self.problems.add(self._problem_rows(step, loaded))
        if self.metrics is not None:
            self.metrics.add([row])
        if self.board is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(name, value, step)

    def _problem_rows(self, step: int, loaded: LoadedBatch) -> list[Row]:
        """Photos that failed for the first time, and how many masks were damaged."""
        rows: list[Row] = []
        for path, message in loaded.problems:
            if printable(path) not in self.failed:
                self.failed.add(printable(path))
                rows.append({"step": step, "path": printable(path), "message": message})
        if loaded.broken_masks:
            rows.append({"step": step, "broken_masks": loaded.broken_masks})
        return rows

    def _check(self, step: int, result: StepResult) -> None:
        self.empty_steps = 0 if result.masks else self.empty_steps + 1
        if self.empty_steps == PATIENCE:
            log.info("no photo of the last %d batches has a mask; nothing is learned", PATIENCE)
        if result.masks:
            self.loss = result.loss
            if not math.isfinite(result.loss + result.grad_norm):
                raise DataError(
                    f"training diverged in step {step}: the loss is {result.loss}; try a lower"
                    " learning_rate in another -o"
                )

    def _row(self, step: int, result: StepResult, seconds: float, waited: float) -> Row:
        return {
            "step": step,
            "loss": result.loss if result.masks else None,
            "grad_norm": round(result.grad_norm, 6),
            "rate": schedule(step - 1, self.config.steps),
            "masks": result.masks,
            "assignment_entropy": round(result.entropy, 6),
            "step_clusters": int((result.clusters > 0).sum()),
            "used_clusters": self.used_clusters,
            "usage_entropy": round(_entropy(self.recent.sum(dim=0)), 6),
            "seconds": round(seconds, 4),
            "loader_seconds": round(waited, 4),
        }

    @property
    def used_clusters(self) -> int:
        """Clusters that got a mask in the last steps."""
        return int((self.recent.sum(dim=0) > 0).sum())

    def summary(self, step: int, seconds: float) -> TrainSummary:
        """How the run stands; problems are those of all processes."""
        if self.board is not None:
            self.board.close()
        rows = [r for path in self.folder.glob("problems*.jsonl") for r in read_rows(path, step)]
        return TrainSummary(
            steps=step,
            finished=step >= self.config.steps,
            loss=self.loss,
            used_clusters=self.used_clusters,
            failed={str(row["path"]): str(row.get("message")) for row in rows if "path" in row},
            broken_masks=sum(n for row in rows if isinstance(n := row.get("broken_masks"), int)),
            seconds=round(seconds, 1),
        )


def _entropy(counts: Int[Tensor, " K"]) -> float:
    """Entropy of a histogram as a share of the largest possible."""
    if len(counts) < 2 or not counts.any():
        return 0.0
    return float(torch.special.entr(counts / counts.sum()).sum()) / math.log(len(counts))


def _tensorboard(folder: Path, step: int):  # type: ignore[no-untyped-def]  # an extra's type
    """A writer of TensorBoard's event files.

    Raises:
        MissingExtra: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra(
            "tensorboard needs an extra: pip install 'pixelclip[tensorboard]'"
        ) from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
