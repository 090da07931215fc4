"""Which weights are trained, and how: groups, rates, schedule (behaviour.md 16)."""

import math
from fnmatch import fnmatchcase

from torch import nn
from torch.optim import AdamW

from pixelclip.config import TrainConfig
from pixelclip.errors import ConfigError

POSITIONS = "positional_embedding"


def choose_parameters(visual: nn.Module, finetune: str | tuple[str, ...]) -> list[str]:
    """Names of the image tower's trained weights; these get gradients, all others none.

    Args:
        visual: the student.
        finetune: `attention` (with position embedding, as the authors' ViT), `full`, or patterns
            of names such as `blocks.3.*`, where `*` stands for anything.

    Raises:
        ConfigError: a pattern matches nothing, or the tower has no attention.
    """
    names = [name.removeprefix("tower.") for name, _ in visual.named_parameters()]
    patterns = {"attention": ("*attn*", POSITIONS), "full": ("*",)}.get(finetune, finetune)  # type: ignore[arg-type]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            hint = ", ".join(names[:: max(1, len(names) // 5)])
            raise ConfigError(
                f"finetune: {pattern!r} matches no weight of this image tower, which has {hint};"
                " finetune=full trains all"
            )
    trained = []
    for (full, parameter), name in zip(visual.named_parameters(), names, strict=True):
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))
        if parameter.requires_grad:
            trained.append(full)
    return trained


def make_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW over prompts, image tower and decoder, each with its rate; no decay for norms."""
    norms = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    multipliers = {"visual": config.clip_multiplier, "vectors": config.prompt_multiplier}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = config.learning_rate * multipliers.get(name.split(".")[0], 1.0)
            decay = 0.0 if id(parameter) in norms else config.weight_decay
            groups.setdefault((rate, decay), []).append(parameter)
    return AdamW(
        [
            {"params": parameters, "lr": rate, "weight_decay": decay, "initial_lr": rate}
            for (rate, decay), parameters in groups.items()
        ],
        foreach=True,
    )


def schedule(step: int, steps: int) -> float:
    """Multiplier of all rates at a step counted from 0: cosine from 1 to a half."""
    return 0.5 + 0.25 * (1 + math.cos(math.pi * step / steps))


def set_rates(optimizer: AdamW, multiplier: float) -> None:
    """Multiply every group's own rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
