"""W8A8 rounds each row of x by compressed-tensors' rule, and kernels round as the reference does."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp
from torch import Tensor

from paged_infer.kernels.cpu.build import unavailable_reason
from paged_infer.kernels.cpu.quant import pack_quantised
from paged_infer.kernels.quant.product import float8_tokens, int8_tokens
from paged_infer.kernels.quant.weight import QuantisedWeight


def rows_at_ties(count: int = 4000) -> Tensor:
    """[T, 64]: rows whose largest |x| is that of a negative value, which lies halfway between two codes."""
    x = torch.randn(count, 64, generator=torch.Generator().manual_seed(0))
    x[:, 0] = -1.1 * x.abs().amax(1)
    return x * torch.logspace(-6, 6, count)[:, None]


def identity() -> QuantisedWeight:
    return QuantisedWeight(torch.eye(64, dtype=torch.int8), torch.ones(64, 1), None, 8, 64, (64, 64))


def test_rows_are_rounded_by_the_rule_as_it_is_written() -> None:
    codes, scales = int8_tokens(torch.tensor([[-255.0, 127.5, 255.0, 0.0], [0.0] * 4]))
    assert codes.tolist() == [[-128, 64, 127, 0], [0] * 4] and scales[0].item() == 2


@pytest.mark.parametrize("kind", ["int", "float"])
def test_codes_and_scales_are_those_of_compressed_tensors(kind) -> None:
    x = rows_at_ties()
    args = QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy="token", dynamic=True)
    scales, zeros = compute_dynamic_scales_and_zp(x[None], args, torch.nn.Identity())
    ours = (int8_tokens if kind == "int" else float8_tokens)(x)
    assert torch.equal(ours[1], scales[0])
    assert torch.equal(ours[0].float(), quantize(x[None], scales, zeros, args)[0].float())


@pytest.mark.skipif(unavailable_reason() is not None, reason="no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_c_rounds_to_the_same_codes(dtype) -> None:
    x, product = rows_at_ties().to(dtype), pack_quantised(identity(), None, "int8")
    codes, scales = int8_tokens(x)
    assert product is not None and {-128, -127} == set(codes[:, 0].tolist())
    assert torch.equal(product(x), (codes.float() * scales).to(dtype))


def test_a_last_bit_of_the_largest_number_hardly_ever_changes_its_code() -> None:
    """With the rule ``x * (127.5 / max |x|)`` it did so in 27 of 100 rows."""
    x = rows_at_ties()
    other = x.clone()
    other[:, 0] = torch.nextafter(x[:, 0], torch.tensor(-torch.inf))
    assert (int8_tokens(x)[0] != int8_tokens(other)[0]).any(1).float().mean() < 0.05
