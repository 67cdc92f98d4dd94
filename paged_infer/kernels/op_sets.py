"""The operations of a step between its matrix products, as one set: in plain torch, in Triton, or in C for a CPU.

The decoder, the cache and the sampler work with any of the sets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from paged_infer.kernels.cpu.experts import pack_experts_c
from paged_infer.kernels.cpu.linear import Pack, PackHeads, heads_product, pack_c, pack_heads_c, pack_onednn
from paged_infer.kernels.cpu.ops import (
    add_rms_norm_c,
    argmax_c,
    mask_logits_c,
    qk_norm_rope_c,
    silu_mul_c,
    store_kv_c,
    store_latents_c,
)
from paged_infer.kernels.cpu.quant import pack_quantised
from paged_infer.kernels.fused.copy_blocks import copy_blocks, copy_blocks_reference
from paged_infer.kernels.fused.grouped_gemm import grouped_experts
from paged_infer.kernels.fused.moe import PackExperts, loop_experts, sort_experts
from paged_infer.kernels.fused.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from paged_infer.kernels.fused.rms_norm import add_rms_norm, add_rms_norm_reference
from paged_infer.kernels.fused.sample import argmax_reference, mask_logits_reference, sample
from paged_infer.kernels.fused.silu_mul import silu_mul, silu_mul_reference
from paged_infer.kernels.fused.store_kv import store_kv, store_kv_reference, store_latents, store_latents_reference
from paged_infer.kernels.quant.gemm import pack_triton
from paged_infer.kernels.quant.product import PackQuantised, no_kernel


class Ops(NamedTuple):
    """One implementation of each operation, with the signature of the function of that name."""

    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    qk_norm_rope: Callable[..., Tensor]
    silu_mul: Callable[[Tensor], Tensor]
    store_kv: Callable[..., None]
    copy_blocks: Callable[..., None]
    sample: Callable[..., tuple[Tensor, Tensor]] | None  # None: the Sampler samples in torch
    argmax: Callable[[Tensor], tuple[Tensor, Tensor]] = argmax_reference  # greedy sampling where ``sample`` is None
    mask_logits: Callable[[Tensor, Tensor], Tensor] = mask_logits_reference  # for rows that ``sample`` does not serve
    pack: Pack = pack_onednn  # lays out a matrix once its weights are final
    fuses_store: bool = False  # qk_norm_rope also stores keys and values
    pack_experts: PackExperts = loop_experts  # as ``pack``, for the experts of a layer
    pack_quantised: PackQuantised = no_kernel  # as ``pack``, for quantised weights
    pack_heads: PackHeads = heads_product  # as ``pack``, for a matrix of each head (MLA)
    store_latents: Callable[..., None] = store_latents_reference  # ``store_kv`` of MLA, to a quantised cache


TORCH_OPS = Ops(
    add_rms_norm_reference, qk_norm_rope_reference, silu_mul_reference, store_kv_reference, copy_blocks_reference, None
)
SDPA_OPS = TORCH_OPS._replace(pack_experts=sort_experts)
TRITON_OPS = Ops(
    add_rms_norm,
    qk_norm_rope,
    silu_mul,
    store_kv,
    copy_blocks,
    sample,
    fuses_store=True,
    pack_experts=grouped_experts,
    pack_quantised=pack_triton,
    store_latents=store_latents,
)
C_OPS = Ops(
    add_rms_norm_c,
    qk_norm_rope_c,
    silu_mul_c,
    store_kv_c,
    copy_blocks_reference,
    None,
    argmax=argmax_c,
    mask_logits=mask_logits_c,
    pack=pack_c,
    fuses_store=True,
    pack_experts=pack_experts_c,
    pack_heads=pack_heads_c,
    pack_quantised=pack_quantised,
    store_latents=store_latents_c,
)
