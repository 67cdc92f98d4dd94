"""Solutions to the exercises of chapter 16, one model, two processes."""

from __future__ import annotations

import torch


def cut_qkv(qkv, num_heads, num_kv_heads, rank, size):
    """Whole heads of each of the three."""
    units = num_heads, num_kv_heads, num_kv_heads
    dim = len(qkv) // sum(units)
    own = []
    for matrix, count in zip(qkv.split([n * dim for n in units]), units, strict=True):
        first, last = rank * count // size, (rank + 1) * count // size
        own.append(matrix[first * dim : max(last, first + 1) * dim])
    return torch.cat(own)


def cut_linear(x, columns, bias, rank, all_reduce):
    """Rank 0 adds the bias to its part, so that it is in the sum once."""
    part = x @ columns.T
    return all_reduce(part + bias if rank == 0 else part)


def slowest_sum_s(step_s, num_layers, size):
    """step = step / size + (2 L + 2) t."""
    return step_s * (1 - 1 / size) / (2 * num_layers + 2)


def replica_for(num_prompt, cached, waiting):
    """The fewest tokens until the first new one."""
    return min(range(len(cached)), key=lambda r: waiting[r] + max(1, num_prompt - cached[r]))
