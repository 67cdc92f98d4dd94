"""Between the qkv matrix and attention: QK-norm, rotary positions and the store to the cache, in one launch.

    row t of qkv [T, H + 2 H_kv, D]     [ q q q q | k k | v v ]
                                          |         |     |
              / rms * weight (Qwen3)      v         v     |
              rotated to position t       v         v     |        slot = slot_mapping[t]; -1: not stored
                                          |         |     |
    qk [T, H + H_kv, D]                 [ q q q q | k k ] |
    k_cache  [ ..  slot  .. ] <---------------------+     |        so attention reads this step's keys and
    v_cache  [ ..  slot  .. ] <---------------------------+        values where it reads all others

Torch passes over the row nine times for this, stores not counted. A program takes a few heads of one token, each as two
halves: the rotation acts on pairs (i, i + D/2), so halves that stay in registers need no shuffle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paged_infer.kernels.checks import FLOATS, INDICES, check_slots, layouts, on_one_device, shapes
from paged_infer.kernels.triton_runtime import launch, tl, triton

ELEMENTS_PER_PROGRAM = 1024


def qk_norm_rope(
    qkv: Tensor, cos: Tensor, signed_sin: Tensor, *,
    num_heads: int, num_kv_heads: int, norm_weight: Tensor | None = None, eps: float = 1e-6, norm_offset: float = 0.0,
    k_cache: Tensor | None = None, v_cache: Tensor | None = None, slot_mapping: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Normalise each query and key head, rotate it to its position, and store keys and values if caches are given.

    Args:
        qkv: [T, H + 2 H_kv, D] with any row stride. D is even.
        cos, signed_sin: [T, 1, D] in qkv's dtype, the first half of sin negated (``model.layers.RotaryEmbedding``).
        norm_weight: [H + H_kv, D], the weight of each head, or None: no norm.
        eps: added to the mean square.
        norm_offset: added to the weight, in float32 (1 in Gemma's checkpoints).
        k_cache, v_cache: [num_blocks, block_size, H_kv, D], contiguous, changed in place; both or neither.
        slot_mapping: [T] int64 or int32, with caches: the slot for each token's rotated key and its value; -1: none.

    Returns:
        qk [T, H + H_kv, D], contiguous: queries, then keys.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit; for CPU tensors also a slot outside the cache.
    """
    num_qk = num_heads + num_kv_heads
    _check(qkv, cos, signed_sin, norm_weight, k_cache, v_cache, slot_mapping, num_qk, num_kv_heads)
    num_tokens, num_all, head_dim = qkv.shape
    qk = qkv.new_empty(num_tokens, num_qk, head_dim)
    num_touched = num_qk if k_cache is None else num_all
    half_block = triton.next_power_of_2(head_dim // 2)
    heads = min(triton.next_power_of_2(num_touched), max(1, ELEMENTS_PER_PROGRAM // (2 * half_block)))
    launch(
        _qk_norm_rope_kernel,
        (num_tokens, triton.cdiv(num_touched, heads)),
        *(qkv, cos, signed_sin, norm_weight, qk, k_cache, v_cache, slot_mapping),
        *(qkv.stride(0), cos.stride(0), signed_sin.stride(0), num_heads, num_kv_heads, eps),
        OFFSET=norm_offset,
        HEAD_DIM=head_dim,
        HEADS=heads,
        HALF_BLOCK=half_block,
        num_warps=max(1, heads * half_block // 256),  # 16 bytes of 2-byte elements per thread, in each half
    )
    return qk


def qk_norm_rope_reference(
    qkv: Tensor, cos: Tensor, signed_sin: Tensor, *,
    num_heads: int, num_kv_heads: int, norm_weight: Tensor | None = None, eps: float = 1e-6, norm_offset: float = 0.0,
    k_cache: Tensor | None = None, v_cache: Tensor | None = None, slot_mapping: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``qk_norm_rope`` in plain torch: the norm, the rotation and the store, one after another."""
    num_qk = num_heads + num_kv_heads
    x, v = qkv[:, :num_qk], qkv[:, num_qk:]
    if norm_weight is not None:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        x = (wide * (norm_weight.float() + norm_offset)).to(x.dtype) if norm_offset else wide.to(x.dtype) * norm_weight
    x = torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin)
    if k_cache is not None and v_cache is not None and slot_mapping is not None:
        kept = slot_mapping >= 0
        k_cache.flatten(0, 1)[slot_mapping[kept]] = x[kept, num_heads:]
        v_cache.flatten(0, 1)[slot_mapping[kept]] = v[kept]
    return x


@triton.jit
def _qk_norm_rope_kernel(
    qkv, cos, signed_sin, norm_weight, qk, k_cache, v_cache, slot_mapping,
    qkv_stride, cos_stride, sin_stride, num_heads, num_kv_heads, eps,
    OFFSET: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    # One program: HEADS heads of one token. Arithmetic in float32, rounded to the dtype where torch rounds.
    HALF: tl.constexpr = HEAD_DIM // 2
    dtype = qk.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
    column = tl.arange(0, HALF_BLOCK)[None, :]  # [1, D/2], of either half
    num_qk = num_heads + num_kv_heads
    is_qk = (head < num_qk) & (column < HALF)
    is_value = (head >= num_qk) & (head < num_qk + num_kv_heads) & (column < HALF)
    is_read = is_qk if k_cache is None else is_qk | is_value

    at = head * HEAD_DIM + column  # [HEADS, D/2], offset of the first half; the second is HALF further
    row = qkv + token * qkv_stride + at
    first_in, second_in = tl.load(row, mask=is_read, other=0.0), tl.load(row + HALF, mask=is_read, other=0.0)
    first, second = first_in.to(tl.float32), second_in.to(tl.float32)
    if norm_weight is not None:
        mean_square = tl.sum(first * first + second * second, 1) / HEAD_DIM
        scale = tl.rsqrt(mean_square + eps)[:, None]
        first_weight = tl.load(norm_weight + at, mask=is_qk, other=0.0).to(tl.float32)
        second_weight = tl.load(norm_weight + at + HALF, mask=is_qk, other=0.0).to(tl.float32)
        if OFFSET == 0:
            first = ((first * scale).to(dtype).to(tl.float32) * first_weight).to(dtype).to(tl.float32)
            second = ((second * scale).to(dtype).to(tl.float32) * second_weight).to(dtype).to(tl.float32)
        else:  # Gemma rounds once
            first = (first * scale * (first_weight + OFFSET)).to(dtype).to(tl.float32)
            second = (second * scale * (second_weight + OFFSET)).to(dtype).to(tl.float32)

    # Each head loads the same row of cos and sin from L1: broadcasting one row would go through shared memory.
    place = tl.broadcast_to(column, (HEADS, HALF_BLOCK))
    turn, sign = cos + token * cos_stride + place, signed_sin + token * sin_stride + place
    first_cos = tl.load(turn, mask=place < HALF, other=0.0).to(tl.float32)
    second_cos = tl.load(turn + HALF, mask=place < HALF, other=0.0).to(tl.float32)
    first_sin = tl.load(sign, mask=place < HALF, other=0.0).to(tl.float32)
    second_sin = tl.load(sign + HALF, mask=place < HALF, other=0.0).to(tl.float32)
    first_out = ((first * first_cos).to(dtype).to(tl.float32) + second * first_sin).to(dtype)
    second_out = ((second * second_cos).to(dtype).to(tl.float32) + first * second_sin).to(dtype)

    out = qk + token * num_qk * HEAD_DIM + at
    tl.store(out, first_out, mask=is_qk)
    tl.store(out + HALF, second_out, mask=is_qk)
    if k_cache is not None:
        slot = tl.load(slot_mapping + token).to(tl.int64)
        if slot >= 0:
            k_out = k_cache + slot * num_kv_heads * HEAD_DIM + (at - num_heads * HEAD_DIM)
            tl.store(k_out, first_out, mask=is_qk & (head >= num_heads))
            tl.store(k_out + HALF, second_out, mask=is_qk & (head >= num_heads))
            v_out = v_cache + slot * num_kv_heads * HEAD_DIM + (at - num_qk * HEAD_DIM)
            tl.store(v_out, first_in, mask=is_value)
            tl.store(v_out + HALF, second_in, mask=is_value)


def _check(
    qkv: Tensor, cos: Tensor, signed_sin: Tensor, norm_weight: Tensor | None, k_cache: Tensor | None,
    v_cache: Tensor | None, slot_mapping: Tensor | None, num_qk: int, num_kv_heads: int,
) -> None:  # fmt: skip
    optional = {"norm_weight": norm_weight, "k_cache": k_cache, "v_cache": v_cache}
    floats = {"qkv": qkv, "cos": cos, "signed_sin": signed_sin}
    floats |= {name: x for name, x in optional.items() if x is not None}
    tensors = floats | ({} if slot_mapping is None else {"slot_mapping": slot_mapping})
    if len({x is None for x in (k_cache, v_cache, slot_mapping)}) > 1:
        raise ValueError(f"k_cache, v_cache and slot_mapping must be given together or not at all; got {[*tensors]}")

    num_tokens, num_all, head_dim = qkv.shape if qkv.dim() == 3 else (0, 0, 0)
    fits = num_all == num_qk + num_kv_heads and head_dim % 2 == 0 and head_dim > 0
    fits = fits and cos.shape == signed_sin.shape == (num_tokens, 1, head_dim)
    fits = fits and (norm_weight is None or norm_weight.shape == (num_qk, head_dim))
    if k_cache is not None and v_cache is not None and slot_mapping is not None:
        fits = fits and k_cache.dim() == 4 and k_cache.shape[2:] == (num_kv_heads, head_dim)
        fits = fits and k_cache.shape == v_cache.shape and slot_mapping.shape == (num_tokens,)
    if not fits:
        raise ValueError(
            "qk_norm_rope expects qkv [T, H + 2 H_kv, D], cos and signed_sin [T, 1, D], norm_weight [H + H_kv, D], "
            "caches [num_blocks, block_size, H_kv, D], slot_mapping [T], D even; got "
            f"H {num_qk - num_kv_heads}, H_kv {num_kv_heads}, {shapes(**tensors)}"
        )
    alike = len({x.dtype for x in floats.values()}) == 1 and on_one_device(**tensors)
    dense = qkv.stride()[1:] == (head_dim, 1) and cos.stride(2) == signed_sin.stride(2) == 1
    dense = dense and all(x is None or x.is_contiguous() for x in optional.values())
    integer = slot_mapping is None or slot_mapping.dtype in INDICES
    if not (alike and dense and integer and qkv.dtype in FLOATS):
        raise ValueError(
            "qk_norm_rope expects one device, one dtype of float32, float16 and bfloat16, int64 or int32 slots, rows "
            "with stride 1, contiguous weights and caches; got " + layouts(**tensors)
        )
    if slot_mapping is not None and k_cache is not None:
        check_slots(slot_mapping, k_cache)
