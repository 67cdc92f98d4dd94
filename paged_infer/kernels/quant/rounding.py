"""Per-token dynamic quantisation of x to 8 bits: ``product.int8_tokens`` and ``float8_tokens`` as one kernel.

Each program computes one row: it reads the row to find max |x|, and again (from the cache) to round it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paged_infer.kernels.quant.product import Activations
from paged_infer.kernels.triton_runtime import launch, tl, triton

BLOCK = 1024


def round_tokens(x: Tensor, activations: Activations) -> tuple[Tensor, Tensor]:
    """x [T, K], with any row stride -> codes [T, K], int8 or float8 e4m3, and scales [T, 1] float32.

    The scale of a row with NaN is NaN; that of a row with an infinity is infinite.
    """
    num_rows, columns = x.shape
    dtype = torch.int8 if activations == "int8" else torch.float8_e4m3fn
    codes, scales = x.new_empty(num_rows, columns, dtype=dtype), x.new_empty(num_rows, 1, dtype=torch.float32)
    block = min(triton.next_power_of_2(max(columns, 1)), BLOCK)
    launch(_round_kernel, (num_rows,), codes, scales, x, columns, x.stride(0), BLOCK=block, IS_INT=dtype == torch.int8)
    return codes, scales


@triton.jit
def _round_kernel(codes, scales, x, columns, x_stride, BLOCK: tl.constexpr, IS_INT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    limit: tl.constexpr = 127.5 if IS_INT else 448.0
    most = tl.zeros([BLOCK], tl.int32)
    for first in range(0, columns, BLOCK):
        k = first + tl.arange(0, BLOCK)
        value = tl.load(x + row * x_stride + k, mask=k < columns, other=0.0).to(tl.float32)
        # As integers, the bits of |x| have the same order as |x|, with NaN above all; a float maximum would drop NaN.
        most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.max(most, 0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, limit)
    scale = tl.where(scale < 1.17549435e-38, 1.17549435e-38, scale)
    tl.store(scales + row, scale)
    for first in range(0, columns, BLOCK):
        k = first + tl.arange(0, BLOCK)
        value = tl.load(x + row * x_stride + k, mask=k < columns, other=0.0).to(tl.float32)
        ratio = tl.div_rn(value, scale)
        if IS_INT:
            ratio = (ratio + 12582912.0) - 12582912.0  # 1.5 x 2^23: the sum is rounded to an integer, ties to even
            code = tl.minimum(tl.maximum(ratio, -128.0), 127.0)
        else:
            code = _to_float8(tl.minimum(tl.maximum(ratio, -448.0), 448.0))
        tl.store(codes + row * columns + k, code.to(codes.dtype.element_ty), mask=k < columns)


@triton.jit
def _to_float8(x):  # float32 -> the nearest e4m3 value, ties to even, as a cast does, except in the interpreter
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)  # 3 bits of mantissa
    return tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, normal)  # below 2^-6 (subnormal) the step is 2^-9
