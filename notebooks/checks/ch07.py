"""Checkers of chapter 07, FlashAttention."""

from __future__ import annotations

import math

import torch

from checks import checker, expect, expect_tensor


def _state(scores, values):
    """(peak [n], total [n], out [n, D]) of scores [n, m] and values [m, D], all at once; m may be 0."""
    if not scores.shape[1]:
        n = scores.shape[0]
        return torch.full((n,), -math.inf), torch.zeros(n), torch.zeros(n, values.shape[1])
    peak = scores.amax(dim=1)
    weights = (scores - peak[:, None]).exp()
    return peak, weights.sum(dim=1), weights @ values


@checker
def merge_states(answer):
    """Two states (peak [n], total [n], out [n, D]) of different keys -> the state of all keys."""
    generator = torch.Generator().manual_seed(4)
    scores = 3 * torch.randn(5, 9, generator=generator)  # n, D and the number of keys differ
    scores[:, 4] += torch.tensor([6.0, -6.0, 6.0, -6.0, 0.0])  # now the left half has the peak, now the right
    values = torch.randn(9, 2, generator=generator)
    halves = _state(scores[:, :6], values[:6]), _state(scores[:, 6:], values[6:])
    whole = _state(scores, values)

    def merged(left, right):
        found = answer(*(tuple(part.clone() for part in state) for state in (left, right)))
        expect(found is not None, "merge_states gives None: is the `return` missing?")
        expect(
            isinstance(found, (tuple, list)) and len(found) == 3,
            "merge_states gives something else than the three parts of a state: peak, total and out",
        )
        for part, like, name in zip(found, left, ("peak", "total", "out"), strict=True):
            expect_tensor(part, like, f"the {name} of two states of 5 rows with D = 2")
        return found

    (left, right), found = halves, merged(*halves)
    expect(torch.equal(found[0], whole[0]), "the peak is not the larger of the two peaks")
    expect(
        not torch.allclose(found[1], left[1] + right[1], rtol=1e-5),
        "the totals were added as they are, but each is measured against its own peak: shrink both first",
    )
    expect(torch.allclose(found[1], whole[1], rtol=1e-5), "the total is not that of all keys together")
    expect(
        not torch.allclose(found[2], left[2] + right[2], rtol=1e-5),
        "the outs were added as they are, but each is measured against its own peak: shrink both first",
    )
    outputs = left[2] / left[1][:, None], right[2] / right[1][:, None]
    expect(
        not torch.allclose(found[2], sum(outputs) / 2, rtol=1e-4),
        "the two outputs were averaged, but the half with the larger weights counts for more",
    )
    expect(
        not torch.allclose(found[2], whole[2] / whole[1][:, None], rtol=1e-4),
        "out was divided by the total already: a state holds the sum, so that it can be merged again",
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


@checker
def row_softmax(answer):
    """x [R, W] -> softmax of each row, by a Triton kernel."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(6)
    for rows, width in ((3, 8), (4, 5), (2, 1), (1, 33)):
        x = (torch.randn(rows, width, generator=generator) - 3).to(device)  # peaks below 0, so that a 0 shows
        found = answer(x.clone())
        asked = f"row_softmax of x [{rows}, {width}]"
        expect_tensor(found, x, asked)
        right, room = x.softmax(dim=1), 1 << (width - 1).bit_length()
        padded = torch.nn.functional.pad(x, (0, room - width)).softmax(dim=1)[:, :width]
        expect(
            room == width or not torch.allclose(found, padded, atol=1e-5),
            f"{asked}: the {room - width} masked columns were read as 0 and counted in the sum; let them read as -inf",
        )
        expect(not found.isnan().any(), f"{asked} has NaN")
        expect(
            rows == 1 or not torch.allclose(found, x.softmax(dim=0), atol=1e-5),
            f"{asked}: columns add up to 1 instead of rows",
        )
        expect(torch.allclose(found, right, atol=1e-5), f"{asked} is off by up to {(found - right).abs().max():.2g}")
    large = torch.tensor([[200.0, 199.0, -200.0]], device=device)
    found = answer(large.clone())
    expect_tensor(found, large, "row_softmax of [200, 199, -200]")
    expect(
        torch.allclose(found, large.softmax(dim=1), atol=1e-5),
        "scores of 200 overflow: subtract the row's peak before the exponential",
    )
    hidden = torch.tensor([[1.0, -math.inf, 2.0]], device=device)
    expect(
        torch.allclose(answer(hidden.clone()), hidden.softmax(dim=1), atol=1e-5),
        "a score of -inf, a hidden key, has to get the weight 0 and leave the others right",
    )
