"""Checkers of chapter 02, attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from checks import checker, expect, expect_tensor


@checker
def packed_mask(answer):
    """Causal, and blind to other texts: lengths that add up to T -> bool [T, T]."""
    lengths = [2, 4, 1]
    text = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))  # [T], which text a token belongs to
    place = torch.arange(7)
    same, before = text == text[:, None], place <= place[:, None]
    found = answer(list(lengths))
    expect_tensor(found, same & before, "packed_mask([2, 4, 1])")
    expect(not found.equal(before), "a token sees the texts before its own: the mask is causal and no more")
    expect(not found.equal(same), "a token sees later tokens of its own text: the mask is not causal")
    expect(not found.equal((same & before).T), "rows are keys here: row n says what query n sees")
    expect(not found.equal(~(same & before)), "True and False are exchanged: True is where a query sees a key")
    _expect_rows(found, same & before, "lengths [2, 4, 1]")
    _expect_rows(answer([3]), place[:3] <= place[:3, None], "lengths [3]")


def _expect_rows(found: Tensor, right: Tensor, given: str) -> None:
    for query, (row, wanted) in enumerate(zip(found, right, strict=True)):
        sees, should = row.nonzero().flatten().tolist(), wanted.nonzero().flatten().tolist()
        expect(sees == should, f"with {given}, query {query} sees keys {sees} instead of {should}")


class _Largest(TorchDispatchMode):
    """How many elements the largest tensor has that is written while this is on; views write nothing."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, out.numel())
        return out


@checker
def grouped_attention(answer):
    """q [H, N, D], k and v [H_kv, M, D] -> [H, N, D], causal, without a copy of k or v for each query head."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(6, 3, 64, generator=generator)
    k, v = torch.randn(2, 2, 5, 64, generator=generator)

    def attend(k, v, seen, scale=64**-0.5):  # k and v [6, 5, 64]
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -math.inf)
        return scores.softmax(dim=-1) @ v

    key = torch.arange(5)
    seen = key <= key[2:, None]  # [3, 5], the last three of five
    shared = k.repeat_interleave(3, 0), v.repeat_interleave(3, 0)
    right = attend(*shared, seen)
    with _Largest() as largest:
        found = answer(q.clone(), k.clone(), v.clone())
    expect_tensor(found, right, "grouped_attention of q [6, 3, 64] and k, v [2, 5, 64]")

    def is_near(value):
        return torch.allclose(found, value, atol=1e-4)

    mistakes = {
        "query heads are dealt out in turn: heads 0, 1, 2 share the first key head, and 3, 4, 5 the second": (
            attend(k.repeat(3, 1, 1), v.repeat(3, 1, 1), seen)
        ),
        "the scores are not divided by the root of D": attend(*shared, seen, scale=1.0),
        "every query sees every key: the mask is missing": attend(*shared, torch.ones(3, 5).bool()),
        "the diagonal begins in the upper left corner: the queries are the last N of M tokens": (
            attend(*shared, key <= key[:3, None])
        ),
    }
    for sentence, value in mistakes.items():
        expect(not is_near(value), sentence)
    for head in range(6):
        expect(torch.allclose(found[head], right[head], atol=1e-4), f"query head {head} gives something else")
    copied = shared[0].numel()
    expect(
        largest.elements < copied,
        f"right, but a tensor of {largest.elements:,} elements was written, and keys copied for each query head"
        f" have {copied:,}: let the queries of a group be rows of one product",
    )


@checker
def neighbours_to_halves(answer):
    """Rows of W_Q, [heads * D, hidden], from rotary pairs (2i, 2i + 1) to pairs (i, i + D / 2), head by head."""
    weight = torch.arange(2 * 6).float()[:, None] * torch.tensor([1.0, -1.0, 0.5, 2.0])  # row r is r times that
    right = weight.view(2, 3, 2, 4).transpose(1, 2).reshape(12, 4)
    found = answer(weight.clone(), 2)
    expect_tensor(found, right, "neighbours_to_halves of weight [12, 4] with 2 heads")
    across_heads = torch.cat((weight[0::2], weight[1::2]))
    inverse = weight.view(2, 2, 3, 4).transpose(1, 2).reshape(12, 4)
    expect(not found.equal(weight), "the rows are as they were")
    expect(not found.equal(across_heads), "rows moved from one head to another: reorder each head by itself")
    expect(not found.equal(inverse), "this is the way back, from halves to neighbours")
    expect(
        sorted(found[:, 0].tolist()) == sorted(weight[:, 0].tolist()),
        "a row was lost or is there twice: the rows only change places",
    )
    order, wanted = found[:, 0].int().tolist(), right[:, 0].int().tolist()
    expect(found.equal(right), f"two heads of 6 rows: the rows stand in the order {order} instead of {wanted}")


@checker
def swiglu_width(answer):
    """2/3 of 4 * hidden_size, rounded up to a multiple."""
    for hidden, multiple, wanted in ((4096, 256, 11_008), (192, 64, 512), (100, 8, 272), (100, 1, 267)):
        found = answer(hidden, multiple)
        case = f"hidden_size {hidden}, multiple_of {multiple}"
        expect(found is not None, "swiglu_width gives None: is the `return` missing?")
        expect(isinstance(found, int), f"{case} gives a {type(found).__name__}, and an int is asked for")
        expect(found % multiple == 0, f"{case} gives {found}, which is no multiple of {multiple}")
        expect(
            not 4 * hidden <= found < 4 * hidden + multiple,
            f"{case} gives {found}, the width of a plain MLP: three matrices of it are half as much again",
        )
        expect(
            not (found == wanted - multiple and 3 * found < 8 * hidden),
            f"{case} gives {found}, which is rounded down: fewer parameters than the plain MLP has",
        )
        expect(found == wanted, f"{case} gives {found} instead of {wanted}")
