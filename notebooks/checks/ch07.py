"""Checkers of chapter 07, FlashAttention."""

from __future__ import annotations

import math

import torch

from checks import checker, expect, expect_tensor


def _state(scores, values):
    """(row_max [n], row_sum [n], out [n, D]) of scores [n, m] and values [m, D], all at once; m may be 0."""
    if not scores.shape[1]:
        n = scores.shape[0]
        return torch.full((n,), -math.inf), torch.zeros(n), torch.zeros(n, values.shape[1])
    row_max = scores.amax(dim=1)
    weights = (scores - row_max[:, None]).exp()
    return row_max, weights.sum(dim=1), weights @ values


@checker
def merge_states(answer):
    """Two states (row_max [n], row_sum [n], out [n, D]) of different keys -> the state of all keys."""
    generator = torch.Generator().manual_seed(4)
    scores = 3 * torch.randn(5, 9, generator=generator)  # n, D and the number of keys differ
    scores[:, 4] += torch.tensor([6.0, -6.0, 6.0, -6.0, 0.0])  # now the left half has the maximum, now the right
    values = torch.randn(9, 2, generator=generator)
    halves = _state(scores[:, :6], values[:6]), _state(scores[:, 6:], values[6:])
    whole = _state(scores, values)

    def merged(left, right):
        found = answer(*(tuple(part.clone() for part in state) for state in (left, right)))
        expect(found is not None, "merge_states gives None: is the `return` missing?")
        expect(
            isinstance(found, (tuple, list)) and len(found) == 3,
            "merge_states gives something else than the three parts of a state: row_max, row_sum and out",
        )
        for part, like, name in zip(found, left, ("row_max", "row_sum", "out"), strict=True):
            expect_tensor(part, like, f"the {name} of two states of 5 rows with D = 2")
        return found

    (left, right), found = halves, merged(*halves)
    expect(torch.equal(found[0], whole[0]), "row_max is not the larger of the two")
    expect(
        not torch.allclose(found[1], left[1] + right[1], rtol=1e-5),
        "the sums were added as they are, but each belongs to its own maximum: rescale both first",
    )
    expect(torch.allclose(found[1], whole[1], rtol=1e-5), "row_sum is not that of all keys together")
    expect(
        not torch.allclose(found[2], left[2] + right[2], rtol=1e-5),
        "the outs were added as they are, but each belongs to its own maximum: rescale both first",
    )
    outputs = left[2] / left[1][:, None], right[2] / right[1][:, None]
    expect(
        not torch.allclose(found[2], sum(outputs) / 2, rtol=1e-4),
        "the two outputs were averaged, but the half with the larger weights counts for more",
    )
    expect(
        not torch.allclose(found[2], whole[2] / whole[1][:, None], rtol=1e-4),
        "out was divided by the sum already: a state holds the sum, so that it can be merged again",
    )
    expect(torch.allclose(found[2], whole[2], rtol=1e-4, atol=1e-6), "out is not that of all keys together")
    empty = _state(scores[:, :0], values[:0])
    for name, pair in {"left": (empty, right), "right": (left, empty), "left and the right": (empty, empty)}.items():
        seen = [state for state in pair if state is not empty]
        like = seen[0] if seen else empty
        parts = merged(*pair)
        expect(
            not any(part.isnan().any() for part in parts),
            f"with the {name} having seen nothing there is NaN: -inf - (-inf) was taken",
        )
        expect(
            all(torch.allclose(part, good, rtol=1e-5) for part, good in zip(parts, like, strict=True)),
            f"with the {name} having seen nothing the state is not that of the rest",
        )


@checker
def causal_traffic(answer):
    """N queries, M keys, d, block_q -> elements that causal tiles move."""

    def seen_by_blocks(N, M, block_q):
        return [M - N + min(start + block_q, N) for start in range(0, N, block_q)]

    for N, M, d, block_q in ((8, 8, 2, 4), (12, 20, 3, 4), (13, 20, 3, 4), (1, 7, 5, 16)):
        found = answer(N, M, d, block_q)
        asked = f"causal_traffic({N}, {M}, {d}, {block_q})"
        expect(found is not None, f"{asked} gives None: is the `return` missing?")
        blocks = seen_by_blocks(N, M, block_q)
        right = 2 * N * d + 2 * d * sum(blocks)
        likely = {
            2 * N * d
            + 2 * d * len(blocks) * M: "every block reads all keys: the mask hides those after its last query",
            2 * N * d + d * sum(blocks): "only the keys are read, or only the values: each is d numbers wide",
            2 * d * sum(blocks): "the keys and values alone: q is read and the output written, too",
            N * d + 2 * d * sum(blocks): "q is read once and the output is written once, and one of them is missing",
            2 * N * d
            + 2
            * d
            * sum(seen_by_blocks(N, N, block_q)): "the M - N tokens before the first query are seen by all queries",
            2 * N * d + 2 * d * sum(min(M - N + start + block_q, M + block_q) for start in range(0, N, block_q)): (
                "the last block is not full, and sees no key after the last query"
            ),
            2 * N * d + 2 * d * sum(blocks[: N // block_q]): "the last block is not full, but it reads keys, too",
        }
        fault = likely.get(found, f"{right} is what tiled_attention counts")
        expect(found == right, f"{asked} gives {found}: {fault}")


@checker
def key_tiles(answer):
    """first, last, window, block_k -> the beginnings of the tiles that hold a seen key."""
    for first, last, window, block_k in (
        (0, 15, 100, 16),
        (32, 47, 16, 16),
        (20, 27, 5, 8),
        (5, 9, 3, 4),
        (64, 79, 1, 16),
        (17, 17, 2, 16),
        (23, 40, 9, 5),
    ):
        found = answer(first, last, window, block_k)
        asked = f"key_tiles({first}, {last}, {window}, {block_k})"
        expect(found is not None, f"{asked} gives None: is the `return` missing?")
        found = [int(begin) for begin in found]
        seen = {key for query in range(first, last + 1) for key in range(max(0, query - window + 1), query + 1)}
        right = sorted({key // block_k * block_k for key in seen})
        keys = range(max(0, last - window + 1), last + 1)
        last_only = sorted({key // block_k * block_k for key in keys})
        one_more = sorted({key // block_k * block_k for key in {*seen, max(0, first - window)}})
        expect(
            all(begin % block_k == 0 for begin in found),
            f"{asked} gives {found}: tiles begin at multiples of {block_k}",
        )
        expect(not any(begin < 0 for begin in found), f"{asked} gives {found}: no key stands before 0")
        expect(
            found == right or found != last_only,
            f"{asked} gives {found}: that is what query {last} sees; query {first} looks further back",
        )
        expect(
            found == right or found != one_more,
            f"{asked} gives {found}: a window counts the query itself, so it reaches back {window - 1}",
        )
        expect(
            found == right or not set(right) < set(found) or max(found) <= last,
            f"{asked} gives {found}: no key after query {last} is seen",
        )
        expect(found == right or sorted(found) != right, f"{asked} gives {found}: each tile once, in order")
        expect(found == right, f"{asked} gives {found} instead of {right}")
