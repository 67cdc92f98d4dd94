"""The ways to call each kernel that should be compiled: every tile that a wrapper can choose, every branch.

A call is made on "meta" tensors, which have shapes and no numbers: it costs nothing where launches are only compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

from paged_infer.bench.kernels.fused import FUSED, Shape
from paged_infer.bench.kernels.linear_cases import GRIDS, linear_problem
from paged_infer.bench.kernels.peers import our_flash, our_paged
from paged_infer.bench.kernels.problems import PagedProblem, Tensors, paged_problem
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.attention.mla import LATENT_SCALES
from paged_infer.kernels.attention.mla_decode import latent_decode
from paged_infer.kernels.fused.grouped_gemm import grouped_experts
from paged_infer.kernels.fused.moe import ExpertWeights
from paged_infer.kernels.fused.store_kv import store_kv, store_latents
from paged_infer.kernels.kv_quant import KV_DTYPES

HEAD_DIMS = (40, 64, 80, 96, 128, 160, 200, 256)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to call a kernel: enough for a worker process to make the call on tensors that hold nothing."""

    family: str
    dtype: str
    width: int  # head_dim, or of a row
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        options = [name if value is True else f"{name} {value}" for name, value in self.options.items()]
        return " ".join([self.family, self.dtype, str(self.width), *options])

    def call(self) -> None:
        """Call the kernel's wrapper, as an engine would."""
        CALLS[self.family](self)


def full_variants() -> list[Variant]:
    """Every tile that the wrappers can choose, and every branch in the kernels; about a hundred."""
    wide, both = ("float32", "bfloat16"), ("float32", "float16", "bfloat16")
    paged_dims = (64, 80, 128, 256)
    variants = [
        *(Variant("flash", t, d, {"causal": True}) for t, d in product(wide, HEAD_DIMS)),
        *(Variant("flash", t, d, {"window": 1000, "lse": True}) for t, d in product(wide, HEAD_DIMS)),
        *(Variant("flash", t, d, {"full": True}) for t, d in product(wide, (64, 128, 256))),
        *(Variant("flash", "float16", d, {"causal": True}) for d in (64, 128)),
        *(Variant("prefill", t, d, {"group": 4, "block": 16}) for t, d in product(wide, paged_dims)),
        *(Variant("prefill", t, d, {"group": 4, "window": 1000}) for t, d in product(wide, paged_dims)),
        *(Variant("prefill", "bfloat16", 128, {"group": g, "block": 16}) for g in (1, 8)),
        *(Variant("prefill", "bfloat16", 128, {"group": 4, "block": b}) for b in (1, 3)),
        *(Variant("prefill", t, d, {"group": 4, "queries": 20}) for t, d in product(wide, (64, 128))),
        Variant("prefill", "float16", 128, {"group": 4, "block": 16}),
        *(Variant("decode", t, d, {"group": 4, "block": 16}) for t, d in product(wide, paged_dims)),
        *(Variant("decode", t, d, {"group": 4, "window": 1000}) for t, d in product(wide, (64, 128))),
        *(Variant("decode", t, 128, {"group": g, "block": 16}) for t, g in product(wide, (1, 8))),
        *(Variant("decode", "bfloat16", 128, {"group": 4, "block": b}) for b in (1, 3)),
        *(Variant("decode", t, 128, {"group": 4, "rows": 256, "lse": True}) for t in wide),
        *(Variant("decode", t, 128, {"group": 4, "short": True, "lse": True}) for t in wide),  # no row can be split
        Variant("decode", "float16", 128, {"group": 4, "block": 16}),
    ]
    for family in ("flash", "prefill", "decode"):  # the heads of a Gemma 2 and of gpt-oss
        variants.append(Variant(family, "bfloat16", 128, {"group": 4, "softcap": 50.0}))
        variants.append(Variant(family, "bfloat16", 64, {"group": 8, "window": 128, "sinks": True}))
    # Keys and values of 8 bits: each type at head_dim 128, and one of each width and dtype
    for family in ("prefill", "decode"):
        variants += [Variant(family, "bfloat16", 128, {"group": 4, "block": 16, "kv": kind}) for kind in KV_DTYPES]
        variants += [Variant(family, "bfloat16", d, {"group": 4, "block": 16, "kv": "int8"}) for d in (64, 256)]
        variants += [Variant(family, "float32", 128, {"group": 4, "block": 16, "kv": "int8"})]
        variants += [Variant(family, "float16", 128, {"group": 4, "block": 16, "kv": "fp8_e5m2"})]
        variants += [Variant(family, "bfloat16", 64, {"group": 8, "window": 128, "sinks": True, "kv": "fp8"})]
    variants += [Variant("latent", "bfloat16", 576, {"heads": 128, "kv": kind}) for kind in KV_DTYPES]
    variants += [Variant("latent", t, 576, {"heads": 16, "kv": "int8"}) for t in ("float32", "float16")]
    variants += [Variant("store_codes", "bfloat16", 128, {"kv": kind}) for kind in KV_DTYPES]
    variants += [Variant("store_latents", "bfloat16", 576, {"kv": kind}) for kind in KV_DTYPES]
    # DeepSeek's latents, of 512 + 64 elements, with the heads of V3 and of V2-Lite
    variants += [Variant("latent", t, 576, {"heads": 128}) for t in both]
    variants += [Variant("latent", "bfloat16", 576, {"heads": 16, "block": b, "rows": 256}) for b in (1, 16)]
    variants += [Variant("store_kv", t, w) for t, w in (("bfloat16", 1024), ("float32", 192))]
    variants += [Variant("copy_blocks", t, w) for t, w in (("bfloat16", 1024), ("float16", 15))]
    variants += [Variant("add_rms_norm", t, w) for t, w in product(both, (192, 4096, 16_384))]
    variants += [Variant("qk_norm_rope", t, d, {"store": True}) for t, d in product(both, (80, 128))]
    variants += [Variant("qk_norm_rope", t, 64, {"plain": True}) for t in wide]
    variants += [Variant("silu_mul", t, 14_336) for t in both]
    variants += [Variant("experts", t, 768, {"tokens": n}) for t, n in product(wide, (32, 4096))]  # both tile heights
    # Quantised weights: few tokens and many, in bfloat16; one of each form of weights in the other dtypes
    variants += [
        Variant("quantised", "bfloat16", 4096, {"grid": grid, "tokens": n}) for grid, n in product(GRIDS, (16, 2048))
    ]
    variants += [
        Variant("quantised", t, 4096, {"grid": grid, "tokens": n})
        for t, grid, n in product(("float32", "float16"), ("w4a16, zeros", "w8a16", "float8, blocks"), (16, 2048))
    ]
    return variants + [
        Variant("sample", t, v, options)
        for options, t, v in product(({}, {"masked": True}), wide, (1003, 151_936))  # a grammar's tokens
    ]


# Each kernel once or twice: attention in bfloat16, and with full float32 products.
QUICK = {
    *("flash bfloat16 128 causal", "flash float32 64 causal", "prefill bfloat16 128 group 4 block 16"),
    *("prefill float32 128 group 4 block 16", "decode bfloat16 128 group 4 block 16", "store_kv bfloat16 1024"),
    *("decode float32 64 group 4 block 16", "copy_blocks bfloat16 1024", "add_rms_norm bfloat16 4096"),
    *("qk_norm_rope bfloat16 128 store", "silu_mul bfloat16 14336", "sample float32 151936"),
    "sample bfloat16 151936 masked",
    *("latent bfloat16 576 heads 128", "latent bfloat16 576 heads 128 kv int8", "store_codes bfloat16 128 kv fp8"),
    *("decode bfloat16 128 group 4 block 16 kv int8", "store_latents bfloat16 576 kv fp8"),
    "quantised bfloat16 4096 grid w8a8 tokens 16",
    "quantised float32 4096 grid w4a16, zeros tokens 2048",
    *("experts bfloat16 768 tokens 32", "experts float32 768 tokens 4096"),
}


# -- Calls -----------------------------------------------------------------------------------------------------------


def _flash(variant: Variant) -> None:
    options = variant.options
    problem = _problem(variant, [(0, 4096)] * 2)
    our_flash(problem, causal="full" not in options, **_scores(variant)).call()


def _paged(variant: Variant) -> None:
    options, is_decode = variant.options, variant.family == "decode"
    rows, queries = options.get("rows", 8), 1 if is_decode else options.get("queries", 512)
    length = 200 if "short" in options else 8192
    problem = _problem(variant, [(length - queries, queries)] * rows)
    if "kv" in options:
        problem = problem.coded(options["kv"])
    our_paged(problem, **_scores(variant)).call()


def _scores(variant: Variant) -> dict[str, Any]:
    options = variant.options
    heads = 8 * options.get("group", 4)
    sinks = torch.empty(heads, dtype=getattr(torch, variant.dtype), device="meta") if "sinks" in options else None
    given = {name: options.get(name) for name in ("window", "softcap")}
    return given | {"sinks": sinks, "return_lse": "lse" in options}


def _latent(variant: Variant) -> None:
    options, dtype = variant.options, getattr(torch, variant.dtype)
    rows, block_size = options.get("rows", 8), options.get("block", 16)
    tensors = Tensors(dtype, "meta")
    tables = torch.empty(rows, 8192 // block_size, dtype=torch.int32, device="meta")
    lengths, starts = (torch.empty(n, dtype=torch.int32, device="meta") for n in (rows, rows + 1))
    nothing = torch.empty(0, dtype=torch.int64, device="meta")
    step = AttentionMetadata(nothing, nothing, starts, lengths, tables, rows, 1, 8192)
    cache = tensors.random(512, block_size, 1, variant.width)
    scales: dict[str, torch.Tensor] = {}
    if "kv" in options:
        cache = cache.to(KV_DTYPES[options["kv"]])
        scales = {name: torch.empty(512, block_size, 1, dtype=torch.float16, device="meta") for name in LATENT_SCALES}
    q = tensors.random(rows, options["heads"], variant.width)
    latent_decode(q, cache, step, v_dim=512, scale=1.0, **scales)


def _store_codes(variant: Variant) -> None:
    """32 tokens: keys and values of 8 heads, or latents of 512 + 64."""
    x = Tensors(getattr(torch, variant.dtype), "meta")
    heads = 8 if variant.family == "store_codes" else 1
    cache = torch.empty(512, 16, heads, variant.width, dtype=KV_DTYPES[variant.options["kv"]], device="meta")
    scale = torch.empty(512, 16, heads, dtype=torch.float16, device="meta")
    slots = torch.empty(32, dtype=torch.int64, device="meta")
    if variant.family == "store_codes":
        k, v = x.random(32, heads, variant.width), x.random(32, heads, variant.width)
        store_kv(k, v, cache, torch.empty_like(cache), slots, scale, torch.empty_like(scale))
    else:
        scales = {"latent_scale": scale, "rest_scale": torch.empty_like(scale)}
        store_latents(x.random(32, variant.width), cache, slots, v_dim=512, **scales)


def _problem(variant: Variant, sequences: list[tuple[int, int]]) -> PagedProblem:
    heads, block_size = 8 * variant.options.get("group", 4), variant.options.get("block", 16)
    sizes = {"num_heads": heads, "num_kv_heads": 8, "head_dim": variant.width, "block_size": block_size}
    return paged_problem(sequences, **sizes, dtype=getattr(torch, variant.dtype), device="meta", poison=False)


def _experts(variant: Variant) -> None:
    """Those of a layer of Qwen3-30B-A3B, without the activation."""
    num_experts, top_k, hidden, tokens = 128, 8, 2048, variant.options["tokens"]
    tensors = Tensors(getattr(torch, variant.dtype), "meta")
    up, down = (
        tensors.random(num_experts, 2 * variant.width, hidden),
        tensors.random(num_experts, hidden, variant.width),
    )
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device="meta")
    weights = ExpertWeights(up, down, glu=lambda gate_up: gate_up[:, : variant.width])
    grouped_experts(weights)(tensors.random(tokens, hidden), ids, torch.empty(tokens, top_k, device="meta"))


def _quantised(variant: Variant) -> None:
    grid, tokens = GRIDS[variant.options["grid"]], variant.options["tokens"]
    problem = linear_problem(grid, (4096, variant.width), tokens, getattr(torch, variant.dtype), "meta")
    problem.product(problem.x)


def _fused(variant: Variant, **sizes: Any) -> None:
    kernel = FUSED[variant.family]
    arguments = kernel.arguments(Shape(**sizes), Tensors(getattr(torch, variant.dtype), "meta"))
    if "plain" in variant.options:  # a rotation alone
        arguments |= dict.fromkeys(("norm_weight", "k_cache", "v_cache", "slot_mapping"))
    if "masked" in variant.options:
        num_rows, vocab_size = arguments["logits"].shape
        arguments["masks"] = torch.empty(num_rows, -(-vocab_size // 32), dtype=torch.int32, device="meta")
    kernel.function(**arguments)


CALLS: dict[str, Callable[[Variant], object]] = {
    "flash": _flash,
    "prefill": _paged,
    "decode": _paged,
    "latent": _latent,
    "store_codes": _store_codes,
    "store_latents": _store_codes,
    "store_kv": lambda v: _fused(v, num_kv_heads=1, head_dim=v.width),
    "copy_blocks": lambda v: _fused(v, block_size=1, num_kv_heads=1, head_dim=v.width),
    "add_rms_norm": lambda v: _fused(v, hidden=v.width),
    "qk_norm_rope": lambda v: _fused(v, head_dim=v.width),
    "experts": _experts,
    "quantised": _quantised,
    "silu_mul": lambda v: _fused(v, intermediate=v.width),
    "sample": lambda v: _fused(v, rows=8, vocab=v.width),
}
