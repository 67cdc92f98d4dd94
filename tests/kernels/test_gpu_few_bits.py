"""Quantised products, compiled for the GPU of this machine: bits of a row, graphs, references, and every code."""

from __future__ import annotations

import pytest
import torch
from gpu_tensors import DEVICE, ON_GPU, assert_near, random

from paged_infer.bench.kernels.linear_cases import GRIDS, linear_problem
from paged_infer.kernels.quant.gemm import pack_triton
from paged_infer.kernels.quant.product import float8_tokens, int8_tokens, quantised_linear
from paged_infer.kernels.quant.rounding import round_tokens
from paged_infer.kernels.quant.weight import QuantisedWeight, dequantise, pack_int4

pytestmark = ON_GPU


HAS_FLOAT8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
EACH_GRID = pytest.mark.parametrize("name", GRIDS)


@EACH_GRID
def test_a_row_of_a_quantised_product_has_the_same_bits_alone_and_in_any_crowd(name: str) -> None:
    """Few tokens in tiles of 16, 32 and 64, split over programs; many in programs that compute all splits in turn."""
    problem = linear_problem(GRIDS[name], (1024, 4096), 300, torch.bfloat16, DEVICE)
    assert problem.product.splits > 1
    together = problem.product(problem.x)
    for tokens in (1, 7, 17, 33, 64, 65, 200):
        assert torch.equal(problem.product(problem.x[:tokens]), together[:tokens]), tokens


@EACH_GRID
@pytest.mark.parametrize("num_tokens", [5, 100])
def test_a_graph_of_a_quantised_product_follows_its_x(name: str, num_tokens: int) -> None:
    problem = linear_problem(GRIDS[name], (1024, 4096), num_tokens, torch.bfloat16, DEVICE)
    x, product = problem.x, problem.product
    product(x)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = product(x)
    x.copy_(random(*x.shape, seed=9))
    graph.replay()
    assert torch.equal(captured, product(x))


@EACH_GRID
def test_quantised_products_are_near_their_reference(name: str) -> None:
    problem = linear_problem(GRIDS[name], (1000, 4096), 40, torch.bfloat16, DEVICE)
    bias = random(1000, seed=3)
    product = pack_triton(problem.weight, bias, problem.activations)
    reference = quantised_linear(problem.x, problem.weight, bias, problem.activations)
    assert_near(product(problem.x), reference)
    if problem.activations == "int8":  # of few tokens, and of many
        assert torch.equal(product(problem.x), reference)
        many = problem.x.repeat(2, 1)
        assert torch.equal(product(many), quantised_linear(many, problem.weight, bias, "int8"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_each_code_of_4_bits_and_of_float8_is_decoded_exactly(dtype: torch.dtype) -> None:
    """Compiled kernels shift the codes into the bits of a float, which the interpreter does not do for bfloat16."""
    x = torch.eye(256, dtype=dtype, device=DEVICE)
    bytes_ = torch.arange(256, device=DEVICE)
    float8 = bytes_.where(bytes_ % 128 != 127, 0).to(torch.uint8).repeat(64, 1).view(torch.float8_e4m3fn)
    for values, bits in ((float8, 8), (pack_int4((bytes_ % 16).repeat(64, 1)), 4)):
        weight = QuantisedWeight(values, torch.ones(64, 1, device=DEVICE), None, bits, 256, (64, 256))
        assert torch.equal(pack_triton(weight, None)(x).float(), dequantise(weight).t())


@pytest.mark.parametrize(
    ("activations", "reference"),
    [
        ("int8", int8_tokens),
        pytest.param("float8", float8_tokens, marks=pytest.mark.skipif(not HAS_FLOAT8, reason="needs sm89")),
    ],
)
def test_tokens_are_rounded_to_the_bits_of_their_reference(activations, reference) -> None:
    x = random(300, 5000, dtype=torch.float32)
    x[0] = torch.arange(5000, device=DEVICE).remainder(255) / 2 - 63.5  # every second one is a tie
    x[1], x[2], x[3] = 0, x[2] * 1e-38, x[3] * 1e37
    for some in (x, x.bfloat16(), x[:, 1000:]):
        codes, scales = round_tokens(some, activations)
        expected, expected_scales = reference(some)
        assert torch.equal(scales, expected_scales)
        assert torch.equal(codes.float(), expected.float())
