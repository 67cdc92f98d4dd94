"""Solutions of chapter 06, kernels in Triton."""

from __future__ import annotations

import torch

from paged_infer.kernels.triton_runtime import launch, tl, triton


@triton.jit
def _softmax_kernel(x_ptr, out_ptr, width, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    place = tl.program_id(0) * width + column
    x = tl.load(x_ptr + place, mask=column < width, other=float("-inf"))
    weights = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + place, weights / tl.sum(weights, 0), mask=column < width)


def row_softmax(x):
    """Masked columns read as -inf: they win no maximum, and their exponential adds 0."""
    out = torch.empty_like(x)
    launch(_softmax_kernel, (x.shape[0],), x, out, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return out


def register_budget(num_warps, num_blocks):
    """The registers of an SM among all threads, rounded down to the unit of 8."""
    warps = num_warps * num_blocks
    return 0 if warps > 64 else min(255, 65_536 // (32 * warps) // 8 * 8)


def matmul_traffic(M, N, K, block_m, block_n):
    """A is read for each column of tiles, B for each row of tiles, and C is written once."""
    return M * K * triton.cdiv(N, block_n) + K * N * triton.cdiv(M, block_m) + M * N


@triton.jit
def _store_kernel(k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, rows_ptr, width, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    row = tl.load(rows_ptr + token)
    column = tl.arange(0, BLOCK)
    if row >= 0:
        there = column < width
        k = tl.load(k_ptr + token * width + column, mask=there)
        v = tl.load(v_ptr + token * width + column, mask=there)
        tl.store(k_cache_ptr + row * width + column, k, mask=there)
        tl.store(v_cache_ptr + row * width + column, v, mask=there)


def store(k, v, k_cache, v_cache, rows):
    """Row -1 is a branch of the kernel: the host does not look at it."""
    block = triton.next_power_of_2(k.shape[1])
    launch(_store_kernel, (k.shape[0],), k, v, k_cache, v_cache, rows, k.shape[1], BLOCK=block)
