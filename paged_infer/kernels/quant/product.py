"""x W^T + b for W of few bits, by dequantising: the reference of the kernels, and what multiplies where there is none.

Weight-only (``activations`` None): x stays as it is. "int8" and "float8" also round x, each row by itself, in float32:

    scale[t] = max |x[t]| / 127.5    codes = round(x[t] / scale[t]), ties to even, cut at -128 and 127
    scale[t] = max |x[t]| / 448      codes = x[t] / scale[t] as float8 e4m3

These are compressed-tensors' rules (0.20.1, ``calculate_qparams`` and ``_quantize``, read), which rounds scale
and quotient to bfloat16, too, if x is. Every kernel has to divide, as they do: -max |x| is between two codes, and a
product by 127.5 / max |x| has another last bit, so another code.

In every form a row's bits depend on no other row. So law 1 holds as far as a row of x has the same bits: a product of
floats takes a last bit for what it is, but rounding turns one into a step of max |x| / 127.5 where a number is between
two codes. C's attention computes up to eight tokens of a sequence as decodes and more in tiles, whose last bits differ.
Where such a step decides between two tokens, a prompt in chunks, or computed again after a preemption, may go on with
the other one: 11 of 200 greedy texts of 24 tokens of a random model, with the reference as with C's products. If
attention gives its rows the same bits in any chunk, none does (``tests/model/quant/test_w8a8_laws.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from paged_infer.kernels.fused.moe import blocked_linear
from paged_infer.kernels.quant.weight import QuantisedWeight, dequantise, signed_codes

Activations = Literal["int8", "float8"]
# (W, bias [N] or None, how x is rounded) -> the product; None: there is no kernel for them
PackQuantised = Callable[[QuantisedWeight, Tensor | None, Activations | None], Callable[[Tensor], Tensor] | None]


def no_kernel(weight: QuantisedWeight, bias: Tensor | None, activations: Activations | None) -> None:
    """The ``PackQuantised`` of a device without kernels for weights of few bits."""
    return None


def quantised_linear(
    x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None, activations: Activations | None = None
) -> Tensor:
    """x [T, K], bias [N] -> [T, N], in the dtype of x: the reference of all kernels; with x in float64, an exact one.

    Integers are summed exactly. Of W with a scale a row, kernels have to give the same bits.
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
    """x [T, K] -> codes [T, K] int8 and scales [T, 1] float32."""
    x = x.float()
    scales = (x.abs().amax(1, keepdim=True) / 127.5).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scales).round().clamp(-128, 127).to(torch.int8), scales


def float8_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] -> codes [T, K] float8 e4m3 and scales [T, 1] float32."""
    x, limit = x.float(), torch.finfo(torch.float8_e4m3fn).max
    scales = (x.abs().amax(1, keepdim=True) / limit).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scales).clamp(-limit, limit).to(torch.float8_e4m3fn), scales


def _integer_product(codes: Tensor, weight: QuantisedWeight) -> Tensor:
    """[T, N] float32. The integers are summed exactly (in float64), so in any order."""
    if weight.columns is not None:
        codes = codes[:, weight.columns.argsort()]
    ours = codes.double().unflatten(1, (-1, weight.group_size))
    theirs = signed_codes(weight).double().unflatten(1, (-1, weight.group_size))
    out = torch.zeros(len(codes), weight.shape[0], dtype=torch.float32, device=codes.device)
    for group, scale in enumerate(weight.scales.unbind(1)):
        out += (ours[:, group] @ theirs[:, group].t()).float() * scale
    return out
