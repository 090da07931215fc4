"""Choice of device and number format."""

import ctypes
import os
import sys
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from pixelclip.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda", "mps")  # and cuda:N
PRECISIONS = ("auto", "float32", "bfloat16")


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; `auto` takes a GPU where there is one.

    Raises:
        ConfigError: the name is unknown or this machine has no such device.
    """
    kind, _, index = name.partition(":")
    if kind not in DEVICES or (index and not index.isdigit()):
        raise ConfigError(f"unknown device {name!r}; available: {', '.join(DEVICES)}, cuda:N")
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "mps" if has_mps else "cpu")
    if (kind == "cuda" and not has_cuda) or (kind == "mps" and not has_mps):
        raise ConfigError(f"this machine has no {kind} device; use --device cpu")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise ConfigError(f"no {name}: this machine has {torch.cuda.device_count()} GPU(s)")
    return torch.device(name)


def autocast(device: torch.device, precision: str = "auto") -> AbstractContextManager[object]:
    """Context in which a forward pass runs in the asked precision.

    `auto` is bfloat16 on GPUs that compute it natively and float32 elsewhere: on a CPU without
    bfloat16 instructions it is slower than float32.

    Raises:
        ConfigError: the precision is unknown.
    """
    if wants_bfloat16(device, precision):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def wants_bfloat16(device: torch.device, precision: str) -> bool:
    """Whether that precision means bfloat16 on that device.

    Raises:
        ConfigError: the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"unknown precision {precision!r}; available: {', '.join(PRECISIONS)}")
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bfloat16" or (precision == "auto" and native)


def all_reduced(values: Tensor, *, largest_of: bool = False) -> Tensor:
    """Sum, or largest, of a tensor over all processes; itself if there is only one."""
    if dist.is_available() and dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values, op=dist.ReduceOp.MAX if largest_of else dist.ReduceOp.SUM)
    return values


def keep_heap() -> None:
    """Let freed memory be used again instead of going back to the system, where glibc allows it.

    Blocks above 32 MB otherwise cost fresh pages each time, a third of a training step on a CPU
    (speed.md vi). Whoever sets MALLOC_ variables has decided for himself.
    """
    if not sys.platform.startswith("linux") or any(n.startswith("MALLOC_") for n in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    trim_threshold, mmap_max = -1, -4  # names of <malloc.h>
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
