"""Checkers of chapter 16, one model, two processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from checks import checker, expect, expect_tensor


def _seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@checker
def cut_qkv(answer):
    """Heads of grouped attention, with as many ranks as KV heads, fewer, and more."""
    for heads, kv_heads, size in ((4, 2, 2), (8, 4, 2), (6, 2, 6), (8, 2, 4)):
        dim = 3
        qkv = _seeded(heads, (heads + 2 * kv_heads) * dim, 5)
        q, k, v = (part.unflatten(0, (-1, dim)) for part in qkv.split([n * dim for n in (heads, kv_heads, kv_heads)]))
        for rank in range(size):
            own_q = q[rank * heads // size : (rank + 1) * heads // size]
            first = rank * kv_heads // size
            own = slice(first, max((rank + 1) * kv_heads // size, first + 1))
            right = torch.cat([own_q, k[own], v[own]]).flatten(0, 1)
            asked = f"cut_qkv of {heads} heads and {kv_heads} KV heads, rank {rank} of {size}"
            found = answer(qkv.clone(), heads, kv_heads, rank, size)
            if isinstance(found, Tensor) and found.shape != right.shape and kv_heads < size:
                no_kv = found.shape == (len(own_q) * dim, 5)
                expect(not no_kv, f"{asked}: it has no key and value head; neighbouring ranks share one")
                all_kv = found.shape == ((len(own_q) + 2 * kv_heads) * dim, 5)
                expect(not all_kv, f"{asked}: every KV head is kept; its query heads read one")
            expect_tensor(found, right, asked)
            if found.equal(right):
                continue
            share = len(qkv) // size
            expect(
                not found.equal(qkv[rank * share : (rank + 1) * share]),
                f"{asked}: a contiguous part of the stack has rows of q, k and v of different heads",
            )
            other = slice(rank % kv_heads, rank % kv_heads + 1)
            expect(
                kv_heads >= size or not found.equal(torch.cat([own_q, k[other], v[other]]).flatten(0, 1)),
                f"{asked}: KV head {rank % kv_heads} is not the one that its query heads read, {first}",
            )
            wrong = int((found != right).any(dim=1).sum())
            expect(False, f"{asked}: {wrong} of {len(right)} rows are wrong")


@checker
def cut_linear(answer):
    """The sum over ranks is played: each rank runs once to give its part, and once more with the sum."""
    for tokens, columns, rows, size in ((3, 8, 5, 2), (1, 12, 4, 4)):
        x, weight, bias = _seeded(1, tokens, columns), _seeded(2, rows, columns), _seeded(3, rows)
        right = x @ weight.T + bias
        asked = f"cut_linear of x [{tokens}, {columns}] on {size} ranks"
        shares = [
            (x_part.clone(), w_part.clone(), bias.clone(), rank)
            for rank, (x_part, w_part) in enumerate(zip(x.chunk(size, 1), weight.chunk(size, 1), strict=True))
        ]
        parts: list[Tensor] = []

        def give_part(part: Tensor, parts: list[Tensor] = parts) -> Tensor:
            parts.append(part.clone())
            return torch.zeros_like(part)

        for share in shares:
            answer(*share, give_part)
        expect(len(parts) > 0, f"{asked}: all_reduce is never called, so each rank has only its part")
        expect(
            len(parts) == size, f"{asked}: all_reduce is called {len(parts)} times by {size} ranks; once each will do"
        )
        expect(
            parts[0].shape == right.shape, f"{asked}: all_reduce gets {list(parts[0].shape)}, not the output's shape"
        )
        total = torch.stack(parts).sum(dim=0)
        for share in shares:
            found = answer(*share, lambda part, total=total: total.clone())
            expect_tensor(found, right, f"{asked}, rank {share[3]}")
            if torch.allclose(found, right, atol=1e-4):
                continue
            for times in (0, size, size + 1):
                expect(
                    not torch.allclose(found, right + (times - 1) * bias, atol=1e-4),
                    f"{asked}, rank {share[3]}: the bias is in the output {times} times, not once",
                )
            expect(False, f"{asked}, rank {share[3]}: off by up to {(found - right).abs().max().item():.3g}")


@checker
def slowest_sum_s(answer):
    """Four machines."""
    for name, step_s, layers, size in (
        ("4.8 ms, 32 layers, 2 ranks", 4.8e-3, 32, 2),
        ("45.2 ms, 28 layers, 2 ranks", 45.2e-3, 28, 2),
        ("4.8 ms, 32 layers, 8 ranks", 4.8e-3, 32, 8),
        ("1 ms, 6 layers, 3 ranks", 1e-3, 6, 3),
    ):
        found = answer(step_s, layers, size)
        expect(found is not None, "slowest_sum_s gives None: is the `return` missing?")
        value, right = float(found), step_s * (1 - 1 / size) / (2 * layers + 2)
        if math.isclose(value, right, rel_tol=1e-6):
            continue
        mistakes = {
            "there are two more collectives, of the embedding and the head": step_s * (1 - 1 / size) / (2 * layers),
            "one more collective is missing: the embedding's sum and the head's gather": (
                step_s * (1 - 1 / size) / (2 * layers + 1)
            ),
            "this is the time of all of them together": step_s * (1 - 1 / size),
            "what is saved is the step less a rank's share, not that share": step_s / size / (2 * layers + 2),
            "what is saved counts, not the whole step": step_s / (2 * layers + 2),
        }
        for sentence, wrong in mistakes.items():
            expect(not math.isclose(value, wrong, rel_tol=1e-6), f"{name}: {sentence}")
        expect(False, f"{name}: {1e6 * right:.1f} µs, and yours gives {1e6 * value:.4g} µs")


@checker
def replica_for(answer):
    """Cases in which the longest prefix, or the shortest queue, is the wrong replica."""
    for prompt, cached, waiting, right in (
        (100, [0, 80], [0, 0], 1),
        (100, [0, 80], [0, 200], 0),
        (100, [0, 80], [0, 70], 1),
        (1056, [1024, 0, 0], [2000, 500, 400], 2),
        (1056, [1024, 0, 0], [1400, 500, 400], 0),
        (64, [64, 0], [64, 0], 1),
        (50, [0, 0, 0], [7, 7, 7], 0),
    ):
        found = answer(prompt, list(cached), list(waiting))
        expect(found is not None, "replica_for gives None: is the `return` missing?")
        if found == right:
            continue
        asked = f"a prompt of {prompt} tokens, cached {cached}, waiting {waiting}"
        tied = [w + max(1, prompt - c) for c, w in zip(cached, waiting, strict=True)]
        expect(isinstance(found, int) and 0 <= found < len(cached), f"{asked}: {found!r} is not an index of a replica")
        expect(tied[found] != min(tied), f"{asked}: {right} and {found} are equal; the first of equals is asked for")
        if (prompt, cached) == (64, [64, 0]):
            expect(
                False, f"{asked}: one token is computed even if all are cached, so replica 0 needs 65, and 1 needs 64"
            )
        longest = cached[found] == max(cached) and cached[found] > cached[right]
        expect(not longest, f"{asked}: replica {found} has the longest prefix, but computes {tied[found]} tokens first")
        shortest = waiting[found] == min(waiting)
        expect(not shortest, f"{asked}: replica {found} has the least to compute before, but not with this prompt")
        expect(False, f"{asked}: replica {right} computes {tied[right]} tokens, {found} computes {tied[found]}")
