"""NF4: the codebook is that of bitsandbytes, and each weight gets its nearest value."""

from __future__ import annotations

import pytest
import torch

from paged_infer.model.quant.nf4 import dequantise_nf4, nf4_values, quantise_nf4
from paged_infer.model.quant.scheme import Scheme, rounded

BITSANDBYTES = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]  # bitsandbytes/functional.py, get_4bit_type


def test_the_values_are_those_of_bitsandbytes() -> None:
    torch.testing.assert_close(nf4_values(), torch.tensor(BITSANDBYTES), atol=2e-6, rtol=0)


def test_each_weight_becomes_the_nearest_value_of_its_block() -> None:
    weight = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    packed, largest = quantise_nf4(weight)
    assert packed.shape == (5, 64) and largest.shape == (5, 2)
    blocks = weight.view(5, 2, 64)
    choices = largest[:, :, None, None] * nf4_values()
    nearest = (blocks[..., None] - choices).abs().amin(-1)
    torch.testing.assert_close((dequantise_nf4(packed, largest).view(5, 2, 64) - blocks).abs(), nearest)


def test_normal_weights_lose_less_than_by_equal_steps() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    by_steps = rounded(weight, Scheme(4, True, "group", 64))
    assert (dequantise_nf4(*quantise_nf4(weight)) - weight).norm() < 0.95 * (by_steps - weight).norm()


def test_a_block_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="block=64: must divide the 96 columns"):
        quantise_nf4(torch.zeros(1, 96))
