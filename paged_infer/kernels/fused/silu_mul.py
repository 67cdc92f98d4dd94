"""The activation of SwiGLU, silu(gate) * up (Shazeer 2020), in one pass over the matrix that holds both.

    row t of gate_up   [ g0 g1 .. g(I-1) | u0 u1 .. u(I-1) ]   ->   [ silu(g0) * u0, .., silu(g(I-1)) * u(I-1) ]

Torch writes silu(gate) to memory and reads it back; here it stays in registers.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from paged_infer.kernels.checks import FLOATS
from paged_infer.kernels.triton_runtime import launch, tl, triton


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 I], gate first, with any row stride -> silu(gate) * up [T, I].

    The activation is rounded to the dtype before the product, as torch does.

    Raises:
        ValueError: not two dimensions, an odd width, not a float dtype, or rows with gaps.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"silu_mul expects gate_up [T, 2 I]; got {list(gate_up.shape)}")
    if gate_up.dtype not in FLOATS or gate_up.stride(1) != 1:
        raise ValueError(
            "silu_mul expects float32, float16 or bfloat16 with stride 1 in a row; got "
            f"{gate_up.dtype}, strides {gate_up.stride()}"
        )
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, width)
    block = min(triton.next_power_of_2(max(width, 1)), 1024)
    launch(
        _silu_mul_kernel,
        (num_tokens, triton.cdiv(width, block)),
        *(gate_up, out, gate_up.stride(0), width),
        BLOCK=block,
        num_warps=max(1, block // 256),  # 16 bytes of 2-byte elements per thread
    )
    return out


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """``silu_mul`` in plain torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _silu_mul_kernel(gate_up, out, stride, width, BLOCK: tl.constexpr):  # one program: BLOCK columns of a row
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    dtype = out.dtype.element_ty
    gate = tl.load(gate_up + row * stride + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + column, mask=inside).to(tl.float32)
    small = tl.exp(-tl.abs(gate))  # within [0, 1] for a gate of any size
    activation = (gate * tl.where(gate > 0, 1.0, small) / (1.0 + small)).to(dtype).to(tl.float32)
    tl.store(out + row * width + column, (activation * up).to(dtype), mask=inside)
