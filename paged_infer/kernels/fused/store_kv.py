"""Write this step's keys and values to their slots in the paged cache: one launch for both.

    row t of the qkv matrix   [ q q q q | k k | v v ]        slot_mapping[t] = block * block_size + offset
                                           |     |
    k_cache  block 5   [ ..  k  ..  .. ] <-+     |           slot -1 (a padding row): nothing is written
    v_cache  block 5   [ ..  v  ..  .. ] <-------+

A token's heads lie side by side on both ends, so a row is one run of H_kv * D elements and the copy is as wide as the
memory bus allows. Torch needs one indexed copy for keys, one for values, and a look at the slots to leave out -1,
which makes the host wait for the device in every layer; here -1 is a branch, and a CUDA graph can hold the launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paged_infer.kernels.triton_runtime import launch, tl, triton


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Copy token t to slot ``slot_mapping[t]``; slot -1 writes nothing.

    Args:
        k, v: [T, H_kv, D]; rows may be apart (views into a qkv matrix), the heads of a row lie together.
        k_cache, v_cache: [num_blocks, block_size, H_kv, D], contiguous, changed in place.
        slot_mapping: [T] int64 or int32; no slot but -1 twice.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit; on CPU tensors also a slot outside the cache (on a
        GPU that would make the host wait, and is the caller's to prevent).
    """
    _check(k, v, k_cache, v_cache, slot_mapping)
    num_tokens, width = k.shape[0], k.shape[1] * k.shape[2]
    block = min(triton.next_power_of_2(max(width, 1)), 2048)
    launch(
        _store_kv_kernel,
        (num_tokens, triton.cdiv(width, block)),
        *(k, v, k_cache, v_cache, slot_mapping, k.stride(0), v.stride(0), width),
        BLOCK=block,
        num_warps=min(8, max(1, block // 256)),  # 16 bytes of 2-byte elements a thread
    )


def store_kv_reference(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """``store_kv`` in torch: leave out the tokens without a slot, then copy by index."""
    if slot_mapping.numel() == 0:
        return
    slot_mapping = slot_mapping.long()
    if slot_mapping.min() < 0:
        kept = slot_mapping >= 0
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    k_cache.view(-1, *k.shape[1:]).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, *v.shape[1:]).index_copy_(0, slot_mapping, v)


@triton.jit
def _store_kv_kernel(
    k, v, k_cache, v_cache, slot_mapping, k_stride, v_stride, width, BLOCK: tl.constexpr
):  # one program: BLOCK elements of one token's keys, and of its values
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot >= 0:
        keys = tl.load(k + token * k_stride + column, mask=column < width)
        values = tl.load(v + token * v_stride + column, mask=column < width)
        tl.store(k_cache + slot * width + column, keys, mask=column < width)
        tl.store(v_cache + slot * width + column, values, mask=column < width)


def _check(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    tensors = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slot_mapping}
    fits = k.dim() == 3 and k_cache.dim() == 4 and k.shape == v.shape and k_cache.shape == v_cache.shape
    if not fits or k_cache.shape[2:] != k.shape[1:] or slot_mapping.shape != k.shape[:1]:
        raise ValueError(
            "store_kv wants k and v [T, H_kv, D], caches [num_blocks, block_size, H_kv, D] and slot_mapping [T]; got "
            + ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
        )
    alike = k.dtype == v.dtype == k_cache.dtype == v_cache.dtype and len({x.device for x in tensors.values()}) == 1
    dense = (k.shape[2], 1) == k.stride()[1:] == v.stride()[1:] and k_cache.is_contiguous() and v_cache.is_contiguous()
    if not (alike and dense and slot_mapping.dtype in (torch.int64, torch.int32)):
        raise ValueError(
            "store_kv wants one device, one dtype, int64 or int32 slots, heads side by side, contiguous caches; got "
            + ", ".join(f"{n} {x.dtype} on {x.device}, strides {x.stride()}" for n, x in tensors.items())
        )
    if slot_mapping.device.type == "cpu" and slot_mapping.numel() > 0:
        num_slots = k_cache.shape[0] * k_cache.shape[1]
        lowest, highest = (int(x) for x in slot_mapping.aminmax())
        if lowest < -1 or highest >= num_slots:
            raise ValueError(f"slots {lowest}..{highest} must lie within -1..{num_slots - 1}, the cache's last")
