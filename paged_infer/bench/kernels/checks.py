"""Every kernel compared to float64 on this device, before anything is timed; the GPU kernel tests run the same checks.

On CUDA the kernels are compiled and shapes are a model's; on a CPU Triton's interpreter runs them on small shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from paged_infer.bench.kernels.fused import FUSED, Shape, largest_error
from paged_infer.bench.kernels.linear_cases import GRIDS, linear_problem
from paged_infer.bench.kernels.peers import Ready, our_flash, our_paged, packed
from paged_infer.bench.kernels.problems import Tensors, paged_attention_float64, paged_problem
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.attention.mla import LATENT_SCALES
from paged_infer.kernels.attention.mla_decode import latent_decode
from paged_infer.kernels.fused.store_kv import store_kv, store_kv_reference
from paged_infer.kernels.kv_quant import KV_DTYPES, dequantise_latents, quantise_latents

# How far from float64 an output may be, as |out - exact| / (1 + |exact|). Where a kernel rounds between its steps, as
# torch does, that is two or three units in the last place (2^-11 and 2^-8); the interpreter truncates to bfloat16.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SMALL_TOLERANCES = TOLERANCES | {torch.bfloat16: 3e-2}


Cases = dict[str, dict[str, Any]]  # options of the problem and of the kernel, by name


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One kernel on one input."""

    kernel: str
    case: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN does not


@dataclass(frozen=True, slots=True)
class Sizes:
    """Shapes to check on, and how exact the answers are."""

    shape: Shape
    queries: int
    context: int
    window: int
    tolerances: dict[torch.dtype, float]


INTERPRETED = Sizes(Shape(5, 5, 4, 2, 24, 96, 96, 3000, has_padding=True), 21, 50, 11, SMALL_TOLERANCES)
COMPILED = Sizes(Shape(tokens=300, vocab=151_936, has_padding=True), 1037, 3000, 509, TOLERANCES)


def run_checks(device: torch.device) -> list[CheckResult]:
    """Every kernel, in every dtype that it takes, on ``device``. A wrong one is in the list, not an exception."""
    sizes = COMPILED if device.type == "cuda" else INTERPRETED
    return [result for check in CHECKS.values() for result in check(device, sizes)]


def _flash(device: torch.device, sizes: Sizes) -> Iterator[CheckResult]:
    """The last of more keys than queries: dense, with every mask."""
    window = sizes.window
    cases: Cases = {"causal": {}, "full": {"causal": False}, f"causal, window {window}": {"window": window}}
    cases["soft cap, sinks"] = _capped(device, sizes)
    return _attention("flash_attention", our_flash, [(5, sizes.queries)] * 2, cases, device, sizes)


def _paged(device: torch.device, sizes: Sizes) -> Iterator[CheckResult]:
    """Decodes (long ones are split over programs), a prompt and a chunk after a prefix, in one batch, amid NaN."""
    context, queries, window = sizes.context, sizes.queries, sizes.window
    sequences = [(context, 1), (0, 1), (7, 1), (0, queries), (context // 2, queries // 2)]
    cases: Cases = {"blocks of 16": {}, f"blocks of 3, window {window}": {"block_size": 3, "window": window}}
    cases[f"soft cap, sinks, window {window}"] = {"window": window} | _capped(device, sizes)
    return _attention("paged_attention", our_paged, sequences, cases, device, sizes)


def _paged_codes(device: torch.device, sizes: Sizes) -> Iterator[CheckResult]:
    """The same batch over keys and values of 8 bits, against the numbers that the codes stand for."""
    sequences = [(sizes.context, 1), (0, 1), (7, 1), (0, sizes.queries), (sizes.context // 2, sizes.queries // 2)]
    for dtype, tolerance in sizes.tolerances.items():
        for kind in KV_DTYPES:
            heads, dim = sizes.shape.heads, sizes.shape.head_dim
            problem = paged_problem(sequences, **heads, head_dim=dim, dtype=dtype, device=device).coded(kind)
            error = largest_error({}, [packed(our_paged(problem).call())], [paged_attention_float64(problem)])
            yield CheckResult("paged_attention_8_bits", f"{_name(dtype)}, {kind}", error, tolerance)


def _store_codes(device: torch.device, sizes: Sizes) -> Iterator[CheckResult]:
    """Codes and scales have the reference's bits: an error is the share of bytes that differ."""
    heads, dim, tokens = sizes.shape.heads["num_kv_heads"], sizes.shape.head_dim, 12
    for dtype in sizes.tolerances:
        k, v = Tensors(dtype, device).random(2 * tokens, heads, dim).split(tokens)
        slots = torch.arange(tokens, device=device).flip(0)
        for kind, stored in KV_DTYPES.items():
            codes = torch.zeros(4, 3, 4, heads, dim, dtype=torch.int8, device=device).view(stored).unbind()
            scales = torch.zeros(4, 3, 4, heads, dtype=torch.float16, device=device).unbind()
            for store, at in ((store_kv, 0), (store_kv_reference, 2)):
                store(k, v, codes[at], codes[at + 1], slots, scales[at], scales[at + 1])
            pairs = [*zip(codes[:2], codes[2:], strict=True), *zip(scales[:2], scales[2:], strict=True)]
            errors = [float((a.view(torch.int8) != b.view(torch.int8)).double().mean()) for a, b in pairs]
            yield CheckResult("store_kv_8_bits", f"{_name(dtype)}, {kind}", max(errors), 0.0)


def _capped(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    return {"softcap": 3.0, "sinks": torch.linspace(-2, 4, sizes.shape.heads["num_heads"], device=device)}


def _attention(
    kernel: str,
    ours: Callable[..., Ready],
    sequences: list[tuple[int, int]],
    cases: Cases,
    device: torch.device,
    sizes: Sizes,
) -> Iterator[CheckResult]:
    shape = sizes.shape
    for dtype, tolerance in sizes.tolerances.items():
        for case, given in cases.items():
            options = given.copy()
            block_size = options.pop("block_size", 16)
            pool = {"head_dim": shape.head_dim, "block_size": block_size, "dtype": dtype, "device": device}
            problem = paged_problem(sequences, **shape.heads, **pool)
            exact = paged_attention_float64(problem, **options)
            error = largest_error({}, [packed(ours(problem, **options).call())], [exact])
            yield CheckResult(kernel, f"{_name(dtype)}, {case}", error, tolerance)


def _latent(device: torch.device, sizes: Sizes) -> Iterator[CheckResult]:
    """Decodes of MLA, of DeepSeek's widths if compiled: long rows are split, and the heads take two programs."""
    dim, v_dim = (40, 24) if sizes is INTERPRETED else (576, 512)
    none = torch.empty(0, dtype=torch.int64)
    for dtype, tolerance in sizes.tolerances.items():
        sequences = [(sizes.context, 1), (0, 1), (7, 1), (sizes.queries, 1)]
        problem = paged_problem(sequences, num_heads=20, num_kv_heads=1, head_dim=dim, dtype=dtype, device=device)
        step = AttentionMetadata(
            none, none, problem.query_start_loc, problem.seq_lens, problem.block_tables,
            num_decodes=len(sequences), max_query_len=1, max_seq_len=sizes.context + 1,
        )  # fmt: skip
        for kind in (None, *KV_DTYPES):
            cache, scales, read = problem.k_cache, {}, problem.k_cache
            if kind is not None:
                codes, first, rest = quantise_latents(cache, v_dim, KV_DTYPES[kind])
                cache, scales = codes.view(KV_DTYPES[kind]), dict(zip(LATENT_SCALES, (first, rest), strict=True))
                read = dequantise_latents(cache, v_dim, first, rest)
            out = latent_decode(problem.q, cache, step, v_dim=v_dim, scale=dim**-0.5, **scales)
            lengths = [sum(sequence) for sequence in problem.sequences]
            keys = read.flatten(0, 2)[problem.slots].double().split(lengths)
            weights = [(q.double() @ k.T * dim**-0.5).softmax(-1) for q, k in zip(problem.q, keys, strict=True)]
            exact = torch.stack([w @ k[:, :v_dim] for w, k in zip(weights, keys, strict=True)])
            case = _name(dtype) if kind is None else f"{_name(dtype)}, {kind}"
            yield CheckResult("latent_decode", case, largest_error({}, [out], [exact]), tolerance)


def _quantised(device: torch.device, sizes: Sizes) -> Iterator[CheckResult]:
    """Each way to hold W and x; few tokens, whose columns are split over programs, and, if compiled, many."""
    matrix, tokens = ((20, 256), (5,)) if sizes is INTERPRETED else ((1000, 4096), (16, 300))
    for dtype, tolerance in sizes.tolerances.items():
        for name, grid in GRIDS.items():
            # sm90 keeps 14 bits of a sum of float8 products, of 128 columns at a time; sm80 rounds x to its dtype.
            allowed = max(tolerance, 2e-3) if grid.activations == "float8" else tolerance
            for num_tokens in tokens:
                problem = linear_problem(grid, matrix, num_tokens, dtype, device)
                error = largest_error({}, [problem.product(problem.x)], [problem.exact()])
                yield CheckResult("quantised_linear", f"{_name(dtype)}, {name}, {num_tokens} tokens", error, allowed)


def _fused(kernel: str, device: torch.device, sizes: Sizes) -> Iterator[CheckResult]:
    described = FUSED[kernel]
    for dtype, tolerance in sizes.tolerances.items():
        error = described.error_on(sizes.shape, Tensors(dtype, device))
        yield CheckResult(
            kernel, _name(dtype), error, tolerance if described.tolerance is None else described.tolerance
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CHECKS: dict[str, Callable[[torch.device, Sizes], Iterator[CheckResult]]] = {
    "flash_attention": _flash,
    "paged_attention": _paged,
    "paged_attention_8_bits": _paged_codes,
    "store_kv_8_bits": _store_codes,
    "latent_decode": _latent,
    "quantised_linear": _quantised,
    **{kernel: partial(_fused, kernel) for kernel in FUSED},
}
