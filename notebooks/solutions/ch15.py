"""Solutions to the exercises of chapter 15, fewer bits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def unpack_awq(qweight):
    """Nibble i of a word belongs to row [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight."""
    shifts = 4 * torch.arange(8, device=qweight.device)
    nibbles = (qweight[..., None] >> shifts) & 15  # [K, N / 8, 8]
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7], device=qweight.device)
    return nibbles[..., order.argsort()].flatten(1).T


def w8a8_product(x, codes, scales):
    """Integers are summed exactly, so a row does not depend on its company; the scales come last."""
    x_scales = x.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127.5  # [T, 1]
    x_codes = (x.float() / x_scales).round().clamp(-128, 127)
    sums = x_codes.double() @ codes.double().T
    return sums.float() * x_scales * scales.float()


def crossover_rows(bytes_per_s, flops_16, flops_8):
    """W4A16 computes, 2 M / flops_16 a weight, as long as W8A8 reads, 1 / bytes_per_s.

    W8A8 still reads there, since its operations are no slower.
    """
    return math.ceil(flops_16 / (2 * bytes_per_s))


def packed_linear(decoder, x, name):
    """The words' codes by the groups of their scales."""
    if f"{name}.weight" in decoder.weights:
        return F.linear(x, decoder.weights[f"{name}.weight"])
    words, scales = decoder.weights[f"{name}.weight_packed"], decoder.weights[f"{name}.weight_scale"]
    shifts = 4 * torch.arange(8, device=words.device)
    codes = ((words[..., None] >> shifts) & 15).flatten(1) - 8  # [N, K]
    groups = codes.unflatten(1, (scales.shape[1], -1)) * scales[:, :, None]
    return F.linear(x, groups.flatten(1).to(x.dtype))
