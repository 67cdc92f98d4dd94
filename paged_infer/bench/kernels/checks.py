"""Every kernel compared to float64 on this device, before anything is timed; the GPU kernel tests run the same checks.

On CUDA the kernels are compiled and shapes are a model's; on a CPU Triton's interpreter runs them on small shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paged_infer.bench.kernels.problems import attention_float64, paged_attention_float64, paged_problem
from paged_infer.kernels.attention.flash_attention import flash_attention
from paged_infer.kernels.attention.paged_attention import paged_attention
from paged_infer.kernels.fused.copy_blocks import copy_blocks
from paged_infer.kernels.fused.noise import mix, row_keys
from paged_infer.kernels.fused.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from paged_infer.kernels.fused.rms_norm import add_rms_norm, add_rms_norm_reference
from paged_infer.kernels.fused.sample import sample
from paged_infer.kernels.fused.silu_mul import silu_mul, silu_mul_reference
from paged_infer.kernels.fused.store_kv import store_kv

# How far from float64 an output may be, as |out - exact| / (1 + |exact|). Where a kernel rounds between its steps, as
# torch does, that is two or three units in the last place (2^-11 and 2^-8); the interpreter cuts bfloat16 off.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SMALL_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One kernel on one input. ``error`` is a count of wrong elements where a kernel only copies."""

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

    heads: int
    kv_heads: int
    head_dim: int
    queries: int
    context: int
    window: int
    tokens: int
    hidden: int
    vocab: int
    tolerances: dict[torch.dtype, float]


INTERPRETED = Sizes(4, 2, 24, 21, 50, 11, 5, 96, 3000, SMALL_TOLERANCES)
COMPILED = Sizes(32, 8, 128, 1037, 3000, 509, 300, 4096, 151_936, TOLERANCES)


def run_checks(
    device: torch.device, on_result: Callable[[CheckResult], None] = lambda result: None
) -> list[CheckResult]:
    """Every kernel, in every dtype that it takes, on ``device``. A wrong one is in the list, not an exception."""
    sizes = COMPILED if device.type == "cuda" else INTERPRETED
    results = []
    for check in CHECKS:
        for result in check(device, sizes):
            results.append(result)
            on_result(result)
    return results


def _flash(device: torch.device, sizes: Sizes) -> Iterator[CheckResult]:
    for dtype, tolerance in sizes.tolerances.items():
        for causal, window in ((True, None), (False, None), (True, sizes.window)):
            rng = torch.Generator(device).manual_seed(1)
            q = _random(rng, dtype, 2, sizes.heads, sizes.queries, sizes.head_dim)
            k, v = (_random(rng, dtype, 2, sizes.kv_heads, sizes.queries + 5, sizes.head_dim) for _ in "kv")
            out = flash_attention(q, k, v, causal=causal, window=window)
            assert isinstance(out, Tensor)
            exact = [
                attention_float64(*(x[row].transpose(0, 1) for x in (q, k, v)), causal=causal, window=window)
                for row in range(2)
            ]
            case = f"{_name(dtype)}, {'causal' if causal else 'full'}" + (f", window {window}" if window else "")
            yield CheckResult("flash_attention", case, _error(out.transpose(1, 2), torch.stack(exact)), tolerance)


def _paged(device: torch.device, sizes: Sizes) -> Iterator[CheckResult]:
    """Decodes (long ones are split over programs), a prompt and a chunk after a prefix, in one batch, amid NaN."""
    mixed = [(sizes.context, 1), (0, 1), (7, 1), (0, sizes.queries), (sizes.context // 2, sizes.queries // 2)]
    for dtype, tolerance in sizes.tolerances.items():
        for block_size, window in ((16, None), (3, sizes.window)):
            problem = paged_problem(
                mixed,
                num_heads=sizes.heads,
                num_kv_heads=sizes.kv_heads,
                head_dim=sizes.head_dim,
                block_size=block_size,
                dtype=dtype,
                device=device,
            )
            out = paged_attention(**problem.arguments, window=window)
            assert isinstance(out, Tensor)
            case = f"{_name(dtype)}, blocks of {block_size}" + (f", window {window}" if window else "")
            error = _error(out, paged_attention_float64(problem, window))
            yield CheckResult("paged_attention", case, error, tolerance)


def _stores(device: torch.device, sizes: Sizes) -> Iterator[CheckResult]:
    rng = torch.Generator(device).manual_seed(2)
    for dtype in sizes.tolerances:
        shape = (sizes.tokens + 8, 16, sizes.kv_heads, sizes.head_dim)
        caches = [_random(rng, dtype, *shape) for _ in range(2)]
        k, v = (_random(rng, dtype, sizes.tokens, *shape[2:]) for _ in "kv")
        slots = torch.randperm(shape[0] * 16, generator=torch.Generator().manual_seed(2))[: sizes.tokens]
        slots[1] = -1
        expected = [cache.clone() for cache in caches]
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                for cache, new in zip(expected, (k, v), strict=True):
                    cache[slot // 16, slot % 16] = new[token]
        store_kv(k, v, caches[0], caches[1], slots.to(device))
        yield CheckResult("store_kv", _name(dtype), _num_unlike(caches, expected), 0)

        pairs = torch.arange(2, 8).view(2, 3).to(device)  # blocks 2, 3, 4 to 5, 6, 7
        for cache in expected:
            cache[pairs[1]] = cache[pairs[0]]
        copy_blocks(caches, pairs[0], pairs[1])
        yield CheckResult("copy_blocks", _name(dtype), _num_unlike(caches, expected), 0)


def _norms(device: torch.device, sizes: Sizes) -> Iterator[CheckResult]:
    rng = torch.Generator(device).manual_seed(3)
    for dtype, tolerance in sizes.tolerances.items():
        x, residual = (_random(rng, dtype, sizes.tokens, sizes.hidden) for _ in range(2))
        weight = _random(rng, dtype, sizes.hidden)
        outs = add_rms_norm(x, residual, weight, 1e-6)
        exact = add_rms_norm_reference(x.double(), residual.double(), weight.double(), 1e-6)
        error = max(_error(one, its) for one, its in zip(outs, exact, strict=True))
        yield CheckResult("add_rms_norm", _name(dtype), error, tolerance)

        gate_up = torch.cat((x, residual), 1)
        error = _error(silu_mul(gate_up), silu_mul_reference(gate_up.double()))
        yield CheckResult("silu_mul", _name(dtype), error, tolerance)


def _rope(device: torch.device, sizes: Sizes) -> Iterator[CheckResult]:
    heads, kv_heads, dim, tokens = sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.tokens
    angles = torch.arange(tokens)[:, None].double() * 1e4 ** (-2 * torch.arange(dim // 2).double() / dim)
    angles = angles.repeat(1, 2)[:, None].to(device)  # [T, 1, D]
    sign = torch.ones(dim, dtype=torch.float64, device=device)
    sign[: dim // 2] = -1
    rng = torch.Generator(device).manual_seed(4)
    for dtype, tolerance in sizes.tolerances.items():
        qkv = _random(rng, dtype, tokens, heads + 2 * kv_heads, dim)
        weight = _random(rng, dtype, heads + kv_heads, dim)
        cos, sin = angles.cos().to(dtype), (angles.sin() * sign).to(dtype)
        k_cache, v_cache = (torch.zeros(tokens, 1, kv_heads, dim, dtype=dtype, device=device) for _ in "kv")
        counts: dict[str, Any] = {"num_heads": heads, "num_kv_heads": kv_heads}
        stored: dict[str, Any] = {
            "k_cache": k_cache,
            "v_cache": v_cache,
            "slot_mapping": torch.arange(tokens).flip(0).to(device),
        }
        qk = qk_norm_rope(qkv, cos, sin, **counts, norm_weight=weight, **stored)
        exact = qk_norm_rope_reference(qkv.double(), cos.double(), sin.double(), **counts, norm_weight=weight.double())
        # a rotation keeps the length of a pair: two large terms may cancel to a small one
        error = _error(qk, exact, exact.abs() + exact.roll(dim // 2, dims=-1).abs())
        yield CheckResult("qk_norm_rope", _name(dtype), error, tolerance)
        unlike = _num_unlike([x[:, 0].flip(0) for x in (k_cache, v_cache)], [qk[:, heads:], qkv[:, heads + kv_heads :]])
        yield CheckResult("qk_norm_rope", f"{_name(dtype)}, stored", unlike, 0)


def _sample(device: torch.device, sizes: Sizes) -> Iterator[CheckResult]:
    """The sampled token must have the highest score in float64, too, up to a rounding."""
    rows = 6
    rng = torch.Generator(device).manual_seed(5)
    temperatures = torch.tensor([0.0, 0.3, 0.7, 1.0, 1.3, 2.0])
    seeds, samples, positions = torch.arange(rows) * 7919, torch.arange(rows) % 2, torch.arange(rows) + 100
    keys = row_keys(*(x.tolist() for x in (seeds, samples, positions)))
    bits = mix(keys, torch.arange(sizes.vocab, dtype=torch.int32)).double()
    log_noise = (-torch.log1p(-(bits + 0.5) * 2.0**-31)).log().to(device)
    for dtype in sizes.tolerances:
        logits = 4 * _random(rng, dtype, rows, sizes.vocab)
        tokens, _ = sample(logits, *(x.to(device) for x in (temperatures, seeds, samples, positions)))
        scores = logits.double() / temperatures.clamp(min=1e-20).to(device)[:, None] - log_noise
        scores[0] = logits[0].double()  # greedy
        lost_by = scores.amax(1) - scores.gather(1, tokens.clamp(min=0)[:, None])[:, 0]
        lost_by = lost_by.where(tokens >= 0, math.inf)
        yield CheckResult("sample", _name(dtype), float(lost_by.max()), 1e-4)


CHECKS = (_flash, _paged, _stores, _norms, _rope, _sample)


def _random(rng: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=rng.device, generator=rng).to(dtype)


def _error(out: Tensor, exact: Tensor, size: Tensor | None = None) -> float:
    """Largest |out - exact| / (1 + |exact|), or / (1 + size) where large terms may cancel; NaN if any is."""
    return float(((out.double() - exact).abs() / (1 + (exact.abs() if size is None else size))).max())


def _num_unlike(tensors: list[Tensor], expected: list[Tensor]) -> float:
    return float(sum(int((x != y).sum()) for x, y in zip(tensors, expected, strict=True)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
