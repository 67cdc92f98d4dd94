"""NF4 (4-bit NormalFloat; Dettmers 2023, QLoRA, section 3): a codebook of 16 values for normally distributed weights.

Equal steps waste codes on large weights, which are rare. NF4's values are quantiles of the normal distribution, so each
code is used about equally often; one of them is 0. Each block of 64 weights is scaled to -1 .. 1 by its largest |w|.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paged_infer.kernels.quant.weight import pack_int4, unpack_int4

BLOCK = 64
_LAST = 0.9677083  # the outermost quantile; the mean of 1 - 1/30 and 1 - 1/32 (bitsandbytes: create_normal_map)


def nf4_values() -> Tensor:
    """The 16 values from -1 to 1, ascending: 7 negative quantiles, 0, and 8 positive quantiles."""
    positive = torch.special.ndtri(torch.linspace(_LAST, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(_LAST, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)))
    return (values / positive[0]).float()


def quantise_nf4(weight: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """W [N, K] -> packed codes, uint8 [N, K / 2], and the largest |w| (absmax) of each block, float32 [N, K / block].

    Raises:
        ValueError: the block does not divide K, or K is odd.
    """
    if weight.shape[1] % block:
        raise ValueError(f"block={block}: must divide the {weight.shape[1]} columns")
    blocks = weight.detach().float().unflatten(1, (-1, block))
    largest = blocks.abs().amax(-1)
    values = nf4_values()
    edges = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(blocks / largest.clamp(min=1e-30)[:, :, None], edges)
    return pack_int4(codes.flatten(1)), largest


def dequantise_nf4(packed: Tensor, largest: Tensor) -> Tensor:
    """``quantise_nf4``'s result -> [N, K] float32."""
    blocks = nf4_values()[unpack_int4(packed).long()].unflatten(1, (largest.shape[1], -1))
    return (blocks * largest[:, :, None]).flatten(1)
