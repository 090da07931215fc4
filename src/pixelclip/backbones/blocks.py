"""open_clip's transformer blocks, run without the copies that `nn.MultiheadAttention` makes.

Same weights, same result up to rounding, less time and memory in training
(`benchmarks/train_step.py`).
"""

import torch.nn.functional as F
from jaxtyping import Float
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn


def project(
    block: ResidualAttentionBlock, hidden: Float[Tensor, "B L E"]
) -> tuple[Float[Tensor, "B N L C"], Float[Tensor, "B N L C"], Float[Tensor, "B N L C"]]:
    """Queries, keys and values of the N heads of a block's attention."""
    attention = block.attn
    packed = F.linear(block.ln_1(hidden), attention.in_proj_weight, attention.in_proj_bias)
    heads = packed.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    queries, keys, values = heads.unbind(0)
    return queries, keys, values


def run_block(
    block: ResidualAttentionBlock,
    hidden: Float[Tensor, "B L E"],
    mask: Float[Tensor, "L L"] | None = None,
) -> Float[Tensor, "B L E"]:
    """The block as CLIP has it.

    Args:
        block: with its weights.
        hidden: token states.
        mask: added to the attention's logits.
    """
    mixed = F.scaled_dot_product_attention(*project(block, hidden), attn_mask=mask)
    hidden = hidden + block.ls_1(block.attn.out_proj(mixed.transpose(1, 2).flatten(2)))
    return hidden + block.ls_2(run_mlp(block.mlp, block.ln_2(hidden)))


def run_mlp(mlp: nn.Sequential, hidden: Float[Tensor, "B L E"]) -> Float[Tensor, "B L E"]:
    """A block's MLP; QuickGELU, x sigmoid(1.702 x), by one kernel that keeps one tensor."""
    widen, activation, narrow = mlp
    if not isinstance(activation, QuickGELU):
        return mlp(hidden)
    return narrow(F.silu(1.702 * widen(hidden)) / 1.702)
