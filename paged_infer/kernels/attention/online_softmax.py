"""From softmax(q k^T / sqrt(d)) v to FlashAttention's tiles, in five steps that count their memory traffic.

One head: q [N, d], k and v [M, d]; the queries are the last N of M tokens, so the causal diagonal ends at the last key.
Every step returns the same numbers. They differ in the traffic between HBM, which is large and slow, and fast memory (a
GPU's registers and shared memory), which is small and feeds the arithmetic:

    step                      scores and weights                             HBM traffic, elements, N = M
    naive_attention           written out whole; exp overflows past 88       4 N^2 + 4 N d
    safe_softmax_attention    written out whole; three passes find them      6 N^2 + 4 N d
    online_softmax            read once, in pieces                           the recurrence alone
    online_attention          never leave fast memory, one query at a time   2 N^2 d + 2 N d
    tiled_attention           never leave fast memory, block_q queries       2 N^2 d / block_q + 2 N d

In this file an upper-case name is a matrix in HBM and a lower-case name is a tensor in fast memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

ALL_ROWS = slice(None)


# -- Counting traffic ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Traffic:
    """Elements moved from HBM to fast memory (read) and back (written)."""

    num_read: int = 0
    num_written: int = 0

    @property
    def num_moved(self) -> int:
        return self.num_read + self.num_written


class InHBM:
    """A matrix in HBM. Only its shape can be read for free; ``load`` and ``store`` move rows and count them.

    The algorithms below get these instead of tensors, so no access goes uncounted.
    """

    __slots__ = ("_matrix", "_traffic", "shape")

    def __init__(self, matrix: Tensor, traffic: Traffic) -> None:
        self._matrix, self._traffic, self.shape = matrix, traffic, matrix.shape

    def load(self, rows: slice | int = ALL_ROWS) -> Tensor:
        """A copy of those rows in fast memory: [n, width], or [width] for one row."""
        tile = self._matrix[rows].clone()
        self._traffic.num_read += tile.numel()
        return tile

    def store(self, tile: Tensor, rows: slice | int = ALL_ROWS) -> None:
        """Overwrite those rows. Broadcasting is refused: it would write more than is counted."""
        if tile.shape != self._matrix[rows].shape:
            raise ValueError(f"a tile of {list(tile.shape)} does not fill {list(self._matrix[rows].shape)}")
        self._traffic.num_written += tile.numel()
        self._matrix[rows] = tile

    def reserve(self, num_rows: int, width: int) -> InHBM:
        """Another matrix in the same HBM, uninitialised. Nothing moves yet."""
        return InHBM(self._matrix.new_empty(num_rows, width), self._traffic)


Options = ParamSpec("Options")
Algorithm = Callable[Concatenate[InHBM, InHBM, InHBM, Options], InHBM]
Counted = Callable[Concatenate[Tensor, Tensor, Tensor, Options], tuple[Tensor, Traffic]]


def counted(algorithm: Algorithm[Options]) -> Counted[Options]:
    """Make an algorithm take tensors, which are put in an HBM of its own, and return (output, traffic)."""

    @wraps(algorithm)
    def run(
        q: Tensor, k: Tensor, v: Tensor, /, *args: Options.args, **options: Options.kwargs
    ) -> tuple[Tensor, Traffic]:
        if q.dim() != 2 or k.dim() != 2 or k.shape != v.shape or q.shape[1] != k.shape[1] or not len(k):
            raise ValueError(f"one head has q [N, d], k and v [M, d], M >= 1: got {[list(x.shape) for x in (q, k, v)]}")
        traffic = Traffic()
        Q, K, V = (InHBM(x, traffic) for x in (q, k, v))
        return algorithm(Q, K, V, *args, **options)._matrix, traffic

    return run


# -- 1. As written ---------------------------------------------------------------------------------------------------


@counted
def naive_attention(Q: InHBM, K: InHBM, V: InHBM, *, causal: bool = False) -> InHBM:
    """softmax(q k^T / sqrt(d)) v as the formula has it (Vaswani 2017, eq. 1; Dao 2022, algorithm 0).

    Its exponentials overflow: in float32 a score above 88.7 gives inf / inf = NaN, as does a row that sees no key.

    Traffic: reads N d + 2 M d + 2 N M, writes N d + 2 N M. This favours it: each product reads its operands once, as
    if fast memory held a whole matrix.
    """
    N, M, d = _sizes(Q, K)
    S, P, OUT = Q.reserve(N, M), Q.reserve(N, M), Q.reserve(N, d)  # scores, weights, output

    S.store(_scores(Q.load(), K.load(), causal, M - N))
    exponentials = S.load().exp()  # [N, M]
    P.store(exponentials / exponentials.sum(-1, keepdim=True))
    OUT.store(P.load() @ V.load())
    return OUT


# -- 2. Safe ---------------------------------------------------------------------------------------------------------


@counted
def safe_softmax_attention(Q: InHBM, K: InHBM, V: InHBM, *, causal: bool = False) -> InHBM:
    """The same, after each row's maximum is subtracted from its scores (Milakov & Gimelshein 2018, algorithm 2).

    softmax(s) = softmax(s - m) for any m, and with m = max(s) no exponential exceeds 1. The price: a row too long for
    fast memory is read three times, for its maximum, for its sum, and for its weights.

    Traffic: reads N d + 2 M d + 4 N M, writes N d + 2 N M.
    """
    N, M, d = _sizes(Q, K)
    S, P, OUT = Q.reserve(N, M), Q.reserve(N, M), Q.reserve(N, d)

    S.store(_scores(Q.load(), K.load(), causal, M - N))
    for i in range(N):
        peak = _finite(S.load(i).max())
        total = (S.load(i) - peak).exp().sum()
        P.store(_divide((S.load(i) - peak).exp(), total), i)
    OUT.store(P.load() @ V.load())
    return OUT


# -- 3. Online -------------------------------------------------------------------------------------------------------


def absorb(peak: Tensor, total: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The recurrence behind everything below: add more scores, without the earlier ones.

        peak'  = max(peak, max(scores))
        total' = total exp(peak - peak') + sum(exp(scores - peak'))

    Args:
        peak: the largest score so far, [...]; -inf before the first (m in the papers).
        total: the sum of exp(score - peak) over the scores so far, [...]; 0 before the first (their l or d).
        scores: [..., n], n >= 1; -inf for a key that is hidden.

    Returns:
        peak' and total'; the weights exp(scores - peak') [..., n]; and exp(peak - peak') [...], the factor for
        every sum that was weighted with the old peak. Milakov & Gimelshein 2018, algorithm 3, lines 4-5, for one score;
        for a tile, Dao 2022, section 3.1.
    """
    new_peak = torch.maximum(peak, scores.amax(-1))
    shift = _finite(new_peak)
    shrink = (peak - shift).exp()
    weights = (scores - shift[..., None]).exp()
    return new_peak, total * shrink + weights.sum(-1), weights, shrink


def online_softmax(stream: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """(peak, total) of scores that are read once, in pieces of any length [n]; an empty stream gives (-inf, 0).

    With them softmax(s) = exp(s - peak) / total for any score s, and the log-sum-exp is peak + log(total): one pass
    where the safe softmax needs two (Milakov & Gimelshein 2018, algorithm 3). It moves nothing itself; a stream of
    ``S.load(...)`` counts its own traffic.
    """
    peak, total = torch.tensor(-math.inf), torch.tensor(0.0)
    for scores in stream:
        if scores.numel():
            peak, total, _, _ = absorb(peak, total, scores)
    return peak, total


@counted
def online_attention(Q: InHBM, K: InHBM, V: InHBM, *, block_k: int = 1, causal: bool = False) -> InHBM:
    """One query at a time, its keys ``block_k`` at a time; the output so far is rescaled as the sum of the softmax is.

    No score reaches HBM, and memory apart from the output is constant (Rabe & Staats 2021). But every query reads all
    of its keys and values again: 2 M d elements per row, where the naive algorithm moves 4 M: worse, for any real d.

    Traffic: reads N d + 2 d (keys seen, summed over queries), writes N d. ``block_k`` does not change it.
    """
    N, M, d = _sizes(Q, K)
    OUT = Q.reserve(N, d)
    for i in range(N):
        q = Q.load(i)  # [d]
        peak, total, out = q.new_full((), -math.inf), q.new_zeros(()), torch.zeros_like(q)
        for keys in _blocks(_num_seen(i, causal, N, M), block_k):
            scores = K.load(keys) @ q / math.sqrt(d)  # [n]
            peak, total, weights, shrink = absorb(peak, total, scores)
            out = out * shrink + weights @ V.load(keys)
        OUT.store(_divide(out, total), i)
    return OUT


# -- 4. Tiled --------------------------------------------------------------------------------------------------------


def tile_sizes(fast_elements: int, head_dim: int) -> tuple[int, int]:
    """(block_q, block_k) such that all that ``tiled_attention`` holds at once fits ``fast_elements``.

    Traffic depends on block_q alone, so block_q is as large as possible and block_k at most d. A fifth of the memory
    each for q, out, the keys, the values and the scores, besides the peak and total of each row:

        2 block_q d + 2 block_k d + block_q block_k + 2 block_q <= block_q (5 d + 2) <= fast_elements

    Dao 2022, algorithm 1, line 1 uses quarters (its scores are extra), and q and k are swapped, as its loops are.

    Raises:
        ValueError: not even one query and one key fit.
    """
    block_q = fast_elements // (5 * head_dim + 2)
    if block_q < 1:
        raise ValueError(
            f"fast memory of {fast_elements} elements is too small for a tile of head_dim {head_dim}: "
            f"{5 * head_dim + 2} are needed"
        )
    return block_q, min(block_q, head_dim)


@counted
def tiled_attention(Q: InHBM, K: InHBM, V: InHBM, *, block_q: int, block_k: int, causal: bool = False) -> InHBM:
    """FlashAttention's forward pass (Dao 2022, algorithm 1, in FlashAttention-2's loop order: Dao 2023, algorithm 1).

                    K, V  read once for each block of queries
                       +----+----+----+----+
              Q        | k0 | k1 | k2 | k3 |      OUT
            +----+     +----+----+----+----+     +----+
    outer   | q0 |     | -> | -> | -> | -> |  -> | o0 |
    loop    | q1 |     | -> | -> | -> | -> |  -> | o1 |   written once
      |     | q2 |     | -> | -> | -> | -> |  -> | o2 |
      v     +----+     +----+----+----+----+     +----+
         read once     inner loop: a tile of scores [block_q, block_k] is made,
                       absorbed into peak, total and out, and dropped

    ``online_attention`` with block_q queries to share each key read: 2 d M elements for each of N / block_q blocks.
    With block_q from ``tile_sizes`` that is about 10 N M d^2 / fast_elements: theorem 2's Theta(N^2 d^2 / M_fast).

    Traffic: reads N d + 2 d (keys seen by the last query of each block, summed), writes N d.
    """
    N, M, d = _sizes(Q, K)
    OUT = Q.reserve(N, d)
    for queries in _blocks(N, block_q):
        q = Q.load(queries)  # [n, d]
        peak, total = q.new_full(q.shape[:1], -math.inf), q.new_zeros(q.shape[:1])  # [n]
        out = torch.zeros_like(q)  # [n, d]
        for keys in _blocks(_num_seen(queries.stop - 1, causal, N, M), block_k):
            # The first row of the tile is the query that sees keys up to M - N + queries.start.
            scores = _scores(q, K.load(keys), causal, M - N + queries.start - keys.start)  # [n, b]
            peak, total, weights, shrink = absorb(peak, total, scores)
            out = out * shrink[:, None] + weights @ V.load(keys)
        OUT.store(_divide(out, total[:, None]), queries)
    return OUT


# -- Small parts -----------------------------------------------------------------------------------------------------


def _sizes(Q: InHBM, K: InHBM) -> tuple[int, int, int]:
    """N queries, M keys, head_dim d."""
    return Q.shape[0], K.shape[0], K.shape[1]


def _scores(q: Tensor, k: Tensor, causal: bool, diagonal: int) -> Tensor:
    """q k^T / sqrt(d) [n, b]; causal: -inf where key j comes after query i, that is where j > i + diagonal."""
    scores = q @ k.T / math.sqrt(q.shape[1])
    if causal:
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(diagonal + 1)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores


def _num_seen(query: int, causal: bool, N: int, M: int) -> int:
    """Number of keys that a query sees: the first ones, up to its own."""
    return max(0, query + 1 + M - N) if causal else M


def _blocks(length: int, block: int) -> Iterator[slice]:
    """0..length in steps of ``block``; the last one may be shorter."""
    if block < 1:
        raise ValueError(f"a block of {block} rows: at least 1 is needed")
    return (slice(start, min(start + block, length)) for start in range(0, length, block))


def _finite(peak: Tensor) -> Tensor:
    """A peak to subtract: 0 for a row that has seen no key. Its peak is -inf, and -inf - (-inf) would be NaN."""
    return torch.where(peak == -math.inf, 0.0, peak)


def _divide(out: Tensor, total: Tensor) -> Tensor:
    """out / total; 0 for a row that has seen no key, where both are 0."""
    return out / torch.where(total == 0, 1.0, total)
