"""The core that the attention kernels share: a tile of queries against a tile of keys. Only addresses differ.

scores [M, N]  =  q [M, D]  x  k [N, D]^T          in registers
row_max, row_sum [M] and acc [M, D]                updated along the row: the online softmax, in powers of two
"""

from __future__ import annotations

import math

import torch

from paged_infer.kernels.triton_runtime import tl, triton

LOG2_E = 1.0 / math.log(2.0)  # folded into the scale: exp(x) = exp2(x * LOG2_E), and exp2 is what the hardware has


def score_factors(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """(scale_log2, tanh_scale) of ``attend_tile``: its exponents are scale_log2 * scores, in powers of two.

    With a soft cap, scores become tanh(tanh_scale * scores) first. Without, tanh_scale is None, and the kernel is
    compiled without it.
    """
    return (scale * LOG2_E, None) if softcap is None else (softcap * LOG2_E, scale / softcap)


def padded(dim: int) -> int:
    """The next power of two, at least 16, the smallest size that tensor cores multiply."""
    return max(16, triton.next_power_of_2(dim))


def max_registers(dtype: torch.dtype) -> int | None:
    """Limit of registers per thread, or None. In float32 the assembler on its own spills a few for more occupancy."""
    return 255 if dtype == torch.float32 else None


@triton.jit
def load_tiles(
    k_ptrs, v_ptrs, there, dim, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, WIDEN: tl.constexpr
):  # fmt: skip
    """Keys and values [N, D]: only rows that are ``there`` if MASKED, otherwise all of them, without a test."""
    if MASKED:
        k = tl.load(k_ptrs, mask=there[:, None] & (dim < D)[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=there[:, None] & (dim < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        k, v = tl.load(k_ptrs), tl.load(v_ptrs)
    else:
        k = tl.load(k_ptrs, mask=(dim < D)[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=(dim < D)[None, :], other=0.0)
    if WIDEN:
        k, v = k.to(tl.float32), v.to(tl.float32)
    return k, v


@triton.jit
def read_codes(codes, FORMAT: tl.constexpr):
    """8-bit codes (``kv_quant``) viewed as int8 -> float32: codes / ``code_span``, within -2..2, so they fit float16.

    float8 bits are shifted to the sign, exponent and mantissa of float32, and a factor corrects the bias of the
    exponent, so the GPU needs no support for float8.
    """
    if FORMAT == 1:  # int8
        return codes.to(tl.float32) * 0.0078125
    bits = codes.to(tl.int32)
    sign, rest = (bits & 0x80) << 24, bits & 0x7F
    if FORMAT == 2:  # e4m3: 2^120 is the difference of the biases, 2^8 the span
        return (sign | (rest << 20)).to(tl.float32, bitcast=True) * 5192296858534827628530496329220096.0
    return (sign | (rest << 21)).to(tl.float32, bitcast=True) * 79228162514264337593543950336.0  # 2^(112 - 16)


@triton.jit
def code_span(FORMAT: tl.constexpr):
    """The power of two that ``read_codes`` divides the codes of a format by; the scales are multiplied by it."""
    return 128.0 if FORMAT == 1 else 256.0 if FORMAT == 2 else 65536.0


@triton.jit
def tanh(x):
    """To 2e-7 of its value: a polynomial near 0, where the formula cancels. tl has none that can be interpreted."""
    size, square = tl.abs(x), x * x
    near = x + x * square * (-0.3333328 + square * (0.13328335 + square * (-0.05313979 + square * 0.01728459)))
    power = tl.math.exp2(size * -2.8853900817779268)  # exp(-2 size)
    far = (1.0 - power) / (1.0 + power)
    return tl.where(size < 0.55, near, tl.where(x < 0, -far, far))


@triton.jit
def start_softmax(sinks_ptr, head, BLOCK_M: tl.constexpr):
    """(row_max, row_sum) [M] before the first key. The sink of ``head``, a number or [M], is a key of value zero."""
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        row_max = row_sum + tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634  # log2(e)
        row_sum += 1.0
    return row_max, row_sum


@triton.jit
def attend_tile(
    acc, row_max, row_sum, q, k, v, query, key, num_keys, scale_log2, tanh_scale, window,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr, k_scale=None, v_scale=None,
):  # fmt: skip
    """Add keys and values [N, D] of positions ``key``; if MASKED, hide those that positions ``query`` do not see.

    If keys and values are codes, ``k_scale`` and ``v_scale`` [N] are the factors that dequantise them.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [M, N]
    if k_scale is not None:
        scores = scores * k_scale[None, :]
    if tanh_scale is not None:
        scores = tanh(scores * tanh_scale)
    if MASKED:
        seen = (key < num_keys)[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= query[:, None])
        if HAS_WINDOW:
            seen = seen & (key[None, :] > query[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)  # [M], in powers of two
    # In a row that has seen no key yet, -inf - (-inf) would be NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
    weights = tl.math.exp2(scores * scale_log2 - shift[:, None])  # [M, N]
    shrink = tl.math.exp2(row_max - shift)  # [M]
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    if v_scale is not None:
        weights = weights * v_scale[None, :]
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_max, row_sum


@triton.jit
def finish_softmax(acc, row_max, row_sum):
    """The output [M, D] and the log-sum-exp [M]: 0 and -inf for a row that saw no key, NaN for one that read NaN."""
    seen = row_sum != 0.0
    divisor = tl.where(seen, row_sum, 1.0)
    lse = (row_max + tl.math.log2(divisor)) * 0.6931471805599453
    return acc / divisor[:, None], tl.where(seen, lse, float("-inf"))


@triton.jit
def seen_by_tile(first, last, num_keys, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys that queries at positions first..last see: (begin, full_begin, full_end, end).

    begin..full_begin and full_end..end need a mask; all queries see full_begin..full_end. All but end are tile edges.
    """
    if CAUSAL:
        end = tl.maximum(tl.minimum(last + 1, num_keys), 0)
        full_end = tl.maximum(first + 1, 0) // BLOCK_N * BLOCK_N
    else:
        end = num_keys
        full_end = num_keys // BLOCK_N * BLOCK_N
    begin, full_begin = 0, 0
    if HAS_WINDOW:
        begin = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        full_begin = tl.minimum(
            tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK_N) * BLOCK_N, tl.cdiv(end, BLOCK_N) * BLOCK_N
        )
        full_end = tl.maximum(full_begin, full_end)
    return begin, full_begin, full_end, end
