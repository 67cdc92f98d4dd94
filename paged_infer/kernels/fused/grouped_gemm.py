"""``fused.moe``'s experts in Triton: a grouped product, in which each block of rows belongs to one expert.

    expert     pairs (token t, rank r -> t k + r) in blocks of ROWS = 4          "-" is no pair
    0          [ 1  6  8  - ]
    1
    2          [ 0  2  5  7 ]  [ 9  -  -  - ]             expert_of_block = [0, 2, 2], num_blocks = 3

A program multiplies one block by some columns of its expert's matrix, gathers the rows of x by ``pair // k`` and writes
to row ``pair``, so that nothing else is sorted (vLLM: ``moe_align_block_size`` and ``fused_moe_kernel``). The device
plans the blocks. The host reads nothing, and launches as many programs as there can be blocks; those beyond
``num_blocks`` return. So a CUDA graph can hold all of it.

The bits of a row depend neither on its place in a block nor on the other rows: a tile's height changes with the number
of pairs, its depth does not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from paged_infer.kernels.checks import FLOATS, layouts, on_one_device, shapes
from paged_infer.kernels.fused.moe import ExpertsProduct, ExpertWeights
from paged_infer.kernels.triton_runtime import launch, must_widen, tl, triton

SCAN = 512  # ids that a program of the plan reads at a time


class ExpertPlan(NamedTuple):
    """Which pairs each block has; what lies beyond ``num_blocks`` is unset."""

    pairs: Tensor  # [max_blocks * rows] int32; the number of pairs where a block has none
    expert_of_block: Tensor  # [max_blocks] int32
    num_blocks: Tensor  # [1] int32
    num_pairs: int
    rows: int


def grouped_experts(weights: ExpertWeights) -> ExpertsProduct:
    """The experts as Triton kernels.

    Raises:
        ValueError: stacks that are not contiguous or do not fit each other.
    """
    up, down = weights.up, weights.down
    num_experts, wide, hidden = up.shape
    if down.shape != (num_experts, hidden, wide // 2) or wide % 2:
        raise ValueError(f"experts are up [E, 2 I, hidden] and down [E, hidden, I]; got {shapes(up=up, down=down)}")
    if up.dtype not in FLOATS or not up.is_contiguous() or not down.is_contiguous() or up.dtype != down.dtype:
        raise ValueError(f"experts must be contiguous and of one float dtype; got {layouts(up=up, down=down)}")

    def product(x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        ids = ids.contiguous()
        plan = plan_experts(ids, num_experts)
        wide = grouped_linear(x, up, weights.up_bias, plan, per_row=ids.shape[1])
        out = grouped_linear(weights.glu(wide), down, weights.down_bias, plan, per_row=1)
        return expert_sum(out, ids, scores)

    return product


def plan_experts(ids: Tensor, num_experts: int) -> ExpertPlan:
    """ids [T, k], contiguous; -1 is in no block. All on the device."""
    num_pairs = ids.numel()
    rows = 64 if num_pairs >= 64 * num_experts else 16
    max_blocks = min(num_pairs, num_pairs // rows + num_experts)
    sizes = (num_experts, num_pairs, max_blocks * rows, max_blocks, 1)
    counts, place, pairs, expert_of_block, num_blocks = (ids.new_empty(n, dtype=torch.int32) for n in sizes)
    launch(_count_kernel, (num_experts,), ids, counts, place, num_pairs, SCAN=SCAN)
    launch(
        _place_kernel,
        (num_experts,),
        *(ids, counts, place, pairs, expert_of_block, num_blocks, num_pairs, max_blocks, num_experts),
        EXPERTS=triton.next_power_of_2(num_experts),
        ROWS=rows,
        SCAN=SCAN,
    )
    return ExpertPlan(pairs, expert_of_block, num_blocks, num_pairs, rows)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: ExpertPlan, per_row: int) -> Tensor:
    """Each pair's row of x times its expert's matrix.

    Args:
        x: [num_pairs / per_row, in], rows with any stride: pair p reads row p // per_row.
        weight, bias: [E, out, in] and [E, out] or None.
        plan: of the pairs.

    Returns:
        [num_pairs, out]; rows of pairs that route nowhere are unset.

    Raises:
        ValueError: x is of another dtype, device or width, or its rows have gaps.
    """
    _, height, depth = weight.shape
    rows = plan.num_pairs // per_row
    if x.shape != (rows, depth) or x.dtype != weight.dtype or x.stride(1) != 1 or not on_one_device(x=x, weight=weight):
        raise ValueError(
            f"x must be [{rows}, {depth}] and fit the experts; got {shapes(x=x)}, {layouts(x=x, w=weight)}"
        )
    out = x.new_empty(plan.num_pairs, height)
    columns = 64
    launch(
        _grouped_kernel,
        (plan.expert_of_block.numel(), triton.cdiv(height, columns)),
        *(out, x, weight, weight if bias is None else bias, plan.pairs, plan.expert_of_block, plan.num_blocks),
        *(plan.num_pairs, x.stride(0), height, depth),
        PER_ROW=per_row,
        HAS_BIAS=bias is not None,
        ROWS=plan.rows,
        COLUMNS=columns,
        DEPTH=32 if x.dtype == torch.float32 else 64,
        WIDEN=must_widen(x),
    )
    return out


def expert_sum(by_pair: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
    """by_pair [T * k, hidden], ids and scores [T, k] -> [T, hidden], in float32 and in the order of the ranks."""
    width, (num_tokens, top_k) = by_pair.shape[1], ids.shape
    out = by_pair.new_empty(num_tokens, width)
    block = min(triton.next_power_of_2(max(width, 1)), 1024)
    grid = (num_tokens, triton.cdiv(width, block))
    launch(_sum_kernel, grid, out, by_pair, ids, scores.contiguous(), width, TOP_K=top_k, BLOCK=block)
    return out


@triton.jit
def _count_kernel(ids, counts, place, num_pairs, SCAN: tl.constexpr):  # one program: the pairs of one expert
    expert = tl.program_id(0)
    count = 0
    for first in range(0, num_pairs, SCAN):
        pair = first + tl.arange(0, SCAN)
        is_own = (tl.load(ids + pair, mask=pair < num_pairs, other=-1) == expert).to(tl.int32)
        tl.store(place + pair, count + tl.cumsum(is_own, 0) - 1, mask=is_own != 0)  # among the pairs of the expert
        count += tl.sum(is_own, 0)
    tl.store(counts + expert, count)


@triton.jit
def _place_kernel(
    ids, counts, place, pairs, expert_of_block, num_blocks, num_pairs, max_blocks, num_experts,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip  # one program: the blocks of one expert
    expert, every = tl.program_id(0), tl.arange(0, EXPERTS)
    count = tl.load(counts + every, mask=every < num_experts, other=0)
    blocks = (count + ROWS - 1) // ROWS
    first = tl.sum(tl.where(every < expert, blocks, 0), 0)
    own = tl.sum(tl.where(every == expert, blocks, 0), 0)
    filled = tl.sum(tl.where(every == expert, count, 0), 0)
    tl.store(num_blocks, tl.sum(blocks, 0), mask=expert == 0)
    for start in range(0, max_blocks, SCAN):
        block = start + tl.arange(0, SCAN)
        tl.store(expert_of_block + first + block, expert, mask=block < own)
    row = filled + tl.arange(0, ROWS)
    tl.store(pairs + first * ROWS + row, num_pairs, mask=row < own * ROWS)  # the rest of the last block
    for start in range(0, num_pairs, SCAN):
        pair = start + tl.arange(0, SCAN)
        is_own = tl.load(ids + pair, mask=pair < num_pairs, other=-1) == expert
        at = tl.load(place + pair, mask=is_own, other=0)
        tl.store(pairs + first * ROWS + at, pair, mask=is_own)


@triton.jit
def _grouped_kernel(
    out, x, weight, bias, pairs, expert_of_block, num_blocks, num_pairs, x_stride, height, depth,
    PER_ROW: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip  # one program: a block of rows times COLUMNS rows of its expert's matrix
    block = tl.program_id(0)
    if block < tl.load(num_blocks):
        expert = tl.load(expert_of_block + block).to(tl.int64)
        pair = tl.load(pairs + block * ROWS + tl.arange(0, ROWS))
        is_pair = pair < num_pairs
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < height
        k = tl.arange(0, DEPTH)
        rows = x + (pair // PER_ROW).to(tl.int64)[:, None] * x_stride + k[None, :]
        matrix = weight + expert * height * depth + column.to(tl.int64)[None, :] * depth + k[:, None]
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, depth, DEPTH):
            some = k < depth - start
            a = tl.load(rows + start, mask=is_pair[:, None] & some[None, :], other=0.0)
            b = tl.load(matrix + start, mask=some[:, None] & inside[None, :], other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision="ieee")
        if HAS_BIAS:
            total += tl.load(bias + expert * height + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        to = out + pair.to(tl.int64)[:, None] * height + column[None, :]
        tl.store(to, total.to(out.dtype.element_ty), mask=is_pair[:, None] & inside[None, :])


@triton.jit
def _sum_kernel(out, by_pair, ids, scores, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)  # one program: BLOCK columns of a token
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for rank in range(TOP_K):
        pair = token * TOP_K + rank
        if tl.load(ids + pair) >= 0:
            row = tl.load(by_pair + pair * width + column, mask=column < width, other=0.0).to(tl.float32)
            total += tl.load(scores + pair).to(tl.float32) * row
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=column < width)
