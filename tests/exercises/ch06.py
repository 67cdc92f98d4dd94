"""Wrong answers to the exercises of chapter 06."""

from __future__ import annotations

import torch
from planted import wrong

from paged_infer.kernels.triton_runtime import launch, tl, triton


@triton.jit
def _careless_kernel(x_ptr, out_ptr, width, OTHER: tl.constexpr, SAFE: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    place = tl.program_id(0) * width + column
    x = tl.load(x_ptr + place, mask=column < width, other=OTHER)
    weights = tl.exp(x - tl.max(x, 0)) if SAFE else tl.exp(x)
    tl.store(out_ptr + place, weights / tl.sum(weights, 0), mask=column < width)


def _careless(x, other, safe):
    out = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    launch(_careless_kernel, (x.shape[0],), x, out, x.shape[1], OTHER=other, SAFE=safe, BLOCK=block)
    return out


@wrong("row_softmax", "masked columns were read as 0")
def reads_masked_columns_as_zero(x):
    return _careless(x, 0.0, True)


@wrong("row_softmax", "subtract the row's maximum")
def overflows(x):
    return _careless(x, float("-inf"), False)


@wrong("row_softmax", "columns add up to 1")
def sums_the_columns(x):
    return _careless(x.T.contiguous(), float("-inf"), True).T


@wrong("row_softmax", "no kernel was launched")
def leaves_it_to_torch(x):
    return x.softmax(dim=-1)


@wrong("row_softmax", "None: is the `return` missing")
def forgets_to_return_the_output(x):
    _careless(x, float("-inf"), True)


def _threads(num_warps, num_blocks):
    return 32 * num_warps * num_blocks


@wrong("register_budget", "no thread has more than 255")
def forgets_the_limit_of_a_thread(num_warps, num_blocks):
    return 65_536 // _threads(num_warps, num_blocks) // 8 * 8


@wrong("register_budget", "a thread in units of 8")
def forgets_the_unit(num_warps, num_blocks):
    return min(255, 65_536 // _threads(num_warps, num_blocks))


@wrong("register_budget", "80 warps are more than the 64")
def forgets_the_warps(num_warps, num_blocks):
    return min(255, 65_536 // _threads(num_warps, num_blocks) // 8 * 8)


@wrong("register_budget", "all 4 blocks share the registers")
def counts_one_block(num_warps, num_blocks):
    return min(255, 65_536 // _threads(num_warps, 1) // 8 * 8)


@wrong("matmul_traffic", "C is written, too")
def only_reads(M, N, K, block_m, block_n):
    return M * K * triton.cdiv(N, block_n) + K * N * triton.cdiv(M, block_m)


@wrong("matmul_traffic", "A is read for each column of tiles")
def swaps_rows_and_columns(M, N, K, block_m, block_n):
    return M * K * triton.cdiv(M, block_m) + K * N * triton.cdiv(N, block_n) + M * N


@wrong("matmul_traffic", "round up")
def rounds_down(M, N, K, block_m, block_n):
    return M * K * (N // block_n) + K * N * (M // block_m) + M * N


@wrong("matmul_traffic", "masked, and not read")
def reads_past_the_edge(M, N, K, block_m, block_n):
    tiles = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    return tiles * (block_m * K + K * block_n) + M * N


@wrong("store", "no kernel was launched")
def copies_by_index(k, v, k_cache, v_cache, rows):
    kept = rows >= 0
    k_cache[rows[kept]], v_cache[rows[kept]] = k[kept], v[kept]


@triton.jit
def _copy_row_kernel(
    x_ptr, y_ptr, cache_ptr, other_ptr, rows_ptr, width, BLOCK: tl.constexpr, BOTH: tl.constexpr, SKIP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    row, column = tl.load(rows_ptr + tl.program_id(0)), tl.arange(0, BLOCK)
    there = column < (width if MASKED else BLOCK)
    if row >= 0 or not SKIP:
        row = (row + 7) % 7  # -1 is the last row, as in Python
        place = tl.program_id(0) * width + column
        tl.store(cache_ptr + row * width + column, tl.load(x_ptr + place, mask=column < width, other=0.0), mask=there)
        if BOTH:
            tl.store(other_ptr + row * width + column, tl.load(y_ptr + place, mask=column < width), mask=there)


def _store(k, v, k_cache, v_cache, rows, both=True, skip=True, masked=True):
    width, sizes = k.shape[1], {"BOTH": both, "SKIP": skip, "MASKED": masked}
    block = triton.next_power_of_2(width)
    launch(_copy_row_kernel, (len(k),), k, v, k_cache, v_cache, rows, width, BLOCK=block, **sizes)


@wrong("store", "2 launches, and one kernel can store both")
def launches_twice(k, v, k_cache, v_cache, rows):
    _store(k, v, k_cache, v_cache, rows, both=False)
    _store(v, k, v_cache, k_cache, rows, both=False)


@wrong("store", "row -1 was written to the last row")
def writes_to_the_last_row(k, v, k_cache, v_cache, rows):
    _store(k, v, k_cache, v_cache, rows, skip=False)


@wrong("store", "v_cache does not hold the rows")
def forgets_the_values(k, v, k_cache, v_cache, rows):
    _store(k, v, k_cache, v_cache, rows, both=False)


@wrong("store", "belongs to no token and was changed")
def writes_past_the_width(k, v, k_cache, v_cache, rows):
    _store(k, v, k_cache, v_cache, rows, masked=False)
