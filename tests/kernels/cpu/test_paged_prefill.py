"""Prompt chunks in C: float64's answer for every shape, and the same bits in any company, chunking and thread count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from c_building import cache_folder, forget
from torch import Tensor

from paged_infer.bench.kernels.problems import PagedProblem, paged_problem
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.attention.paged_sdpa import paged_attention_batched
from paged_infer.kernels.cpu import build, paged_attention
from paged_infer.kernels.cpu.ops import store_kv_c
from paged_infer.kernels.cpu.paged_attention import paged_attention_c
from paged_infer.kernels.kv_quant import LARGEST_CODE

__all__ = ["cache_folder"]  # a fixture
MIXED = [(70, 1), (5, 1), (40, 4), (0, 131), (66, 9), (129, 70), (3, 8)]  # decodes, drafts, a prompt, chunks
SHAPES = [(24, 1, 3), (24, 6, 16), (64, 3, 16), (64, 4, 1), (80, 3, 3), (80, 1, 16), (128, 4, 16), (256, 3, 1)]
DTYPES = [torch.float32, torch.bfloat16]


def problem_of(sequences: list[tuple[int, int]], dtype: torch.dtype, dim=64, group=3, block_size=16) -> PagedProblem:
    sizes = {"num_heads": 2 * group, "num_kv_heads": 2, "head_dim": dim, "block_size": block_size}
    problem = paged_problem(sequences, **sizes, dtype=dtype, seed=1)
    for name in ("k_cache", "v_cache"):  # the block that is never assigned is zero
        cache = getattr(problem, name)
        object.__setattr__(problem, name, torch.cat((cache, torch.zeros_like(cache[:1]))))
    return problem


def attend(problem: PagedProblem, function=paged_attention_c, rows: list[int] | None = None, **options: Any) -> Tensor:
    """Of all sequences, or of those of ``rows`` alone."""
    rows = [*range(len(problem.sequences))] if rows is None else rows
    counts = [problem.sequences[row][1] for row in rows]
    q = torch.cat([problem.q.split([n for _, n in problem.sequences])[row] for row in rows])
    step = AttentionMetadata(
        *[torch.empty(0, dtype=torch.int64)] * 2,
        query_start_loc=torch.tensor([0, *counts]).cumsum(0).int(),
        seq_lens=problem.seq_lens[rows],
        block_tables=problem.block_tables[rows],
        num_decodes=next((i for i, n in enumerate(counts) if n > 1), len(counts)),
        max_query_len=max(counts),
        max_seq_len=int(problem.seq_lens[rows].max()),
    )
    return function(q, problem.k_cache, problem.v_cache, step, **{"window": None} | options)


def check_definition(
    problem: PagedProblem, out: Tensor, window: int | None = None, scale: float | None = None,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> None:  # fmt: skip
    """Softmax over dense keys in float64, sequence by sequence."""
    lengths, rows, (_, num_heads, dim) = [sum(s) for s in problem.sequences], [], problem.q.shape
    group = num_heads // problem.k_cache.shape[2]
    for q, k, v in zip(
        problem.q.split([n for _, n in problem.sequences]), *(x.split(lengths) for x in problem.packed), strict=True
    ):
        k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("nhd,mhd->hnm", q.double(), k) * (dim**-0.5 if scale is None else scale)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        back = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        scores = scores.masked_fill((back < 0) | (back >= (window or len(k))), -torch.inf)
        sink = torch.full((num_heads,), -torch.inf) if sinks is None else sinks
        sink = sink.double()[:, None, None].expand(-1, len(q), 1)
        rows.append(torch.einsum("hnm,mhd->nhd", torch.cat((scores, sink), 2).softmax(2)[..., :-1], v))
    tolerance = 2e-5 if out.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), torch.cat(rows), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 50, 130])
def test_it_is_the_definition_for_every_shape(dtype: torch.dtype, shape, window: int | None) -> None:
    problem = problem_of(MIXED, dtype, *shape)
    check_definition(problem, attend(problem, window=window), window=window)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_soft_cap_and_sinks_are_in_the_tiles(dtype: torch.dtype) -> None:
    problem = problem_of(MIXED, dtype)
    sinks = torch.tensor([-3.0, 0.0, 1.5, 4.0, -float("inf"), 2.0])
    for options in ({"scale": 0.3}, {"softcap": 1.5}, {"sinks": sinks, "window": 70}):
        check_definition(problem, attend(problem, **options), **options)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_has_the_same_bits_in_any_company_and_on_any_number_of_threads(dtype, window) -> None:
    problem = problem_of(MIXED, dtype)
    together = attend(problem, window=window).split([n for _, n in problem.sequences])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for row, expected in enumerate(together):
                assert torch.equal(attend(problem, rows=[row], window=window), expected)
                assert torch.equal(attend(problem, rows=[row, 3], window=window)[: len(expected)], expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_has_the_same_bits_however_it_is_cut_into_chunks(dtype, window) -> None:
    whole = problem_of([(0, 300)], dtype)
    out = attend(whole, window=window)
    for cuts in ([0, 9, 110, 300], [0, 64, 291, 300]):
        for start, end in pairwise(cuts):
            object.__setattr__(whole, "sequences", [(start, end - start)])
            object.__setattr__(whole, "seq_lens", torch.tensor([end], dtype=torch.int32))
            chunk = AttentionMetadata(
                *[torch.empty(0, dtype=torch.int64)] * 2,
                torch.tensor([0, end - start], dtype=torch.int32), whole.seq_lens, whole.block_tables,
                num_decodes=0, max_query_len=end - start, max_seq_len=end,
            )  # fmt: skip
            part = paged_attention_c(whole.q[start:end], whole.k_cache, whole.v_cache, chunk, window=window)
            assert torch.equal(part, out[start:end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_key_of_a_token_that_is_not_stored_is_not_read(dtype: torch.dtype) -> None:
    """paged_problem's caches are NaN elsewhere; keys before the window may be, too."""
    problem = problem_of([(200, 20)], dtype, block_size=3)
    out = attend(problem, window=60)
    blocks = problem.block_tables[0, : (201 - 60) // 3].long()
    problem.k_cache[blocks], problem.v_cache[blocks] = float("nan"), float("nan")
    assert torch.equal(attend(problem, window=60), out) and not out.isnan().any()


@pytest.mark.usefixtures("cache_folder")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_machine_without_wide_vectors_computes_the_same(dtype: torch.dtype, monkeypatch) -> None:
    problem = problem_of(MIXED, dtype, 80)
    here, read_here = attend(problem), [attend(coded, **scales) for coded, scales in in_8_bits(problem)]
    flags = [flag.replace("=native", "=x86-64") for flag in build.FLAGS]
    if build.platform.machine() != "x86_64":
        pytest.skip("not x86")
    monkeypatch.setattr(build, "FLAGS", flags)
    forget()
    out = attend(problem)
    check_definition(problem, out)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out, here, atol=tolerance, rtol=tolerance)
    for (coded, scales), read in zip(in_8_bits(problem), read_here, strict=True):
        torch.testing.assert_close(attend(coded, **scales), read, atol=tolerance, rtol=tolerance)


def in_8_bits(problem: PagedProblem) -> Iterator[tuple[PagedProblem, dict[str, Tensor]]]:
    """The problem with codes for keys and values, and their scales, for each type; stored by this machine's kernels."""
    for kind in LARGEST_CODE:
        stored = [torch.zeros(x.shape, dtype=kind) for x in (problem.k_cache, problem.v_cache)]
        scales = [torch.zeros(x.shape[:-1], dtype=torch.float16) for x in stored]
        k, v = (cache.flatten(0, 1)[problem.slots] for cache in (problem.k_cache, problem.v_cache))
        store_kv_c(k, v, *stored, problem.slots, *scales)
        yield replace(problem, k_cache=stored[0], v_cache=stored[1]), {"k_scale": scales[0], "v_scale": scales[1]}


def test_a_system_that_forbids_the_matrix_unit_is_served_by_torch(monkeypatch) -> None:
    problem = problem_of(MIXED, torch.bfloat16)
    forbidden = type("Library", (), {"prefill_queries": staticmethod(lambda: 0)})
    monkeypatch.setattr(paged_attention, "library", lambda dtype: forbidden)
    assert torch.equal(attend(problem), attend(problem, paged_attention_batched))
