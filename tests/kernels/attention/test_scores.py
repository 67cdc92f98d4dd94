"""Scores with a scale, a soft cap and sinks: every version of attention equals a float64 loop over single queries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from paged_infer.bench.kernels.problems import PagedProblem, paged_problem
from paged_infer.kernels import flash_attention, flash_attention_reference, paged_attention, paged_attention_reference
from paged_infer.kernels.attention import paged_sdpa
from paged_infer.kernels.attention.flash_tma import flash_attention_tma
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.attention_backends import ATTENTION_BACKENDS
from paged_infer.kernels.triton_runtime import INTERPRETED

BACKENDS = ["torch", "sdpa", "c", "triton"]
SINKS = torch.tensor([-3.0, 0.0, 1.5, 4.0, -math.inf, 2.0])  # of 6 query heads, and one that never counts
OPTIONS: dict[str, dict[str, Any]] = {
    "scale": {"scale": 0.7},
    "soft cap": {"softcap": 1.5},
    "sinks": {"sinks": SINKS},
    "Gemma 2": {"scale": 0.4, "softcap": 2.0, "window": 11},
    "gpt-oss": {"sinks": SINKS, "window": 7},
    "all": {"scale": 0.9, "softcap": 1.0, "sinks": SINKS, "window": 40},
}
MIXED = [(70, 1), (5, 1), (0, 17), (20, 3)]  # the first decode is split in three; a prompt; a chunk after a prefix
SHORT = [(40, 1), (0, 1), (2, 5)]
FEW = [(40, 3), (0, 8), (7, 1)]  # as few tokens as drafts
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every_backend = pytest.mark.parametrize("name", BACKENDS)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="on tensors of the CPU")


def problem_of(sequences: list[tuple[int, int]], dtype: torch.dtype = torch.float32, **sizes: int) -> PagedProblem:
    given = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 24, "block_size": 3} | sizes
    problem = paged_problem(sequences, **given, dtype=dtype, seed=len(sequences))
    for name in ("k_cache", "v_cache"):  # the block that is never assigned is zero
        cache = getattr(problem, name)
        object.__setattr__(problem, name, torch.cat((cache, torch.zeros_like(cache[:1]))))
    return problem


def attend(name: str, problem: PagedProblem, *, window: int | None = None, **scores: Any) -> Tensor:
    unused = torch.empty(0, dtype=torch.int64)
    rows = (problem.query_start_loc, problem.seq_lens, problem.block_tables)
    step = AttentionMetadata(unused, unused, *rows, **problem.hints)
    return ATTENTION_BACKENDS[name](problem.q, problem.k_cache, problem.v_cache, step, window=window, **scores)


def definition(
    problem: PagedProblem, *, scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """[T, H, D] float64: each query with each key that it sees, and the sink in the sum alone."""
    keys, values = (x.double().split([sum(s) for s in problem.sequences]) for x in problem.packed)
    group, out = problem.q.shape[1] // problem.k_cache.shape[2], []
    for k, v, (before, queries) in zip(keys, values, problem.sequences, strict=True):
        for position in range(before, before + queries):
            first, query, heads = max(0, position + 1 - (window or 10**9)), problem.q[len(out)].double(), []
            for head in range(len(query)):
                scores = k[first : position + 1, head // group] @ query[head]
                scores = scores * (query.shape[1] ** -0.5 if scale is None else scale)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                top = scores.max() if sinks is None else max(scores.max(), sinks[head].double())
                total = (scores - top).exp().sum() + (0 if sinks is None else (sinks[head].double() - top).exp())
                heads.append((scores - top).exp() / total @ v[first : position + 1, head // group])
            out.append(torch.stack(heads))
    return torch.stack(out)


@every_option
@pytest.mark.parametrize("sequences", [MIXED, FEW], ids=["mixed", "few"])
def test_every_backend_equals_the_definition(sequences, options) -> None:
    problem = problem_of(sequences)
    expected = definition(problem, **options)
    for name in BACKENDS:
        out = attend(name, problem, **options)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@every_backend
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 2e-3)])
def test_half_precision_rounds_no_score(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Scores of about 100 have a spacing of 1/2 in bfloat16: weights from rounded ones would be wrong by half."""
    problem = problem_of([(90, 1), (0, 12)], dtype, block_size=16)
    options = {"scale": 6.0, "softcap": 50.0, "sinks": SINKS.to(dtype) * 10}
    out = attend(name, problem, **options)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), definition(problem, **options), atol=tolerance, rtol=tolerance)


@every_backend
def test_scores_far_beyond_a_soft_cap_stay_finite(name: str) -> None:
    problem = problem_of(SHORT)
    wide = attend(name, problem, softcap=1e4)  # tanh is linear there
    torch.testing.assert_close(wide, attend(name, problem), atol=1e-5, rtol=1e-5)
    problem.q.mul_(1e4)
    out = attend(name, problem, softcap=5.0)
    torch.testing.assert_close(out.double(), definition(problem, softcap=5.0), atol=1e-5, rtol=1e-5)


@every_backend
def test_a_sink_takes_all_or_nothing(name: str) -> None:
    problem = problem_of(SHORT)
    out = attend(name, problem, sinks=torch.tensor([1e5, 1e5, -1e5, -1e5, -math.inf, -math.inf]))
    assert not out[:, :2].any()
    torch.testing.assert_close(out[:, 2:], attend(name, problem)[:, 2:], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("options", [OPTIONS["Gemma 2"], OPTIONS["gpt-oss"]])
@every_backend
def test_a_row_has_the_same_bits_alone_and_in_company(name: str, options) -> None:
    """Triton: of contexts that are not split, as the number of splits depends on the batch; sdpa: not its decodes."""
    together = problem_of([(30, 1), (0, 1), (0, 11), (12, 9)])
    outs = attend(name, together, **options).split([queries for _, queries in together.sequences])
    for row, sequence in enumerate(together.sequences):
        if name == "sdpa" and sequence[1] == 1:
            continue
        alone = problem_of([sequence])
        start, end = together.query_start_loc[row : row + 2].tolist()
        for field, value in {
            "q": together.q[start:end], "k_cache": together.k_cache, "v_cache": together.v_cache,
            "block_tables": together.block_tables[row : row + 1],
        }.items():  # fmt: skip
            object.__setattr__(alone, field, value)
        assert torch.equal(attend(name, alone, **options), outs[row]), sequence


def test_long_prompts_are_computed_in_pieces(monkeypatch) -> None:
    problem = problem_of(MIXED)
    monkeypatch.setattr(paged_sdpa, "_MAX_SCORES", 6 * 23 * 4)
    for options in (OPTIONS["soft cap"], OPTIONS["gpt-oss"]):
        expected = definition(problem, **options)
        torch.testing.assert_close(attend("sdpa", problem, **options).double(), expected, atol=1e-5, rtol=1e-5)


# -- The public functions


@interpreted
@pytest.mark.parametrize("options", [OPTIONS["soft cap"], OPTIONS["gpt-oss"]])
def test_the_log_sum_exp_counts_the_sink(options) -> None:
    problem = problem_of(MIXED)
    ours = paged_attention(**problem.arguments, **options, return_lse=True)
    rows = {name: value for name, value in problem.arguments.items() if name not in problem.hints}
    theirs = paged_attention_reference(**rows, **options, return_lse=True)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    ours = flash_attention(*dense(20, 25), **options, return_lse=True)
    theirs = flash_attention_reference(*dense(20, 25), **options, return_lse=True)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def dense(num_queries: int, num_keys: int, dim: int = 20, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rng = torch.Generator().manual_seed(dim)
    shapes = ((2, 6, num_queries, dim), (2, 2, num_keys, dim), (2, 2, num_keys, dim))
    return [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]


@interpreted
@pytest.mark.parametrize("attention", [flash_attention, flash_attention_reference])
def test_a_query_that_sees_no_key_gives_all_to_the_sink(attention) -> None:
    out, lse = attention(*dense(20, 3), sinks=SINKS, softcap=2.0, return_lse=True)
    assert not out[:, :, :17].any()
    torch.testing.assert_close(lse[:, :, :17], SINKS[:, None].expand(2, 6, 17))
    assert out[:, :, 17:].all() and lse[:, :, 17:].isfinite().all()


@interpreted
def test_a_row_that_pads_a_batch_gets_zeros() -> None:
    problem = problem_of([(3, 1), (70, 1)])
    lengths = torch.tensor([0, 71], dtype=torch.int32)
    out, lse = paged_attention(**(problem.arguments | {"seq_lens": lengths}), sinks=SINKS, return_lse=True)
    assert not out[0].any()
    torch.testing.assert_close(lse[0], SINKS)
    torch.testing.assert_close(out[1].double(), definition(problem, sinks=SINKS)[1], atol=1e-5, rtol=1e-5)


@interpreted
def test_tma_loads_change_no_number() -> None:
    q, k, v = dense(37, 50, 64, torch.bfloat16)
    options = {"softcap": 2.0, "sinks": SINKS}
    out = flash_attention_tma(q, k, v, **options)
    torch.testing.assert_close(out, flash_attention(q, k, v, **options), atol=0, rtol=0)


@interpreted
def test_nan_that_is_read_comes_out_as_nan() -> None:
    q, k, v = dense(3, 40)
    k[:, :, 20] = math.nan
    for attention in (flash_attention, flash_attention_reference):
        assert attention(q, k, v, softcap=2.0, sinks=SINKS).isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, r"softcap=0.0: must be > 0"),
        ({"softcap": math.nan}, r"softcap=nan: must be > 0"),
        ({"sinks": torch.zeros(2)}, r"sinks must be \[6\], one logit per query head, .*; got \[2\] on cpu"),
        ({"sinks": torch.zeros(6, device="meta")}, r"got \[6\] on meta"),
        ({"sinks": torch.zeros(12)[::2]}, r"contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(options, message) -> None:
    for attention in (flash_attention, flash_attention_reference):
        with pytest.raises(ValueError, match=message):
            attention(*dense(3, 4), **options)
    with pytest.raises(ValueError, match=message):
        paged_attention(**problem_of(MIXED).arguments, **options)
