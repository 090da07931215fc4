"""What a checkpoint holds, taken from and put back into a model and its optimiser."""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.optim import AdamW

from pixelclip.checkpoint import check_fit
from pixelclip.errors import ModelError
from pixelclip.training.model import PixelClip
from pixelclip.training.run import Checkpoint


def changing_tensors(model: PixelClip) -> dict[str, Tensor]:
    """All weights that training changes: trained ones, and the teacher's averages of them."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    averages = dict(model.teacher.named_parameters())
    return {**trained, **{f"teacher.{name}": averages[name] for name in model.trained}}


def collect(
    step: int,
    model: PixelClip,
    optimizer: AdamW,
    recent: Tensor,
    accelerator: Accelerator,
    run: str,
) -> Checkpoint:
    """All that is needed to go on after `step`; every process must take part."""
    past = [features.cpu() for features in model.past]
    if accelerator.num_processes > 1:
        parts: list[list[Tensor]] = [[] for _ in range(accelerator.num_processes)]
        dist.all_gather_object(parts, past)
        # Who holds which of them does not matter: the assignment is over all processes.
        past = [torch.cat(step_parts) for step_parts in zip(*parts, strict=True)]
    weights = {name: t.detach().cpu() for name, t in changing_tensors(model).items()}
    return Checkpoint(
        step=step,
        weights=weights,
        optimizer=optimizer.state_dict(),
        past=past,
        clusters=recent,
        run=run,
    )


@torch.no_grad()
def restore(state: Checkpoint, model: PixelClip, optimizer: AdamW, *, is_main: bool) -> Tensor:
    """Put a checkpoint back; returns the clusters' counts of the last steps.

    Raises:
        ModelError: it is of another model.
    """
    weights, stored = changing_tensors(model), state["weights"]
    device = next(iter(weights.values())).device
    try:
        check_fit(weights, stored, "the checkpoint")
        for name, tensor in weights.items():
            tensor.copy_(stored[name])
        optimizer.load_state_dict(state["optimizer"])
        model.past = [f.to(device) if is_main else f[:0].to(device) for f in state["past"]]
        return state["clusters"].reshape(-1, model.config.num_clusters).long()
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"the checkpoint of this run cannot be used: {error}") from error
