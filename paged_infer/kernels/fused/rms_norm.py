"""Residual addition and RMSNorm in one pass over the row: one read and one write of each, where torch needs several.

    x [T, hidden] --(+)--> new_residual ----> / rms ----> * weight ----> normed        one program: one row,
    residual -------^          |                                                       held in registers
                               +----> written for the next addition

Values are rounded where torch rounds them (the sum, the normalised value and the product to x's dtype; the mean square
stays in float32), so the result equals that of ``model.layers.RMSNorm`` and of transformers' Llama, Qwen3 and, with an
offset, Gemma.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_infer.kernels.checks import FLOATS, layouts, shapes
from paged_infer.kernels.triton_runtime import launch, tl, triton

MAX_WIDTH = 16_384  # a row is in the registers of one program, which spill beyond this


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """RMSNorm (Zhang and Sennrich 2019) of ``x + residual``, and the sum itself.

    Args:
        x: [T, hidden] with any row stride.
        residual: the same, or None: the norm is then of x, and the second result is x itself.
        weight: [hidden].
        eps: added to the mean square.
        offset: added to the weight, in float32 (1 in Gemma's checkpoints).

    Returns:
        (normed, new_residual), [T, hidden] each, in x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit.
    """
    _check(x, residual, weight)
    num_tokens, width = x.shape
    normed = x.new_empty(x.shape)
    total = None if residual is None else x.new_empty(x.shape)
    block = triton.next_power_of_2(width)
    launch(
        _add_rms_norm_kernel,
        (num_tokens,),
        *(x, residual, weight, normed, total, x.stride(0), 0 if residual is None else residual.stride(0)),
        *(width, eps),
        OFFSET=offset,
        BLOCK=block,
        num_warps=min(16, max(1, block // 256)),  # 16 bytes of 2-byte elements per thread
    )
    return normed, x if total is None else total


def add_rms_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``add_rms_norm`` in plain torch."""
    total = x if residual is None else x + residual
    if x.dtype == torch.float32:
        return F.rms_norm(total, weight.shape, weight + offset if offset else weight, eps), total
    wide = total.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset:
        return (wide * (weight.float() + offset)).to(x.dtype), total
    return wide.to(x.dtype) * weight, total


@triton.jit
def _add_rms_norm_kernel(
    x, residual, weight, normed, total, x_stride, residual_stride, width, eps, OFFSET: tl.constexpr, BLOCK: tl.constexpr
):  # one program: one row. Arithmetic in float32, rounded to the dtype of x where torch rounds
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    dtype = x.dtype.element_ty
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        wide += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = wide.to(dtype)
        tl.store(total + row * width + column, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    mean_square = tl.sum(wide * wide, 0) / width
    unit = wide * tl.rsqrt(mean_square + eps)
    if OFFSET == 0:
        unit = unit.to(dtype).to(tl.float32)
    else:  # Gemma rounds once
        scale += OFFSET
    tl.store(normed + row * width + column, (unit * scale).to(dtype), mask=inside)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    tensors = {"x": x, "weight": weight} | ({} if residual is None else {"residual": residual})
    fits = x.dim() == 2 and weight.shape == x.shape[1:] and (residual is None or residual.shape == x.shape)
    if not fits or not 1 <= x.shape[1] <= MAX_WIDTH:
        raise ValueError(
            f"add_rms_norm expects x and residual [T, hidden], weight [hidden], hidden 1..{MAX_WIDTH}; got "
            + shapes(**tensors)
        )
    alike = len({(t.dtype, t.device) for t in tensors.values()}) == 1
    if not (alike and x.dtype in FLOATS and all(t.stride(-1) == 1 for t in tensors.values())):
        raise ValueError(
            "add_rms_norm expects one device, one dtype of float32, float16 and bfloat16, rows with stride 1; got "
            + layouts(**tensors)
        )
