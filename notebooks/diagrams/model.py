"""Inside the model: a decoder layer, heads that share keys and values, and a softmax in tiles."""

from __future__ import annotations

import json
from fractions import Fraction
from functools import cache
from pathlib import Path

from .drawing import Box, Drawing

WEIGHTS = Path(__file__).parents[2] / "paged_infer" / "storyteller" / "weights"


@cache
def storyteller() -> dict[str, int]:
    return json.loads((WEIGHTS / "config.json").read_text("utf-8"))


def decoder_layer() -> Drawing:
    config = storyteller()
    hidden, width, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    d = Drawing(
        860,
        540,
        f"One of the storyteller's {layers} decoder layers, for T tokens",
        "Attention: RMSNorm, QKV projection, RMSNorm and RoPE of queries and keys, attention over the KV cache, output "
        "projection, added to the residual stream. MLP: RMSNorm, gate and up projections, SiLU(gate) times up, down "
        "projection, added again.",
    )
    flat = f"[T, {hidden}]"
    d.lane(104, 64, 740, 266, "")
    d.label(116, 318, "**attention**")
    d.lane(104, 346, 740, 128, "")
    d.label(116, 462, "**MLP (SwiGLU)**")
    x = d.box(20, 64, 72, 46, "x", flat)
    first_sum = d.box(40, 288, 32, 32, "**+**")
    second_sum = d.box(40, 432, 32, 32, "**+**")
    out = d.box(20, 486, 72, 40, "x", flat)
    vocabulary = config["vocab_size"]
    d.label(104, 511, f"_to the next layer; after the last one, RMSNorm and the head give logits [R, {vocabulary}]_")

    total = (heads + 2 * kv_heads) * dim
    norm = d.box(120, 108, 78, 60, "RMSNorm", flat, tone="amber")
    qkv = d.box(216, 104, 82, 68, "QKV", "projection", f"[T, {total}]", tone="blue")
    q = d.box(322, 84, 98, 32, f"q [T, {heads}, {dim}]")
    k = d.box(322, 122, 98, 32, f"k [T, {kv_heads}, {dim}]")
    v = d.box(322, 160, 98, 32, f"v [T, {kv_heads}, {dim}]")
    rope = d.box(440, 84, 102, 70, "RMSNorm", "of each head,", "RoPE", tone="amber")
    attend = d.box(562, 84, 148, 108, "attention", "softmax(q kᵀ / √d) v", f"[T, {heads}, {dim}]", tone="violet")
    kv = d.box(562, 232, 148, 52, "KV cache", "_of earlier tokens_", tone="violet")
    output = d.box(732, 104, 86, 68, "output", "projection", flat, tone="blue")
    residual = x.bottom[0]
    d.arrow(x.bottom, first_sum.top)
    d.arrow((residual, 138), norm.left)
    d.chain(norm, qkv)
    for part in (q, k, v):
        d.arrow(qkv.right, part.left)
    d.arrow(q.right, (rope.x, q.right[1]))
    d.arrow(k.right, (rope.x, k.right[1]))
    d.arrow(rope.right, (attend.x, rope.right[1]))
    d.arrow(v.right, (attend.x, v.right[1]))
    d.arrow((616, attend.bottom[1]), (616, kv.y))
    d.label(606, 217, "_store k, v_", "end")
    d.arrow((656, kv.y), (656, attend.bottom[1]))
    d.label(666, 217, "_read all_")
    d.arrow(attend.right, output.left)
    d.arrow(output.bottom, (output.bottom[0], 304), first_sum.right)
    d.label(764, 298, flat, "end")

    d.arrow(first_sum.bottom, second_sum.top)
    parts = [
        d.box(120, 364, 80, 52, "RMSNorm", flat, tone="amber"),
        d.box(232, 364, 116, 52, "gate, up", f"[T, {2 * width}]", tone="blue"),
        d.box(380, 364, 160, 52, "SiLU(gate) · up", f"[T, {width}]", tone="amber"),
        d.box(572, 364, 100, 52, "down", flat, tone="blue"),
    ]
    d.arrow((residual, 390), parts[0].left)
    d.chain(*parts)
    d.arrow(parts[-1].right, (775, 390), (775, 448), second_sum.right)
    d.label(764, 442, flat, "end")
    d.arrow(second_sum.bottom, out.top)
    return d


def attention_heads() -> Drawing:
    config = storyteller()
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    d = Drawing(
        860,
        320,
        f"Which keys and values {heads} query heads read",
        "Multi-head attention: each query head has a KV head of its own. Grouped-query attention, which the "
        f"storyteller has: {heads // kv_heads} query heads share each of {kv_heads} KV heads. Multi-query attention: "
        "all share one.",
    )
    kinds = (("MHA", "multi-head", heads), ("GQA", "grouped-query (storyteller)", kv_heads), ("MQA", "multi-query", 1))
    for i, (name, words, num_kv) in enumerate(kinds):
        left = 16 + 280 * i
        d.lane(left, 56, 268, 248, f"**{name}**")
        d.label(left + 52, 76, words)
        group = heads // num_kv
        queries = [d.box(left + 14 + 41 * head, 100, 35, 30, f"q{head}", tone="amber") for head in range(heads)]
        for kv in range(num_kv):
            middle = (queries[kv * group].left[0] + queries[(kv + 1) * group - 1].right[0]) / 2
            wide = 35 if num_kv == heads else 76
            box = d.box(middle - wide / 2, 190, wide, 40, f"k{kv}", f"v{kv}", tone="blue")
            for query in queries[kv * group : (kv + 1) * group]:
                d.line(query.bottom, box.top)
        d.label(left + 134, 262, f"2 · {num_kv} · {dim} = {2 * num_kv * dim} numbers", "middle")
        d.label(left + 134, 284, "_kept for each token in each layer_", "middle")
    return d


def online_softmax() -> Drawing:
    tiles = (((1, 3, 2), (4, 2, 2)), ((5, 4, 2), (8, 2, 0)))
    d = Drawing(
        860,
        410,
        "Online softmax: one query, keys in two tiles",
        "A running maximum m, a running sum l of 2 to the power of (score minus m), and a running output o. The second "
        "tile has a larger score, so the old sum and output are rescaled before its own are added.",
    )
    total, o, m = Fraction(0), Fraction(0), "−∞"
    before = _state(d, 20, "before", m, total, o)
    for i, (scores, values) in enumerate(tiles):
        x = 138 + 348 * i
        peak = max(scores) if i == 0 else max(int(m), *scores)
        scale = Fraction(0) if i == 0 else Fraction(2) ** (int(m) - peak)
        weights = [Fraction(2) ** (s - peak) for s in scores]
        products = [w * v for w, v in zip(weights, values, strict=True)]
        sums = sum(weights, Fraction(0)), sum(products, Fraction(0))
        d.lane(x, 52, 204, 122, f"**tile {i + 1}**")
        for row, (name, entries, tone) in enumerate(
            (("scores s", scores, "blue"), ("values v", values, "blue"), ("2ˢ⁻ᵐ", weights, "violet"))
        ):
            d.label(x + 76, 99 + 28 * row, name, "end")
            d.cells(x + 86, 82 + 28 * row, [str(one) for one in entries], tone, width=36)
        update = d.box(
            x,
            214,
            204,
            78,
            f"m = max({m}, {max(scores)}) = {peak}",
            f"ℓ = {decimal(total)} · {scale} + {decimal(sums[0])}",
            f"o = {decimal(o)} · {scale} + {decimal(sums[1])}",
        )
        rescaling = "nothing to rescale" if i == 0 else f"old ℓ and o are rescaled by {scale}"
        d.label(x + 102, 312, f"_{rescaling}_", "middle")
        total, o, m = total * scale + sums[0], o * scale + sums[1], str(peak)
        d.arrow((x + 102, 174), update.top)
        after = _state(d, x + 226, f"after tile {i + 1}", m, total, o)
        d.chain(before, update, after)
        before = after
    result = d.box(712, 334, 128, 52, f"o / ℓ = {decimal(o / total)}", "_the exact output_", tone="green")
    d.arrow(before.bottom, (before.bottom[0], result.y))
    d.label(20, 350, "m: largest score so far,  ℓ: sum of 2ˢ⁻ᵐ so far,  o: sum of 2ˢ⁻ᵐ v so far")
    d.label(20, 374, "_Kernels use powers of 2, too: they multiply the scores by log₂ e first._")
    return d


def _state(d: Drawing, x: float, name: str, m: str, total: Fraction, o: Fraction) -> Box:
    d.label(x + 48, 204, f"_{name}_", "middle")
    return d.box(x, 214, 96, 78, f"m = {m}", f"ℓ = {decimal(total)}", f"o = {decimal(o)}", tone="amber")


def decimal(value: Fraction) -> str:
    return f"{float(value):.5g}"
