"""Products with quantised weights, for a sweep and for ``bench kernels``: shapes of Llama-3-8B and random codes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_infer.bench.kernels.peers import Ready
from paged_infer.bench.kernels.problems import Tensors
from paged_infer.kernels.attention.tile_table import LinearKey
from paged_infer.kernels.quant.gemm import TritonProduct, pack_triton
from paged_infer.kernels.quant.product import Activations, float8_tokens, int8_tokens
from paged_infer.kernels.quant.tiles import FEW_TOKENS
from paged_infer.kernels.quant.weight import QuantisedWeight, dequantise

MATRICES = {"output": (4096, 4096), "gate and up": (28_672, 4096), "down": (4096, 14_336)}  # N and K


@dataclass(frozen=True, slots=True)
class Grid:
    """How W and x are quantised: bits of W, columns of a group (None: a row), what x is rounded to."""

    bits: int
    group_size: int | None = None
    has_zeros: bool = False
    is_float: bool = False
    activations: Activations | None = None


GRIDS = {
    "w4a16": Grid(4, 128),
    "w4a16, zeros": Grid(4, 128, has_zeros=True),
    "w4a16, groups of 32": Grid(4, 32),
    "w8a16": Grid(8),
    "float8, blocks, bfloat16 x": Grid(8, 128, is_float=True),
    "w8a8": Grid(8, activations="int8"),
    "float8": Grid(8, is_float=True, activations="float8"),
    "float8, blocks": Grid(8, 128, is_float=True, activations="float8"),
}


@dataclass(frozen=True)
class LinearProblem:
    """x [T, K] and W [N, K]."""

    x: Tensor
    weight: QuantisedWeight
    activations: Activations | None

    @cached_property
    def product(self) -> TritonProduct:
        product = pack_triton(self.weight, None, self.activations)
        assert product is not None, "there is a kernel for each of GRIDS"
        return product

    @cached_property
    def dense(self) -> Tensor:
        """W in the dtype of x."""
        return dequantise(self.weight).to(self.x.dtype)

    @cached_property
    def rounded(self) -> Tensor:
        """x in float64, rounded if the product rounds it."""
        if self.activations is None:
            return self.x.double()
        codes, scales = (int8_tokens if self.activations == "int8" else float8_tokens)(self.x)
        return codes.double() * scales.double()

    def exact(self) -> Tensor:
        """In float64."""
        return self.rounded @ dequantise(self.weight).double().T

    def call(self) -> Ready:
        return Ready(lambda: self.product(self.x))

    def call_dense(self) -> Ready:
        """torch's product of the same numbers, which are dequantised and rounded beforehand."""
        x, dense = self.rounded.to(self.x.dtype), self.dense
        return Ready(lambda: F.linear(x, dense))


def linear_problem(
    grid: Grid, matrix: tuple[int, int], num_tokens: int, dtype: torch.dtype, device: torch.device | str
) -> LinearProblem:
    """Random codes, with scales that make the products of about size 1."""
    (height, columns), tensors = matrix, Tensors(torch.float32, device)
    groups = columns // (grid.group_size or columns)
    noise = tensors.random(height, columns).clamp_(-3.9, 3.9)
    if grid.is_float:
        values, size = noise.to(torch.float8_e4m3fn), 1.0
    elif grid.bits == 8:
        values, size = (32 * noise).round_().to(torch.int8), 32.0
    else:
        codes = (2 * noise + 8).round_().clamp_(0, 15).to(torch.uint8)
        values, size = codes[:, ::2] | codes[:, 1::2] << 4, 2.0
    scales = (1 + 0.1 * tensors.random(height, groups)) / (size * columns**0.5)
    zeros = (8 + tensors.random(height, groups)).round_() if grid.has_zeros else None
    weight = QuantisedWeight(values, scales, zeros, grid.bits, columns // groups, matrix)
    return LinearProblem(Tensors(dtype, device, seed=1).random(num_tokens, columns), weight, grid.activations)


@dataclass(frozen=True, slots=True)
class LinearCase:
    """A product on one number of tokens, for a sweep."""

    kernel: str  # one of LINEAR_KERNELS, and of GRIDS
    matrix: str
    num_tokens: int
    sizes: tuple[int, int]

    @property
    def title(self) -> str:
        return f"{self.kernel}, {self.matrix} {self.sizes[0]:,} x {self.sizes[1]:,}, {self.num_tokens:,} tokens"

    @property
    def key(self) -> LinearKey:
        return LinearKey(self.kernel, "bfloat16", self.num_tokens <= FEW_TOKENS)

    @property
    def work(self) -> float:
        """Bytes of codes for few tokens, floating-point operations for many."""
        weights = self.sizes[0] * self.sizes[1]
        return weights * GRIDS[self.kernel].bits / 8 if self.key.few else 2.0 * weights * self.num_tokens

    def problem(self, device: torch.device | str) -> LinearProblem:
        return linear_problem(GRIDS[self.kernel], self.sizes, self.num_tokens, torch.bfloat16, device)
