"""x W^T + b for quantised W, by dequantising it: the reference for the kernels, and the fallback where there is none.

Weight-only (``activations`` None): x is not rounded. "int8" (W8A8) and "float8" also quantise x, with one scale per
token (row), in float32:

    scale[t] = max |x[t]| / 127.5    codes = round(x[t] / scale[t]), ties to even, clipped to -128 .. 127
    scale[t] = max |x[t]| / 448      codes = x[t] / scale[t] as float8 e4m3

These are compressed-tensors' rules (0.20.1, ``calculate_qparams`` and ``_quantize``, read), except that for x in
bfloat16 it also rounds scale and quotient to bfloat16. A kernel has to divide, as here: -max |x| lies halfway between
two codes, and multiplying by 127.5 / max |x| may differ in the last bit, which gives the other code.

The bits of a row depend on no other row. With rounded x, law 1 holds only as far as x itself has the same bits. In a
float product, a difference in the last bit of x stays a last bit; but near the midpoint of two codes, rounding turns it
into a step of max |x| / 127.5. C's attention computes up to eight tokens of a sequence as decodes and more in tiles,
whose last bits differ. So a prompt that is computed in other chunks, or again after a preemption, may continue with
another token: this happened in 11 of 200 greedy texts of 24 tokens of a random model, with the reference and with C's
products alike. If attention gives a row the same bits in any chunk, it never happens
(``tests/model/quant/test_w8a8_laws.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from paged_infer.kernels.fused.moe import blocked_linear
from paged_infer.kernels.quant.weight import QuantisedWeight, dequantise, signed_codes

Activations = Literal["int8", "float8"]
# (W, bias [N] or None, what x is rounded to) -> the product; None: there is no kernel for them
PackQuantised = Callable[[QuantisedWeight, Tensor | None, Activations | None], Callable[[Tensor], Tensor] | None]


def no_kernel(weight: QuantisedWeight, bias: Tensor | None, activations: Activations | None) -> None:
    """The ``PackQuantised`` of a device without kernels for quantised weights."""
    return None


def quantised_linear(
    x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None, activations: Activations | None = None
) -> Tensor:
    """x [T, K], W [N, K], bias [N] -> [T, N] in the dtype of x: the reference for all kernels.

    With "int8", integers are summed exactly; where W has one scale per row, a kernel must give the same bits. x may be
    float64, for an accurate result to compare with.

    Args:
        activations: what x is rounded to, token by token; None: it is not rounded.
    """
    if activations == "int8" and not weight.values.is_floating_point():
        codes, scales = int8_tokens(x)
        out = _integer_product(codes, weight) * scales
        return (out if bias is None else out + bias.float()).to(x.dtype)
    if activations is not None:
        codes, scales = float8_tokens(x) if activations == "float8" else int8_tokens(x)
        x = (codes.float() * scales).to(x.dtype)
    return blocked_linear(x, dequantise(weight).to(x.dtype), bias)


def int8_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] -> codes [T, K] int8 and scales [T, 1] float32, one per token."""
    x = x.float()
    scales = (x.abs().amax(1, keepdim=True) / 127.5).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scales).round().clamp(-128, 127).to(torch.int8), scales


def float8_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] -> codes [T, K] float8 e4m3 and scales [T, 1] float32, one per token."""
    x, limit = x.float(), torch.finfo(torch.float8_e4m3fn).max
    scales = (x.abs().amax(1, keepdim=True) / limit).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scales).clamp(-limit, limit).to(torch.float8_e4m3fn), scales


def _integer_product(codes: Tensor, weight: QuantisedWeight) -> Tensor:
    """codes [T, K] int8 times W^T, without x's scales: [T, N] float32. Integers are summed exactly, in float64."""
    if weight.columns is not None:
        codes = codes[:, weight.columns.argsort()]
    ours = codes.double().unflatten(1, (-1, weight.group_size))
    theirs = signed_codes(weight).double().unflatten(1, (-1, weight.group_size))
    out = torch.zeros(len(codes), weight.shape[0], dtype=torch.float32, device=codes.device)
    for group, scale in enumerate(weight.scales.unbind(1)):
        out += (ours[:, group] @ theirs[:, group].t()).float() * scale
    return out
