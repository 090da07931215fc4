"""From masks to targets: pooling, assignment to clusters, merging. Pure functions.

Everything here works on grids of cells: bilinear up-sampling is linear, so instead of up-sampling
features to the masks' resolution the masks are brought to the cells (speed.md i).
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pixelclip.device import all_reduced

SINKHORN_ITERATIONS = 3


@lru_cache(maxsize=32)
def upsampling(
    cells: int, size: int, device: torch.device | None = None
) -> Float[Tensor, "size cells"]:
    """Matrix of bilinear up-sampling along one axis: half-pixel centres, no antialiasing.

    Args:
        cells: values before.
        size: values after.
        device: where it is needed; it is kept there.
    """
    eye = torch.eye(cells)[None]
    matrix = torch.nn.functional.interpolate(eye, size, mode="linear", align_corners=False)
    return matrix[0].T.contiguous().to(device)


def shrink(masks: Float[Tensor, "N m m"], grid: tuple[int, int]) -> Float[Tensor, "N h w"]:
    """Transposed bilinear up-sampling: how much each cell counts in the sum over a mask.

    `(masks * upsample(x)).sum() == (shrink(masks, grid) * x).sum()` for any map x on the grid.
    """
    size = masks.shape[-1]
    rows, columns = (upsampling(cells, size, masks.device) for cells in grid)
    return rows.T @ masks @ columns


def mask_pool(
    features: Float[Tensor, "B D h w"], masks: Bool[Tensor, "N m m"], photos: Int[Tensor, " N"]
) -> Float[Tensor, "N D"]:
    """Mean under each mask of the features up-sampled to m x m (behaviour.md 11).

    Args:
        features: not normalised.
        masks: none empty.
        photos: photo that each mask belongs to, non-decreasing.
    """
    weights = masks.to(features.dtype)
    areas = weights.sum(dim=(1, 2))
    weights = shrink(weights, (features.shape[2], features.shape[3])).flatten(1)  # [N, hw]
    counts = photos.bincount(minlength=len(features)).tolist()
    sums = [
        part @ cells.flatten(1).T
        for part, cells in zip(weights.split(counts), features, strict=True)
    ]
    return torch.cat(sums) / areas[:, None]


def sinkhorn(
    logits: Float[Tensor, "N K"], iterations: int = SINKHORN_ITERATIONS
) -> Float[Tensor, "N K"]:
    """Assignment with clusters about equally full, over the masks of all processes.

    Softmax over clusters, then alternately every cluster and every mask is scaled to sum 1, the
    mask last (behaviour.md 12b to 12d; the authors' further constants cancel). In logarithms, so
    that a cluster whose softmax underflows for all masks is not divided by zero (12e).

    Args:
        logits: temperature times similarity; N is the number of this process's masks, maybe 0.
        iterations: rounds.
    """
    scores = logits.detach().float().log_softmax(dim=1)
    for _ in range(iterations):
        scores = scores - _column_logsumexp(scores)
        scores = scores.log_softmax(dim=1)
    return scores.exp()


def _column_logsumexp(scores: Float[Tensor, "N K"]) -> Float[Tensor, " K"]:
    """Logarithm of the summed exponentials of every column, over all processes."""
    lowest = scores.new_full((1, scores.shape[1]), torch.finfo(scores.dtype).min)
    largest = torch.cat([scores, lowest]).amax(dim=0)
    largest = all_reduced(largest, largest_of=True)
    return all_reduced((scores - largest).exp().sum(dim=0)).log() + largest


def _sinkhorn(logits: Tensor, past: Tensor) -> Tensor:
    """The paper's: over the masks of this step."""
    return sinkhorn(logits)


def _queue(logits: Tensor, past: Tensor) -> Tensor:
    """Over the masks of the last steps as well: a small batch need not fill every cluster."""
    return sinkhorn(torch.cat([past, logits]))[len(past) :]


def _softmax(logits: Tensor, past: Tensor) -> Tensor:
    """Every mask by itself: nothing keeps clusters from running empty."""
    return logits.softmax(dim=1)


# From logits of this step's masks and of the last steps' masks to soft assignments of the former.
ASSIGNERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sinkhorn": _sinkhorn,
    "queue": _queue,
    "softmax": _softmax,
}


def merge(
    masks: Bool[Tensor, "N m m"], slots: Int[Tensor, " N"]
) -> tuple[Float[Tensor, "U m m"], Int[Tensor, " U"]]:
    """Union of the masks that share a slot, and the slots in use (behaviour.md 14).

    Args:
        masks: of all photos.
        slots: where each belongs: photo times number of clusters, plus cluster.
    """
    used, places = slots.unique(return_inverse=True)
    union = torch.zeros((len(used), *masks.shape[1:]), device=masks.device)
    return union.index_add_(0, places, masks.float()).clamp_(max=1), used
