"""The ways to call each kernel that should be compiled: every tile that a wrapper can choose, every branch.

A call is made on "meta" tensors, which have shapes and no numbers: it costs nothing where launches are only compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from paged_infer.kernels.attention.flash_attention import flash_attention
from paged_infer.kernels.attention.paged_attention import paged_attention
from paged_infer.kernels.fused.copy_blocks import copy_blocks
from paged_infer.kernels.fused.qk_norm_rope import qk_norm_rope
from paged_infer.kernels.fused.rms_norm import add_rms_norm
from paged_infer.kernels.fused.sample import sample
from paged_infer.kernels.fused.silu_mul import silu_mul
from paged_infer.kernels.fused.store_kv import store_kv

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
        *(Variant("decode", t, 128, {"group": 4, "rows": 256, "lse": True}) for t in wide),  # one split
        Variant("decode", "float16", 128, {"group": 4, "block": 16}),
    ]
    variants += [Variant("store_kv", t, w) for t, w in (("bfloat16", 1024), ("float32", 192))]
    variants += [Variant("copy_blocks", t, w) for t, w in (("bfloat16", 1024), ("float16", 15))]
    variants += [Variant("add_rms_norm", t, w) for t, w in product(both, (192, 4096, 16_384))]
    variants += [Variant("qk_norm_rope", t, d, {"store": True}) for t, d in product(both, (80, 128))]
    variants += [Variant("qk_norm_rope", t, 64, {"plain": True}) for t in wide]
    variants += [Variant("silu_mul", t, 14_336) for t in both]
    return variants + [Variant("sample", t, v) for t, v in product(wide, (1003, 151_936))]


def quick_variants() -> list[Variant]:
    """Each kernel once or twice: attention in bfloat16, and with full float32 products."""
    return [
        Variant("flash", "bfloat16", 128, {"causal": True}),
        Variant("flash", "float32", 64, {"causal": True}),
        Variant("prefill", "bfloat16", 128, {"group": 4, "block": 16}),
        Variant("prefill", "float32", 128, {"group": 4, "block": 16}),
        Variant("decode", "bfloat16", 128, {"group": 4, "block": 16}),
        Variant("decode", "float32", 64, {"group": 4, "block": 16}),
        Variant("store_kv", "bfloat16", 1024),
        Variant("copy_blocks", "bfloat16", 1024),
        Variant("add_rms_norm", "bfloat16", 4096),
        Variant("qk_norm_rope", "bfloat16", 128, {"store": True}),
        Variant("silu_mul", "bfloat16", 14_336),
        Variant("sample", "float32", 151_936),
    ]


def _empty(variant: Variant, *shape: int, dtype: str = "") -> Tensor:
    return torch.empty(*shape, dtype=getattr(torch, dtype or variant.dtype), device="meta")


def _flash(variant: Variant) -> None:
    q, kv = _empty(variant, 2, 32, 4096, variant.width), _empty(variant, 2, 8, 4096, variant.width)
    options = variant.options
    flash_attention(q, kv, kv, causal="full" not in options, window=options.get("window"), return_lse="lse" in options)


def _paged(variant: Variant) -> None:
    options, is_decode = variant.options, variant.family == "decode"
    rows, queries = options.get("rows", 8), 1 if is_decode else options.get("queries", 512)
    cache = _empty(variant, 4096, options.get("block", 16), 8, variant.width)
    paged_attention(
        _empty(variant, rows * queries, 8 * options["group"], variant.width),
        cache,
        cache,
        block_tables=_empty(variant, rows, 512, dtype="int32"),
        seq_lens=_empty(variant, rows, dtype="int32"),
        query_start_loc=_empty(variant, rows + 1, dtype="int32"),
        window=options.get("window"),
        num_decodes=rows if is_decode else 0,
        max_query_len=queries,
        max_seq_len=8192,
        return_lse="lse" in options,
    )


def _store_kv(variant: Variant) -> None:
    k, cache = _empty(variant, 32, 1, variant.width), _empty(variant, 64, 16, 1, variant.width)
    store_kv(k, k, cache, cache, _empty(variant, 32, dtype="int64"))


def _qk_norm_rope(variant: Variant) -> None:
    angles, stored = _empty(variant, 32, 1, variant.width), "store" in variant.options
    caches = _empty(variant, 64, 16, 8, variant.width) if stored else None
    qk_norm_rope(
        _empty(variant, 32, 48, variant.width),
        angles,
        angles,
        num_heads=32,
        num_kv_heads=8,
        norm_weight=_empty(variant, 40, variant.width) if stored else None,
        k_cache=caches,
        v_cache=caches,
        slot_mapping=_empty(variant, 32, dtype="int64") if stored else None,
    )


CALLS: dict[str, Callable[[Variant], object]] = {
    "flash": _flash,
    "prefill": _paged,
    "decode": _paged,
    "store_kv": _store_kv,
    "copy_blocks": lambda v: copy_blocks(2 * [_empty(v, 64, v.width)], *2 * [_empty(v, 4, dtype="int64")]),
    "add_rms_norm": lambda v: add_rms_norm(_empty(v, 32, v.width), _empty(v, 32, v.width), _empty(v, v.width), 1e-6),
    "qk_norm_rope": _qk_norm_rope,
    "silu_mul": lambda v: silu_mul(_empty(v, 32, 2 * v.width)),
    "sample": lambda v: sample(
        _empty(v, 8, v.width), _empty(v, 8, dtype="float32"), *3 * [_empty(v, 8, dtype="int64")]
    ),
}
