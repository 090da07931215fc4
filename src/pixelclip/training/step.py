"""One optimiser step, over all micro-batches and processes."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim import AdamW

from pixelclip.device import all_reduced
from pixelclip.training.batch import Batch
from pixelclip.training.model import Assignment, PixelClip, Pooled, Targets
from pixelclip.training.parameters import schedule, set_rates


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all processes.

    Attributes:
        loss: mean over pixels and maps; nan where no photo had a mask.
        grad_norm: of all weights, before clipping.
        masks: number that took part.
        entropy: mean entropy of the soft assignments, as a share of the largest possible.
        clusters: masks of each cluster.
        assignment: of this process's masks; None without clusters.
        stopped: some process has been told to stop; all know it after the same step.
    """

    loss: float
    grad_norm: float
    masks: int
    entropy: float
    clusters: Int[Tensor, " K"]
    assignment: Assignment | None
    stopped: bool


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: AdamW,
    batches: Sequence[Batch],
    step: int,
    *,
    stop: bool = False,
) -> StepResult:
    """Update the teacher, make targets, and the student's step towards them.

    Masks of all micro-batches and processes are assigned together, and the loss is the mean over
    all their pixels, so that neither changes what is computed (behaviour.md 21).

    Args:
        accelerator: device, precision, processes.
        model: a `PixelClip`, as the accelerator prepared it.
        optimizer: of its weights.
        batches: this process's micro-batches, at least one.
        step: counted from 0.
        stop: this process has been told to stop.
    """
    plain: PixelClip = accelerator.unwrap_model(model)
    plain.update_teacher()
    vectors = plain.vectors(plain.text)  # in float32: assignments hang on the fourth digit
    with accelerator.autocast():
        pooled = [plain.pool(batch) for batch in batches]
    targets, assignment = make_targets(plain, pooled, vectors)
    divisors = _divisors(plain, targets, accelerator.num_processes)
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=accelerator.device)
    for index, (batch, target, divisor) in enumerate(zip(batches, targets, divisors, strict=True)):
        last = index == len(batches) - 1
        seed = hash((plain.config.seed, step, accelerator.process_index, index)) % 2**63
        with nullcontext() if last else accelerator.no_sync(model):
            loss = model(batch, target, vectors, seed) / divisor
            accelerator.backward(loss, retain_graph=not last)
        total += loss.detach()
    norm = accelerator.clip_grad_norm_(
        [p for p in plain.parameters() if p.requires_grad], plain.config.clip_norm
    )
    set_rates(optimizer, schedule(step, plain.config.steps))
    optimizer.step()
    total /= accelerator.num_processes
    return _result(plain, total, norm, pooled, assignment, stop=stop)


def make_targets(
    model: PixelClip, pooled: Sequence[Pooled], vectors: Tensor
) -> tuple[list[Targets], Assignment | None]:
    """Assign the masks of all micro-batches at once; targets for each."""
    if model.config.assigner == "none":
        return [model.targets(part, None) for part in pooled], None
    assignment = model.assign(torch.cat([part.features for part in pooled]), vectors)
    clusters = assignment.hard.split([len(part.photos) for part in pooled])
    return [model.targets(*pair) for pair in zip(pooled, clusters, strict=True)], assignment


def _divisors(model: PixelClip, targets: Sequence[Targets], num_processes: int) -> list[float]:
    """What each micro-batch's summed loss is divided by; gradients are averaged over processes."""
    if model.config.loss_mean == "rank":
        return [float(max(1, target.terms) * len(targets)) for target in targets]
    terms = sum(target.terms for target in targets)
    device = targets[0].maps.device
    total = float(all_reduced(torch.tensor(float(terms), device=device)))
    return [max(1.0, total) / num_processes] * len(targets)


def _result(
    model: PixelClip,
    loss: Tensor,
    norm: Tensor,
    pooled: Sequence[Pooled],
    assignment: Assignment | None,
    *,
    stop: bool,
) -> StepResult:
    """Figures over all processes, fetched from the device in one go."""
    num = model.config.num_clusters
    masks = sum(len(part.photos) for part in pooled)
    clusters = loss.new_zeros(num)
    entropy = loss.new_zeros(())
    if assignment is not None:
        clusters += assignment.hard.bincount(minlength=num)
        entropy = torch.special.entr(assignment.soft).sum()
    counts = loss.new_tensor([float(masks), float(stop)])
    figures = torch.cat([torch.stack([loss, entropy]), counts, clusters])
    figures = all_reduced(figures).cpu()
    total, counted = float(figures[1]), int(figures[2])
    highest = float(torch.tensor(float(max(2, num))).log())
    return StepResult(
        loss=float(figures[0]) if counted else float("nan"),
        grad_norm=float(norm),
        masks=counted,
        entropy=total / max(1, counted) / highest,
        clusters=figures[4:].long(),
        assignment=assignment,
        stopped=bool(figures[3]),
    )
