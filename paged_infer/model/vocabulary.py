"""The embedding and the head of a decoder, which have a row for each token of the vocabulary: whole or sharded.

Rank r of N holds rows r P .. (r + 1) P - 1, P = ceil(V / N); the last rank's table ends in padding, which is zero.

    embedding    rows of other ranks are zero, so the sum over ranks is the row         one ``all_reduce``
    head         each rank has the logits of its rows; all have all                     one ``all_gather``
"""

from __future__ import annotations

import torch
from torch import Tensor

from paged_infer.model.layers import Embedding
from paged_infer.model.linear import Linear
from paged_infer.model.parallel import Collective


class Head(Linear):
    """hidden [R, hidden] -> logits [R, V]."""

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``out``: [R, V], which is written and returned."""
        return super().forward(x) if out is None else torch.mm(x, self.weight.t(), out=out)


class ShardedEmbedding(Embedding):
    """One rank's rows of the table. ``weight`` [P, dim]."""

    def __init__(self, num_rows: int, dim: int, parallel: Collective) -> None:
        super().__init__(rows_of_rank(num_rows, parallel), dim)
        self.parallel, self.num_rows = parallel, rows_of_rank(num_rows, parallel)

    def forward(self, ids: Tensor) -> Tensor:  # [T] -> [T, dim]
        rows = ids - self.parallel.rank * self.num_rows
        is_others = (rows < 0) | (rows >= self.num_rows)
        x = super().forward(rows.masked_fill(is_others, 0))
        return self.parallel.all_reduce(x.masked_fill(is_others[:, None], 0))


class ShardedHead(Head):
    """One rank's rows of the matrix, [P, hidden], and the logits of all ranks."""

    def __init__(self, in_features: int, vocab_size: int, parallel: Collective) -> None:
        super().__init__(in_features, rows_of_rank(vocab_size, parallel), bias=False)
        self.parallel, self.vocab_size = parallel, vocab_size

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        parts = self.parallel.all_gather(super().forward(x))  # [N, R, P]
        logits = parts.transpose(0, 1).flatten(1)[:, : self.vocab_size]
        return logits.contiguous() if out is None else out.copy_(logits)


def make_embedding(vocab_size: int, dim: int, parallel: Collective) -> Embedding:
    return Embedding(vocab_size, dim) if parallel.size == 1 else ShardedEmbedding(vocab_size, dim, parallel)


def make_head(dim: int, vocab_size: int, parallel: Collective) -> Head:
    return Head(dim, vocab_size, bias=False) if parallel.size == 1 else ShardedHead(dim, vocab_size, parallel)


def rows_of_rank(vocab_size: int, parallel: Collective) -> int:
    """P, with padding."""
    return -(-vocab_size // parallel.size)
