"""Checkers of chapter 02, attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from checks import Wrong, checker, device, expect, expect_tensor


@checker
def window_mask(answer):
    """Causal, and at most ``window`` keys, the query's own among them -> bool [num_queries, num_keys]."""
    for num_queries, num_keys, window in ((4, 4, 2), (2, 6, 3), (3, 3, 1), (2, 3, 9)):
        asked = f"window_mask({num_queries}, {num_keys}, {window})"
        key, query = torch.arange(num_keys), torch.arange(num_keys - num_queries, num_keys)[:, None]
        causal, recent = key <= query, key > query - window
        found = answer(num_queries, num_keys, window)
        expect_tensor(found, causal & recent, asked)
        found = found.cpu()
        early = torch.arange(num_queries)[:, None]
        mistakes = {
            "a query sees later tokens: the mask is not causal": recent,
            "a query sees all tokens before it: the window is missing": causal,
            "the window counts the query's own token as well: one key too many": causal & (key >= query - window),
            "the diagonal begins in the upper left corner: the queries are the last tokens": (
                (key <= early) & (key > early - window)
            ),
            "True and False are exchanged: True is where a query sees a key": ~(causal & recent),
        }
        if not found.equal(causal & recent):
            for sentence, value in mistakes.items():
                expect(not found.equal(value), f"{asked}: {sentence}")
        _expect_rows(found, causal & recent, asked)


@checker
def packed_mask(answer):
    """Causal, and blind to other texts: lengths that add up to T -> bool [T, T]."""
    lengths = [2, 4, 1]
    text = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))  # [T], which text a token belongs to
    place = torch.arange(7)
    same, before = text == text[:, None], place <= place[:, None]
    found = answer(list(lengths))
    expect_tensor(found, same & before, "packed_mask([2, 4, 1])")
    found = found.cpu()
    expect(not found.equal(before), "a token sees the texts before its own: the mask is causal and no more")
    expect(not found.equal(same), "a token sees later tokens of its own text: the mask is not causal")
    expect(not found.equal((same & before).T), "rows are keys here: row n says what query n sees")
    expect(not found.equal(~(same & before)), "True and False are exchanged: True is where a query sees a key")
    _expect_rows(found, same & before, "with lengths [2, 4, 1]")
    _expect_rows(answer([3]).cpu(), place[:3] <= place[:3, None], "with lengths [3]")


def _expect_rows(found: Tensor, right: Tensor, given: str) -> None:
    for query, (row, wanted) in enumerate(zip(found, right, strict=True)):
        sees, should = row.nonzero().flatten().tolist(), wanted.nonzero().flatten().tolist()
        expect(sees == should, f"{given}: query {query} sees keys {sees} instead of {should}")


@checker
def kv_bytes(answer):
    """Of a ``config.json`` as a dict: bytes of keys and values that one token leaves."""
    llama = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    qwen = {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64}
    cases = (
        ("Llama-3-8B in float32", llama | {"num_key_value_heads": 8}, 8, 128, 4),
        ("Qwen3-32B in 16 bits", qwen | {"num_key_value_heads": 8, "head_dim": 128}, 8, 128, 2),
        ("Llama-2-7B in 16 bits", llama, 32, 128, 2),
    )
    for name, config, kv_heads, dim, size in cases:
        layers, heads, hidden = config["num_hidden_layers"], config["num_attention_heads"], config["hidden_size"]
        right = 2 * layers * kv_heads * dim * size
        try:
            found = answer(dict(config), size)
        except KeyError as missing:
            raise Wrong(f"the config of {name} has no {missing}: give it the value that its absence means") from None
        expect(found is not None, "kv_bytes gives None: is the `return` missing?")
        kind = type(found).__name__
        expect(not isinstance(found, float), f"{name} gives a float: divide with //, since bytes are an int")
        expect(isinstance(found, int), f"{name} gives a {kind}, and an int is asked for")
        mistakes = {
            "keys or values, and a token leaves both": right // 2,
            "numbers, not bytes": right // size,
            "one layer, and each of them keeps its own": right // layers,
            "the query heads are counted; stored are the heads of keys and values": right // kv_heads * heads,
            "head_dim is given in the config, and need not be hidden_size divided by the heads": (
                right // dim * (hidden // heads)
            ),
        }
        if found != right:
            for sentence, value in mistakes.items():
                expect(found != value, f"{name} gives {found:,}: {sentence}")
        expect(found == right, f"{name} gives {found:,} instead of {right:,}")


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
        found = answer(*(part.clone().to(device) for part in (q, k, v)))
    expect_tensor(found, right, "grouped_attention of q [6, 3, 64] and k, v [2, 5, 64]")
    found = found.cpu()

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
