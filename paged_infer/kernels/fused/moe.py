"""The experts of a mixture: a token's row passes through the k gated MLPs that its router chose, and they are summed.

    x [T, hidden], ids [T, k], scores [T, k]  ->  out[t] = sum over r of scores[t, r] * expert[ids[t, r]](x[t])

Three ways to compute it, each made by a function of ``ExpertWeights``:

- ``loop_experts``: a loop over the experts that are hit; the reference;
- ``sort_experts``: the T * k pairs are sorted by expert, so that the rows of one expert are adjacent (Gale 2022,
  MegaBlocks, section 3); here in torch, in C in ``cpu.experts``;
- ``grouped_experts`` (``fused.grouped_gemm``): the sorted rows in blocks of one expert each, as one Triton kernel.

In all of them the bits of a row depend neither on the other rows nor on their number: a product sums in an order that
the number of rows does not change, and a token's experts are added in the order of their rank. An id of -1 routes
nowhere: it computes nothing and adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 16  # of one product in ``blocked_linear``

# (x [T, hidden], ids [T, k] int64, scores [T, k] float32) -> [T, hidden]
ExpertsProduct = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """E experts of width I as stacks.

    Attributes:
        up: [E, 2 I, hidden]; of each expert the rows of its gate, then those of its up projection.
        down: [E, hidden, I].
        up_bias, down_bias: [E, 2 I] and [E, hidden], or None.
        glu: gate and up [P, 2 I] -> [P, I], such as ``silu_mul``.
    """

    up: Tensor
    down: Tensor
    glu: Callable[[Tensor], Tensor]
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def __len__(self) -> int:
        return self.up.shape[0]

    def expert(self, index: int, x: Tensor) -> Tensor:
        """x [P, hidden] through one expert: [P, hidden]."""
        up_bias = None if self.up_bias is None else self.up_bias[index]
        down_bias = None if self.down_bias is None else self.down_bias[index]
        return blocked_linear(self.glu(blocked_linear(x, self.up[index], up_bias)), self.down[index], down_bias)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertProducts:
    """E experts as one product each for ``up`` and ``down``, biases included; for quantised weights."""

    up: list[Callable[[Tensor], Tensor]]
    down: list[Callable[[Tensor], Tensor]]
    glu: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.up)

    def expert(self, index: int, x: Tensor) -> Tensor:
        """x [P, hidden] through one expert: [P, hidden]."""
        return self.down[index](self.glu(self.up[index](x)))


PackExperts = Callable[[ExpertWeights], ExpertsProduct]


def loop_experts(weights: ExpertWeights) -> ExpertsProduct:
    """One expert after the other, over the tokens that chose it."""

    def product(x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        by_rank = x.new_zeros(*ids.shape, x.shape[1])
        for expert in ids.unique().tolist():
            if expert >= 0:
                token, rank = torch.where(ids == expert)
                by_rank[token, rank] = weights.expert(expert, x[token])
        return weighted_sum(by_rank, scores)

    return product


def sort_experts(weights: ExpertWeights | ExpertProducts) -> ExpertsProduct:
    """Sort the pairs by expert, gather their rows once, and multiply one segment of rows for each expert."""

    def product(x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        experts = torch.arange(len(weights), device=x.device)
        sorted_ids, order = ids.flatten().sort(stable=True)
        ends = torch.searchsorted(sorted_ids, experts, right=True).tolist()
        first = int(torch.searchsorted(sorted_ids, 0))  # the pairs before it route nowhere
        rows = x[order // ids.shape[1]]
        out = torch.zeros_like(rows)
        for expert, (start, end) in enumerate(pairwise((first, *ends))):
            if start < end:
                out[start:end] = weights.expert(expert, rows[start:end])
        by_rank = torch.empty_like(out).index_copy_(0, order, out).view(*ids.shape, x.shape[1])
        return weighted_sum(by_rank, scores)

    return product


def weighted_sum(by_rank: Tensor, scores: Tensor) -> Tensor:
    """by_rank [T, k, hidden], scores [T, k] -> [T, hidden], in float32 and in the order of the ranks."""
    weighted = by_rank * scores[..., None]
    total = weighted[:, 0]
    for rank in range(1, scores.shape[1]):
        total = total + weighted[:, rank]
    return total.to(by_rank.dtype)


def blocked_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` by products of ``ROWS`` rows each, the last one padded.

    A library chooses the order of a sum by the shape of the product, so with the number of rows a row's bits change.
    In a product of one shape they depend neither on the row's place nor on the other rows.
    """
    padded = F.pad(x, (0, 0, 0, -len(x) % ROWS))
    return torch.cat([F.linear(rows, weight, bias) for rows in padded.split(ROWS)])[: len(x)]
