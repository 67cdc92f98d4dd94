"""Attention over an 8-bit KV cache: every backend equals attention over the dequantised cache, and stays within the
bound that follows from the error of the codes.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from paged_infer.bench.kernels.problems import PagedProblem, paged_attention_float64, paged_problem
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.attention_backends import ATTENTION_BACKENDS
from paged_infer.kernels.kv_quant import LARGEST_CODE, dequantise_kv, quantise_kv

BACKENDS = ["torch", "sdpa", "c"]
MIXED = [(70, 1), (5, 1), (40, 4), (0, 131), (66, 9), (3, 8)]  # decodes, drafts, a prompt, chunks
FEW = [(40, 1), (5, 1), (20, 4), (0, 19)]  # for the interpreter
SHAPES = [(64, 3, 16), (24, 1, 3), (80, 3, 1), (128, 4, 16)]  # head_dim, heads of a group, block_size
CASES = [(backend, shape, 50) for backend in ("torch", "sdpa") for shape in SHAPES[1:3]]
CASES += [("c", shape, window) for shape in SHAPES for window in (None, 50)]
CASES += [("triton", (24, 3, 3), None), ("triton", (16, 2, 16), 9)]
FALLBACK = "keys and values of torch.int8 are read by torch, which is slower: C does not take"
TYPES = pytest.mark.parametrize("kind", LARGEST_CODE)
BOTH = pytest.mark.parametrize(
    ("backend", "kind"), [*product(BACKENDS, LARGEST_CODE), ("triton", torch.int8), ("triton", torch.float8_e5m2)]
)


class Coded:
    """A problem whose keys and values are codes; slots that hold no token, and their scales, may be anything."""

    def __init__(self, problem: PagedProblem, kind: torch.dtype) -> None:
        self.problem, self.kind = problem, kind
        self.k_cache, self.k_scale = self._coded(problem.k_cache)
        self.v_cache, self.v_scale = self._coded(problem.v_cache)

    def _coded(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = quantise_kv(torch.cat((cache, torch.zeros_like(cache[:1]))), self.kind)
        free = torch.ones(codes.shape[:2], dtype=torch.bool).flatten()
        free[self.problem.slots] = False
        free[-codes.shape[1] :] = False  # the block that is never assigned is zero
        codes.view(torch.uint8).flatten(0, 1)[free] = 0x7F  # NaN in float8; the scales are NaN already
        return codes, scale

    @property
    def exact(self) -> PagedProblem:
        """The same problem with the dequantised cache."""
        caches = (dequantise_kv(*both)[:-1] for both in ((self.k_cache, self.k_scale), (self.v_cache, self.v_scale)))
        return PagedProblem(
            self.problem.q.float(), *caches,
            *(getattr(self.problem, n) for n in ("block_tables", "seq_lens", "query_start_loc", "sequences", "slots")),
        )  # fmt: skip

    def attend(self, backend: str, window: int | None = None, rows: list[int] | None = None, **options: Any) -> Tensor:
        problem, counts = self.problem, [n for _, n in self.problem.sequences]
        rows = [*range(len(counts))] if rows is None else rows
        q, counts = torch.cat([problem.q.split(counts)[row] for row in rows]), [counts[row] for row in rows]
        step = AttentionMetadata(
            *[torch.empty(0, dtype=torch.int64)] * 2,
            query_start_loc=torch.tensor([0, *counts]).cumsum(0).int(),
            seq_lens=problem.seq_lens[rows], block_tables=problem.block_tables[rows],
            num_decodes=next((i for i, n in enumerate(counts) if n > 1), len(counts)),
            max_query_len=max(counts), max_seq_len=int(problem.seq_lens[rows].max()),
        )  # fmt: skip
        scales = {"k_scale": self.k_scale, "v_scale": self.v_scale}
        return ATTENTION_BACKENDS[backend](
            q, self.k_cache, self.v_cache, step, window=window, **scales, **options
        )  # fmt: skip


def suiting(backend: str) -> list[tuple[int, int]]:
    return FEW if backend == "triton" else MIXED


def coded(kind: torch.dtype, dtype=torch.float32, dim=64, group=3, block_size=16, sequences=MIXED) -> Coded:
    sizes = {"num_heads": 2 * group, "num_kv_heads": 2, "head_dim": dim, "block_size": block_size}
    return Coded(paged_problem(sequences, **sizes, dtype=dtype, seed=1), kind)


@TYPES
@pytest.mark.parametrize(("backend", "shape", "window"), CASES)
def test_it_equals_attention_over_the_dequantised_cache(kind, backend, shape, window) -> None:
    problem = coded(kind, torch.float32, *shape, sequences=suiting(backend))
    expected = paged_attention_float64(problem.exact, window)
    torch.testing.assert_close(problem.attend(backend, window).double(), expected, atol=2e-5, rtol=2e-5)


@BOTH
@pytest.mark.parametrize("options", [{"softcap": 1.5}, {"sinks": torch.linspace(-2, 3, 6)}], ids=["soft cap", "sinks"])
def test_score_options_apply_as_with_any_cache(kind, backend, options) -> None:
    problem = coded(kind, sequences=suiting(backend))
    expected = paged_attention_float64(problem.exact, **options)
    torch.testing.assert_close(problem.attend(backend, **options).double(), expected, atol=2e-5, rtol=2e-5)


@BOTH
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_queries_of_16_bits_stay_near_it(kind, backend, dtype, tolerance) -> None:
    problem = coded(kind, dtype, sequences=suiting(backend))
    out = problem.attend(backend)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), paged_attention_float64(problem.exact), atol=tolerance, rtol=tolerance
    )  # fmt: skip


ERRORS = {torch.int8: 0.03, torch.float8_e4m3fn: 0.12, torch.float8_e5m2: 0.24}  # for normally distributed heads of 64


@TYPES
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_error_is_within_the_bound_that_follows_from_the_codes(kind, backend) -> None:
    """Scores off by at most e change a weight by a factor within exp(-2 e)..exp(2 e)."""
    problem = coded(kind)
    out, expected = problem.attend(backend).double(), paged_attention_float64(problem.problem)
    (k, v), (k_read, v_read) = problem.problem.packed, problem.exact.packed
    e = float((k - k_read).norm(dim=-1).max() * problem.problem.q.norm(dim=-1).max()) / 8
    bound = float((v - v_read).abs().max() + (torch.tensor(2 * e).exp() - 1) * v.abs().max())
    worst = float((out - expected).abs().max())
    assert worst < min(bound, ERRORS[kind])


@TYPES
@pytest.mark.parametrize(
    ("backend", "dtype"), [*product(["torch", "c"], [torch.float32, torch.bfloat16]), ("triton", torch.float32)]
)
def test_a_sequence_has_the_same_bits_in_any_company(kind, backend, dtype) -> None:
    """Not with sdpa: torch's products may sum in another order for another number of rows."""
    problem = coded(kind, dtype, sequences=suiting(backend))
    for row, together in enumerate(problem.attend(backend, 50).split([n for _, n in problem.problem.sequences])):
        assert torch.equal(problem.attend(backend, 50, rows=[row]), together)


@BOTH
def test_a_nan_in_one_sequence_spoils_no_other(kind, backend) -> None:
    problem = coded(kind, sequences=suiting(backend))
    before = problem.attend(backend).split([n for _, n in problem.problem.sequences])
    row = 3
    table = problem.problem.block_tables[row]
    problem.k_scale[table[1], 1], problem.v_scale[table[1], 2] = torch.nan, torch.nan
    after = problem.attend(backend).split([n for _, n in problem.problem.sequences])
    assert after[row][-1].isnan().all()
    for other in {*range(len(before))} - {row}:
        assert torch.equal(after[other], before[other])


def test_heads_that_c_does_not_support_are_read_by_torch_with_one_warning(caplog) -> None:
    problem = coded(torch.int8, dim=300, group=2)
    with caplog.at_level("WARNING"):
        out = [problem.attend("c") for _ in range(2)]
    assert torch.equal(out[0], problem.attend("sdpa")) and torch.equal(out[0], out[1])
    assert sum(FALLBACK in record.message for record in caplog.records) == 1
