"""The fused kernels, each described once: for its check, its comparison with torch and its compilation.

    kernel.arguments(shape, tensors)  ->  kernel.function(**arguments), kernel.reference(**arguments)

A description is a function that makes the kernel's arguments, with what differs from ``FusedKernel``'s defaults in
its decorator. A new kernel needs nothing else here. The attention kernels take a ``problems.PagedProblem`` instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import paged_infer.kernels
from paged_infer.bench.kernels.problems import Tensors
from paged_infer.kernels.fused.noise import noise, row_keys

Arguments = dict[str, Any]
Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model, Llama-3-8B's unless given, and of one step of it."""

    tokens: int = 32
    rows: int = 32  # sequences: each samples one token
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    hidden: int = 4096
    intermediate: int = 14_336
    vocab: int = 128_256
    block_size: int = 16
    has_padding: bool = False  # the second token has slot -1

    @property
    def heads(self) -> dict[str, Any]:
        return {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}


def largest_error(
    arguments: Arguments, outputs: list[Tensor], exact: list[Tensor], size: Callable[[Tensor], Tensor] = Tensor.abs
) -> float:
    """The largest |output - exact| / (1 + size(exact)); NaN if any is."""
    errors = [((x.double() - y).abs() / (1 + size(y))).max() for x, y in zip(outputs, exact, strict=True)]
    return float(torch.stack(errors).max())


@dataclass(frozen=True, slots=True)
class FusedKernel:
    """One kernel: how it is called, and what it is held to."""

    function: Function
    reference: Function
    arguments: Callable[[Shape, Tensors], Arguments]
    written: tuple[str, ...] = ()  # arguments that it changes in place: outputs, too
    error: Callable[[Arguments, list[Tensor], list[Tensor]], float] = largest_error
    tolerance: float | None = None  # None: the dtype's
    elements: Callable[[Shape], int] | None = None  # read and written once for a token; None: not timed
    peers: Mapping[str, Function] | None = None  # timed with it; None: the reference, as "torch"
    layers: int = 1  # calls that are timed together, each with its own arguments
    reference_waits: bool = False  # the host reads values of tensors in the reference: no CUDA graph can hold it

    @property
    def contenders(self) -> dict[str, Function]:
        """What is timed, by name; ours first."""
        return {self.function.__name__: self.function, **(self.peers or {"torch": self.reference})}

    def can_be_captured(self, function: Function) -> bool:
        """Whether a CUDA graph can hold a call of ``function``, one of the contenders."""
        return not (self.reference_waits and function is self.reference)

    def outputs(self, function: Function, arguments: Arguments) -> list[Tensor]:
        """The tensors that a call of ``function`` returns, then those that it changes."""
        values = [function(**arguments), *(arguments[name] for name in self.written)]
        return [x for value in values for x in ([value] if isinstance(value, Tensor) else value or ())]

    def run(self, function: Function, layers: list[Arguments]) -> Tensor:
        """Call ``function`` for each layer; returns the last layer's first output in floating point."""
        for arguments in layers:
            outputs = self.outputs(function, arguments)
        return next(x for x in outputs if x.is_floating_point())

    def error_on(self, shape: Shape, tensors: Tensors) -> float:
        """The error on random arguments, measured against the reference in float64."""
        arguments = self.arguments(shape, tensors)
        exact = self.outputs(self.reference, {name: _in_float64(value) for name, value in arguments.items()})
        return self.error(arguments, self.outputs(self.function, arguments), exact)


FUSED: dict[str, FusedKernel] = {}


def described(**options: Any) -> Callable[[Function], Function]:
    """Enter the decorated function into ``FUSED``, as the description of the kernel of its name."""

    def enter(arguments: Function) -> Function:
        name = arguments.__name__
        ours, reference = (getattr(paged_infer.kernels, found) for found in (name, f"{name}_reference"))
        FUSED[name] = FusedKernel(ours, reference, arguments, **options)
        return arguments

    return enter


# -- Keys and values -------------------------------------------------------------------------------------------------


def _store_indexed(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Torch's shortest way, for a step without padding: a slot of -1 would be an error."""
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping, k)
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping, v)


STORES: dict[str, Function] = {
    "torch, two index_copy_": _store_indexed,
    "torch, leaving out slot -1": paged_infer.kernels.store_kv_reference,
}
CACHES = ("k_cache", "v_cache")


def _caches(shape: Shape, tensors: Tensors) -> Arguments:
    """A cache in which each token has a block to itself, as decodes have, in shuffled order."""
    size = (shape.tokens, shape.block_size, shape.num_kv_heads, shape.head_dim)
    block = torch.randperm(shape.tokens, generator=torch.Generator().manual_seed(3))
    slots = block * shape.block_size + block % shape.block_size
    if shape.has_padding:
        slots[1] = -1
    return {name: tensors.random(*size) for name in CACHES} | {"slot_mapping": slots.to(tensors.device)}


@described(
    written=CACHES,
    tolerance=0.0,
    elements=lambda s: 4 * s.num_kv_heads * s.head_dim,
    peers=STORES,
    layers=32,
    reference_waits=True,
)
def store_kv(shape: Shape, tensors: Tensors) -> Arguments:
    size = (shape.tokens, shape.num_kv_heads, shape.head_dim)
    return {name: tensors.random(*size) for name in "kv"} | _caches(shape, tensors)


@described(written=("caches",), tolerance=0.0)
def copy_blocks(shape: Shape, tensors: Tensors) -> Arguments:
    """Blocks 2, 3, 4 to 5, 6, 7."""
    size = (8, shape.block_size, shape.num_kv_heads, shape.head_dim)
    sources, destinations = (torch.arange(n, n + 3, device=tensors.device) for n in (2, 5))
    return {"caches": [tensors.random(*size) for _ in "kv"], "sources": sources, "destinations": destinations}


# -- Between the matrices --------------------------------------------------------------------------------------------


@described(elements=lambda s: 4 * s.hidden)
def add_rms_norm(shape: Shape, tensors: Tensors) -> Arguments:
    x, residual = (tensors.random(shape.tokens, shape.hidden) for _ in range(2))
    return {"x": x, "residual": residual, "weight": tensors.random(shape.hidden), "eps": 1e-6}


@described(elements=lambda s: 3 * s.intermediate)
def silu_mul(shape: Shape, tensors: Tensors) -> Arguments:
    return {"gate_up": tensors.random(shape.tokens, 2 * shape.intermediate)}


def _pair_size(x: Tensor) -> Tensor:
    """Of both elements of a rotated pair: two large terms may cancel to a small one."""
    return x.abs() + x.roll(x.shape[-1] // 2, dims=-1).abs()


@described(
    written=CACHES,
    error=partial(largest_error, size=_pair_size),
    elements=lambda s: 2 * (s.num_heads + 2 * s.num_kv_heads) * s.head_dim,
    reference_waits=True,
)
def qk_norm_rope(shape: Shape, tensors: Tensors) -> Arguments:
    tokens, dim, num_qk = shape.tokens, shape.head_dim, shape.num_heads + shape.num_kv_heads
    frequencies = 1e4 ** (-2 * torch.arange(dim // 2).double() / dim)
    angles = torch.arange(tokens)[:, None, None] * frequencies  # [T, 1, D / 2]
    cos, sin = (x.to(tensors.device, tensors.dtype) for x in (angles.cos(), angles.sin()))
    return {
        "qkv": tensors.random(tokens, num_qk + shape.num_kv_heads, dim),
        "cos": torch.cat((cos, cos), -1),
        "signed_sin": torch.cat((-sin, sin), -1),
        "norm_weight": tensors.random(num_qk, dim),
        **shape.heads,
        **_caches(shape, tensors),
    }


def score_lost(arguments: Arguments, outputs: list[Tensor], exact: list[Tensor]) -> float:
    """How far the sampled token's score in float64 is below the best: a rounding may decide between equals."""
    logits, temperatures, *row = arguments.values()
    tokens, device = outputs[0][:, None], logits.device
    keys = row_keys(*(x.tolist() for x in row)).to(device)
    log_noise = noise(keys, torch.arange(logits.shape[1], dtype=torch.int32, device=device)).double().log()
    is_greedy = (temperatures == 0)[:, None]
    scores = logits.double() / temperatures.where(temperatures > 0, 1)[:, None] - log_noise.masked_fill(is_greedy, 0)
    lost = scores.amax(1, keepdim=True) - scores.gather(1, tokens.clamp(min=0))
    return float(lost.where(tokens >= 0, math.inf).max())


@described(error=score_lost, tolerance=1e-4, elements=lambda s: s.vocab, reference_waits=True)
def sample(shape: Shape, tensors: Tensors) -> Arguments:
    number = torch.arange(shape.rows, device=tensors.device)
    return {
        "logits": 4 * tensors.random(shape.rows, shape.vocab),
        "temperatures": number / shape.rows * 2,  # the first is greedy
        "seeds": number * 7919,
        "sample_indices": number % 2,
        "positions": number + 100,
    }


def _in_float64(value: Any) -> Any:
    if isinstance(value, list):
        return [_in_float64(one) for one in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
