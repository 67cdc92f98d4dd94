"""The elementwise operations of a step on a CPU, by the functions of ``kernels.c``: one pass each, no temporaries.

Each takes the arguments of its reference. What the C function does not support (float16, rows that are not dense,
tensors on another device) goes to the reference.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from paged_infer.kernels.cpu.build import DTYPES, library, logger, unavailable_reason
from paged_infer.kernels.fused.qk_norm_rope import qk_norm_rope_reference
from paged_infer.kernels.fused.rms_norm import add_rms_norm_reference
from paged_infer.kernels.fused.sample import argmax_reference, check_masks, mask_logits_reference
from paged_infer.kernels.fused.silu_mul import silu_mul_reference
from paged_infer.kernels.fused.store_kv import store_kv_reference, store_latents_reference
from paged_infer.kernels.kv_quant import FORMATS


@functools.cache
def _is_built(dtype: torch.dtype) -> bool:
    """Whether there are kernels for ``dtype``. The first call may compile them."""
    if dtype not in DTYPES:
        return False
    if (reason := unavailable_reason(dtype)) is not None:
        logger.warning("%s runs on torch, which is slower than the C kernels: %s", dtype, reason)
    return reason is None


def suits(first: Tensor, *others: Tensor) -> bool:
    """Whether C can read the tensors: on the CPU, of one dtype that has C kernels, with a dense last dimension."""
    dtype = first.dtype
    if not _is_built(dtype) or not first.is_cpu or first.stride(-1) != 1:
        return False
    for x in others:  # noqa: SIM110  (called 40 times per step; a generator takes three times as long)
        if x.dtype is not dtype or not x.is_cpu or x.stride(-1) != 1:
            return False
    return True


def add_rms_norm_c(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``kernels.add_rms_norm``: x and residual [T, hidden] -> their sum normalised, and the sum."""
    if not suits(x, weight) or (residual is not None and not suits(residual)):
        return add_rms_norm_reference(x, residual, weight, eps, offset)
    num_tokens, width = x.shape
    normed = torch.empty(num_tokens, width, dtype=x.dtype)
    total = x if residual is None else torch.empty(num_tokens, width, dtype=x.dtype)
    library(x.dtype).add_rms_norm(
        normed.data_ptr(), total.data_ptr(),
        x.data_ptr(), None if residual is None else residual.data_ptr(), weight.data_ptr(),
        num_tokens, width, x.stride(0), 0 if residual is None else residual.stride(0),
        eps, offset, torch.get_num_threads(),
    )  # fmt: skip
    return normed, total


def silu_mul_c(gate_up: Tensor) -> Tensor:
    """``kernels.silu_mul``: [T, 2 I] -> [T, I]."""
    if not suits(gate_up):
        return silu_mul_reference(gate_up)
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_tokens, width, dtype=gate_up.dtype)
    library(gate_up.dtype).silu_mul(
        out.data_ptr(), gate_up.data_ptr(), num_tokens, width, gate_up.stride(0), torch.get_num_threads()
    )
    return out


def qk_norm_rope_c(
    qkv: Tensor, cos: Tensor, signed_sin: Tensor, *,
    num_heads: int, num_kv_heads: int, norm_weight: Tensor | None = None, eps: float = 1e-6, norm_offset: float = 0.0,
    k_cache: Tensor | None = None, v_cache: Tensor | None = None, slot_mapping: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``kernels.qk_norm_rope``: qkv [T, H + 2 H_kv, D] -> qk [T, H + H_kv, D], and the store."""
    num_tokens, _, dim = qkv.shape
    num_qk = num_heads + num_kv_heads
    whole = [x for x in (cos, signed_sin, norm_weight, k_cache, v_cache) if x is not None]
    dense = suits(qkv, *whole) and qkv.stride(1) == dim and all(x.is_contiguous() for x in whole)
    if not dense or (slot_mapping is not None and slot_mapping.dtype is not torch.int64):
        return qk_norm_rope_reference(
            qkv, cos, signed_sin,
            num_heads=num_heads, num_kv_heads=num_kv_heads, norm_weight=norm_weight, eps=eps, norm_offset=norm_offset,
            k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping,
        )  # fmt: skip
    qk = torch.empty(num_tokens, num_qk, dim, dtype=qkv.dtype)
    library(qkv.dtype).qk_norm_rope(
        qk.data_ptr(), qkv.data_ptr(), cos.data_ptr(), signed_sin.data_ptr(),
        None if norm_weight is None else norm_weight.data_ptr(),
        None if k_cache is None else k_cache.data_ptr(),
        None if v_cache is None else v_cache.data_ptr(),
        None if slot_mapping is None else slot_mapping.data_ptr(),
        num_kv_heads, num_tokens, num_qk, dim, qkv.stride(0), eps, norm_offset,
        torch.get_num_threads(),
    )  # fmt: skip
    return qk


def store_kv_c(
    k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slot_mapping: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """``kernels.store_kv``: rows [T, H_kv, D] to their slots, which must be within the cache; -1: not stored."""
    dim, rows, caches = k.shape[-1], [k], [k_cache]
    if v is not None and v_cache is not None:
        if k_scale is not None and v_scale is not None:
            _store_codes(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
            return
        rows, caches = [k, v], [k_cache, v_cache]
    dense = suits(*rows, *caches) and all(x.stride(1) == dim and x.shape == k.shape for x in rows)
    dense = dense and all(cache.is_contiguous() for cache in caches) and slot_mapping.dtype is torch.int64
    if not dense:
        store_kv_reference(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
        return
    library(k.dtype).store_kv(
        k_cache.data_ptr(), None if v_cache is None else v_cache.data_ptr(),
        k.data_ptr(), None if v is None else v.data_ptr(), slot_mapping.data_ptr(),
        k.shape[0], k.shape[1] * dim, k.stride(0), 0 if v is None else v.stride(0),
    )  # fmt: skip


def _store_codes(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_scale: Tensor, v_scale: Tensor
) -> None:  # fmt: skip
    """``store_kv`` to a quantised cache."""
    dim, stored = k.shape[-1], (k_cache, v_cache, k_scale, v_scale)
    dense = suits(k, v) and k.stride(1) == v.stride(1) == dim and all(x.is_cpu and x.is_contiguous() for x in stored)
    if not dense or slots.dtype is not torch.int64:
        store_kv_reference(k, v, k_cache, v_cache, slots, k_scale, v_scale)
        return
    library(k.dtype).store_kv_codes(
        k_cache.data_ptr(), v_cache.data_ptr(), k_scale.data_ptr(), v_scale.data_ptr(), k.data_ptr(), v.data_ptr(),
        slots.data_ptr(), *k.shape, k.stride(0), v.stride(0), FORMATS[k_cache.dtype], torch.get_num_threads(),
    )  # fmt: skip


def store_latents_c(
    x: Tensor, cache: Tensor, slot_mapping: Tensor, *, v_dim: int, latent_scale: Tensor, rest_scale: Tensor
) -> None:
    """``store_latents_reference`` in C."""
    stored = (cache, latent_scale, rest_scale)
    if not suits(x) or slot_mapping.dtype is not torch.int64 or not all(y.is_cpu and y.is_contiguous() for y in stored):
        scales = {"latent_scale": latent_scale, "rest_scale": rest_scale}
        store_latents_reference(x, cache, slot_mapping, v_dim=v_dim, **scales)
        return
    library(x.dtype).store_latent_codes(
        *(y.data_ptr() for y in stored), x.data_ptr(), slot_mapping.data_ptr(),
        *x.shape, v_dim, x.stride(0), FORMATS[cache.dtype],
    )  # fmt: skip


def argmax_c(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``argmax_reference``: [R, V], V > 0 -> values [R], int64 token ids [R].

    torch carries an index with every maximum, and takes 4 ms for 32 rows of 151,936 logits. C finds the maximum 64
    logits at a time and then its index, in 0.6 ms (one thread).
    """
    if not suits(logits):
        return argmax_reference(logits)
    num_rows, width = logits.shape
    values = torch.empty(num_rows, dtype=logits.dtype)
    token_ids = torch.empty(num_rows, dtype=torch.int64)
    library(logits.dtype).argmax(
        token_ids.data_ptr(), values.data_ptr(), logits.data_ptr(),
        num_rows, width, logits.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return values, token_ids


def mask_logits_c(logits: Tensor, masks: Tensor) -> Tensor:
    """``mask_logits_reference``: logits [R, V] and int32 masks [R, ceil(V / 32)] -> [R, V], in one pass."""
    if not suits(logits):
        return mask_logits_reference(logits, masks)
    check_masks(logits, masks)
    num_rows, width = logits.shape
    out = torch.empty(num_rows, width, dtype=logits.dtype)
    library(logits.dtype).mask_logits(
        out.data_ptr(), logits.data_ptr(), masks.data_ptr(),
        num_rows, width, logits.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return out
