"""Zeros that take no memory until they are written."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor


def untouched_zeros(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """``torch.zeros``, which writes its memory, without that write on a CPU: the system gives zero pages when they are
    first touched. A page that is only read is shared by all.

    Raises:
        ValueError: the system has no room for them; the message names the size.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    # Elsewhere than on Unix a mapping is shared between processes or charged at once.
    if torch.device(device).type != "cpu" or not num_bytes or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):
        return _written_zeros(shape, dtype, num_bytes)
    return torch.frombuffer(pages, dtype=dtype).view(shape)  # it keeps the mapping as long as it lives


def _written_zeros(shape: tuple[int, ...], dtype: torch.dtype, num_bytes: int) -> Tensor:
    try:
        return torch.zeros(shape, dtype=dtype)
    except RuntimeError:
        size = f"{num_bytes / 2**30:,.1f} GiB"
        raise ValueError(
            f"a KV pool with {size} in each tensor does not fit this machine: lower num_blocks or block_size"
        ) from None
