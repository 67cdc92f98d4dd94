"""Write this step's keys and values to their slots in the paged cache: one launch for both.

    row t of the qkv matrix   [ q q q q | k k | v v ]        slot_mapping[t] = block * block_size + offset
                                           |     |
    k_cache  block 5   [ ..  k  ..  .. ] <-+     |           slot -1 (a padding row): nothing is written
    v_cache  block 5   [ ..  v  ..  .. ] <-------+

The heads of a token are adjacent in the source and in the cache, so a row is one run of H_kv * D elements and the copy
is as wide as the memory bus allows. Torch needs one indexed copy for keys, one for values, and a read of the slots to
leave out -1, for which the host waits in every layer; here -1 is a branch, and a CUDA graph can capture the launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paged_infer.kernels.checks import INDICES, check_slots, layouts, on_one_device, shapes
from paged_infer.kernels.kv_quant import quantise_kv
from paged_infer.kernels.triton_runtime import launch, tl, triton


def store_kv(
    k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slot_mapping: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Copy token t to slot ``slot_mapping[t]``; for slot -1 nothing is written. Without v and v_cache, keys alone.

    Args:
        k, v: [T, H_kv, D] with any row stride (views into a qkv matrix); the heads of a row are adjacent.
        k_cache, v_cache: [num_blocks, block_size, H_kv, D], contiguous, changed in place.
        slot_mapping: [T] int64 or int32; all slots but -1 are distinct.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit; for CPU tensors also a slot outside the cache. (On a
        GPU the check would make the host wait: there the caller must ensure it.)
    """
    if k_scale is not None:
        store_kv_reference(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
        return
    _check(k, v, k_cache, v_cache, slot_mapping)
    num_tokens, width = k.shape[0], k.shape[1] * k.shape[2]
    block = min(triton.next_power_of_2(max(width, 1)), 2048)
    launch(
        _store_kv_kernel,
        (num_tokens, triton.cdiv(width, block)),
        *(k, v, k_cache, v_cache, slot_mapping, k.stride(0), 0 if v is None else v.stride(0), width),
        BLOCK=block,
        num_warps=min(8, max(1, block // 256)),  # 16 bytes of 2-byte elements per thread
    )


def store_kv_reference(
    k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slot_mapping: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """``store_kv`` in plain torch: leave out tokens without a slot, then copy by index."""
    if slot_mapping.numel() == 0:
        return
    kept = None if slot_mapping.min() >= 0 else slot_mapping >= 0
    slots = slot_mapping.long() if kept is None else slot_mapping[kept].long()
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if x is not None and cache is not None:
            rows = x if kept is None else x[kept]
            if scale is not None:
                rows, scales = quantise_kv(rows, cache.dtype)
                scale.flatten(0, 1).index_copy_(0, slots, scales)
                rows, cache = rows.view(torch.uint8), cache.view(torch.uint8)
            cache.view(-1, *x.shape[1:]).index_copy_(0, slots, rows)


@triton.jit
def _store_kv_kernel(
    k, v, k_cache, v_cache, slot_mapping, k_stride, v_stride, width, BLOCK: tl.constexpr
):  # one program: BLOCK elements of one token's keys, and of its values
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot >= 0:
        keys = tl.load(k + token * k_stride + column, mask=column < width)
        tl.store(k_cache + slot * width + column, keys, mask=column < width)
        if v is not None:
            values = tl.load(v + token * v_stride + column, mask=column < width)
            tl.store(v_cache + slot * width + column, values, mask=column < width)


def _check(
    k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slot_mapping: Tensor
) -> None:  # fmt: skip
    if (v is None) != (v_cache is None):
        raise ValueError("v and v_cache come together or not at all")
    v, v_cache = k if v is None else v, k_cache if v_cache is None else v_cache
    tensors = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slot_mapping}
    fits = k.dim() == 3 and k_cache.dim() == 4 and k.shape == v.shape and k_cache.shape == v_cache.shape
    if not fits or k_cache.shape[2:] != k.shape[1:] or slot_mapping.shape != k.shape[:1]:
        raise ValueError(
            "store_kv expects k and v [T, H_kv, D], caches [num_blocks, block_size, H_kv, D], slot_mapping [T]; got "
            + shapes(**tensors)
        )
    alike = k.dtype == v.dtype == k_cache.dtype == v_cache.dtype and on_one_device(**tensors)
    dense = (k.shape[2], 1) == k.stride()[1:] == v.stride()[1:] and k_cache.is_contiguous() and v_cache.is_contiguous()
    if not (alike and dense and slot_mapping.dtype in INDICES):
        raise ValueError(
            "store_kv expects one device, one dtype, int64 or int32 slots, adjacent heads, contiguous caches; got "
            + layouts(**tensors)
        )
    check_slots(slot_mapping, k_cache)
