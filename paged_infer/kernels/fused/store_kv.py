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

from torch import Tensor

from paged_infer.kernels.checks import FLOATS, INDICES, check_codes, check_slots, layouts, on_one_device, shapes
from paged_infer.kernels.kv_quant import FORMATS, LARGEST_CODE, as_bytes, quantise_kv, quantise_latents
from paged_infer.kernels.triton_runtime import launch, tl, triton


def store_kv(
    k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slot_mapping: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Copy token t to slot ``slot_mapping[t]``; for slot -1 nothing is written. Without v and v_cache, keys alone.

    With scales, each vector is stored as 8-bit codes and a scale (``kernels.kv_quant``).

    Args:
        k, v: [T, H_kv, D] with any row stride (views into a qkv matrix); the heads of a row are adjacent.
        k_cache, v_cache: [num_blocks, block_size, H_kv, D], contiguous, changed in place.
        slot_mapping: [T] int64 or int32; all slots but -1 are distinct.
        k_scale, v_scale: [num_blocks, block_size, H_kv] float16, contiguous, changed in place.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit; for CPU tensors also a slot outside the cache. (On a
        GPU the check would make the host wait: there the caller must ensure it.)
    """
    _check(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    if k_scale is not None and v is not None and v_cache is not None:
        num_tokens, num_heads, dim = k.shape
        launch(
            _store_codes_kernel,
            (num_tokens, num_heads),
            *(k, v, as_bytes(k_cache), as_bytes(v_cache), k_scale, v_scale, slot_mapping, k.stride(0), v.stride(0)),
            num_heads, LARGEST_CODE[k_cache.dtype],
            FORMAT=FORMATS[k_cache.dtype], D=dim, BLOCK=triton.next_power_of_2(dim), num_warps=1,
        )  # fmt: skip
        return
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
                rows, cache = as_bytes(rows), as_bytes(cache)
            cache.view(-1, *x.shape[1:]).index_copy_(0, slots, rows)


def store_latents(
    x: Tensor, cache: Tensor, slot_mapping: Tensor, *, v_dim: int, latent_scale: Tensor, rest_scale: Tensor
) -> None:
    """Store MLA latents as 8-bit codes, each of their two parts with its own scale; for slot -1 nothing is written.

    Args:
        x: [T, Dk] with any row stride; the first ``v_dim`` elements are the value.
        cache: [num_blocks, block_size, 1, Dk] of int8 or float8, contiguous, changed in place.
        slot_mapping: [T] int64 or int32; all slots but -1 are distinct.
        latent_scale, rest_scale: [num_blocks, block_size, 1] float16, contiguous, changed in place.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit; for CPU tensors also a slot outside the cache.
    """
    _check_latents(x, cache, slot_mapping, v_dim, latent_scale, rest_scale)
    dim = x.shape[1]
    launch(
        _store_latents_kernel,
        (len(x), 2),
        *(x, as_bytes(cache), latent_scale, rest_scale, slot_mapping, x.stride(0), LARGEST_CODE[cache.dtype]),
        FORMAT=FORMATS[cache.dtype], D=dim, DV=v_dim, BLOCK_V=triton.next_power_of_2(v_dim),
        BLOCK_R=triton.next_power_of_2(dim - v_dim), num_warps=1,
    )  # fmt: skip


def store_latents_reference(
    x: Tensor, cache: Tensor, slot_mapping: Tensor, *, v_dim: int, latent_scale: Tensor, rest_scale: Tensor
) -> None:
    """``store_latents`` in plain torch."""
    kept = slot_mapping >= 0
    slots, codes = slot_mapping[kept].long(), quantise_latents(x[kept], v_dim, cache.dtype)
    for stored, own in zip((as_bytes(cache), latent_scale, rest_scale), codes, strict=True):
        stored.view(-1, *own.shape[1:]).index_copy_(0, slots, own)


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


@triton.jit
def _round_to_even(x):
    """To the nearest integer, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: beyond it, a float32 has no fraction


@triton.jit
def _from_half(bits):
    """float16 >= 0, as int32 bits -> float32."""
    normal = ((bits << 13) + (112 << 23)).to(tl.float32, bitcast=True)
    return tl.where(bits < 0x400, bits.to(tl.float32) * 5.9604644775390625e-8, normal)


@triton.jit
def _narrow(y, MANTISSA: tl.constexpr, BIAS: tl.constexpr, per_smallest):
    """float32 -> the bits of the nearest float8, ties to even. BIAS: float32's exponent bias minus float8's."""
    bits = y.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    DROP: tl.constexpr = 23 - MANTISSA
    normal = (size + ((1 << (DROP - 1)) - 1) + ((size >> DROP) & 1) - (BIAS << 23)) >> DROP
    below = _round_to_even(tl.minimum(tl.abs(y) * per_smallest, 256.0)).to(tl.int32)
    return ((bits >> 24) & 0x80) | tl.where(size < ((BIAS + 1) << 23), below, normal)


@triton.jit
def _store_vector(
    x_ptr, codes_ptr, scale_ptr, largest_code, FORMAT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """``quantise_kv`` of one vector, to the bit."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < D, other=0.0).to(tl.float32)
    # As integers, the bits of |x| have the same order as |x|, with NaN above all.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    is_finite = largest < 0x7F800000
    exact = tl.minimum(tl.div_rn(tl.where(is_finite, largest, 0).to(tl.float32, bitcast=True), largest_code), 65504.0)
    half = tl.where(  # the bits of float16, rounded up
        exact < 0.00006103515625,
        tl.ceil(tl.minimum(exact, 1e-4) * 16777216.0).to(tl.int32),
        (exact.to(tl.int32, bitcast=True) + 0x1FFF - (112 << 23)) >> 13,
    )
    inverse = tl.where(half > 0, tl.div_rn(1.0, tl.where(half > 0, _from_half(half), 1.0)), 0.0)
    x = tl.where(is_finite, x, 0.0)
    y = tl.minimum(tl.maximum(x * inverse, -largest_code), largest_code)
    if FORMAT == 1:
        codes = _round_to_even(y).to(tl.int32)
    elif FORMAT == 2:
        codes = _narrow(y, 3, 120, 512.0)
    else:
        codes = _narrow(y, 2, 112, 65536.0)
    tl.store(codes_ptr + at, codes.to(tl.int8), mask=at < D)
    tl.store(scale_ptr, tl.where(is_finite, half, 0x7E00).to(tl.int16).to(tl.float16, bitcast=True))


@triton.jit
def _store_codes_kernel(
    k, v, k_cache, v_cache, k_scale, v_scale, slot_mapping, k_stride, v_stride, num_heads, largest_code,
    FORMAT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program: the key and the value of one head of one token.
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot >= 0:
        at = slot * num_heads + head
        _store_vector(k + token * k_stride + head * D, k_cache + at * D, k_scale + at, largest_code, FORMAT, D, BLOCK)
        _store_vector(v + token * v_stride + head * D, v_cache + at * D, v_scale + at, largest_code, FORMAT, D, BLOCK)


@triton.jit
def _store_latents_kernel(
    x, cache, latent_scale, rest_scale, slot_mapping, stride, largest_code,
    FORMAT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # One program: one part of one token.
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot >= 0:
        row, codes = x + token * stride, cache + slot * D
        if part == 0:
            _store_vector(row, codes, latent_scale + slot, largest_code, FORMAT, DV, BLOCK_V)
        else:
            _store_vector(row + DV, codes + DV, rest_scale + slot, largest_code, FORMAT, D - DV, BLOCK_R)


def _check_latents(
    x: Tensor, cache: Tensor, slot_mapping: Tensor, v_dim: int, latent_scale: Tensor, rest_scale: Tensor
) -> None:
    check_codes(cache, cache, latent_scale, rest_scale, ("latent_scale", "rest_scale"))
    tensors = {"x": x, "cache": cache, "slot_mapping": slot_mapping}
    fits = x.dim() == 2 and cache.shape[2:] == (1, x.shape[1]) and slot_mapping.shape == x.shape[:1]
    if not fits or not 0 < v_dim < x.shape[1]:
        raise ValueError(
            "store_latents expects x [T, Dk], cache [num_blocks, block_size, 1, Dk], slot_mapping [T] and Dv within "
            f"1..Dk-1; got Dv {v_dim}, {shapes(**tensors)}"
        )
    dense = x.stride(1) == 1 and cache.is_contiguous() and slot_mapping.dtype in INDICES
    if not dense or x.dtype not in FLOATS or not on_one_device(**tensors):
        raise ValueError(
            "store_latents expects one device, floats, int64 or int32 slots, dense rows, a contiguous cache; got "
            + layouts(**tensors)
        )
    check_slots(slot_mapping, cache)


def _check(
    k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slot_mapping: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    if (v is None) != (v_cache is None):
        raise ValueError("v and v_cache must be given together or not at all")
    if k_scale is not None or v_scale is not None:
        check_codes(k_cache, k_cache if v_cache is None else v_cache, k_scale, v_scale)
        if v is None:
            raise ValueError("k_scale and v_scale are given without v: keys alone cannot be quantised")
    v, v_cache = k if v is None else v, k_cache if v_cache is None else v_cache
    tensors = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slot_mapping}
    fits = k.dim() == 3 and k_cache.dim() == 4 and k.shape == v.shape and k_cache.shape == v_cache.shape
    if not fits or k_cache.shape[2:] != k.shape[1:] or slot_mapping.shape != k.shape[:1]:
        raise ValueError(
            "store_kv expects k and v [T, H_kv, D], caches [num_blocks, block_size, H_kv, D], slot_mapping [T]; got "
            + shapes(**tensors)
        )
    alike = k.dtype == v.dtype and on_one_device(**tensors)
    alike = alike and (k_scale is not None or k.dtype == k_cache.dtype == v_cache.dtype)
    dense = (k.shape[2], 1) == k.stride()[1:] == v.stride()[1:] and k_cache.is_contiguous() and v_cache.is_contiguous()
    if not (alike and dense and slot_mapping.dtype in INDICES):
        raise ValueError(
            "store_kv expects one device, one dtype, int64 or int32 slots, adjacent heads, contiguous caches; got "
            + layouts(**tensors)
        )
    check_slots(slot_mapping, k_cache)
