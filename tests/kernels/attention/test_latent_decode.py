"""MLA's kernels: every version equals a float64 loop over latents looked up one by one, and reads nothing else."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from paged_infer.kernels.attention import mla
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.attention.mla import LATENT_SCALES, latent_decode_reference, plan_latent
from paged_infer.kernels.attention.mla_decode import latent_decode
from paged_infer.kernels.attention_backends import ATTENTION_BACKENDS, LATENT_BACKENDS, latent_backend
from paged_infer.kernels.kv_quant import LARGEST_CODE, dequantise_latents, quantise_latents

BACKENDS = ["torch", "sdpa", "c", "triton"]
SCALE = 0.31


@dataclass
class Rows:
    """Queries of rows of ``lengths`` tokens, whose latents are scattered over a pool that is NaN elsewhere."""

    lengths: tuple[int, ...]
    num_heads: int
    dim: int
    block_size: int = 3
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        rng = torch.Generator().manual_seed(sum(self.lengths) + self.dim)
        needed = [-(-length // self.block_size) for length in self.lengths]
        order = torch.randperm(sum(needed) + 1, generator=rng).int()
        self.cache = torch.full((len(order) + 1, self.block_size, 1, self.dim), math.nan, dtype=self.dtype)
        self.cache[-1] = 0.0  # the block that is never assigned
        self.tables = torch.full((len(needed), max(needed) + 1), int(order[-1]), dtype=torch.int32)
        self.latents: list[Tensor] = []
        for row, (blocks, length) in enumerate(zip(order[:-1].split(needed), self.lengths, strict=True)):
            self.tables[row, : len(blocks)] = blocks
            latents = torch.randn(length, self.dim, generator=rng).to(self.dtype)
            self.latents.append(latents)
            for token, latent in enumerate(latents):
                self.cache[int(blocks[token // self.block_size]), token % self.block_size, 0] = latent
        # Rows of the matrix of another tensor: dense, with gaps between them.
        wide = torch.randn(len(needed), self.num_heads, self.dim + 5, generator=rng).to(self.dtype)
        self.q = wide[..., : self.dim]

    def step(self) -> AttentionMetadata:
        return step_of([1] * len(self.lengths), self.lengths, self.tables)

    def expected(self, v_dim: int) -> Tensor:
        rows = []
        for query, latents in zip(self.q.double(), self.latents, strict=True):
            weights = (query @ latents.double().T * SCALE).softmax(-1)
            rows.append(weights @ latents.double()[:, :v_dim])
        return torch.stack(rows)


def step_of(queries: list[int], lengths: tuple[int, ...], tables: Tensor) -> AttentionMetadata:
    unused = torch.empty(0, dtype=torch.int64)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    num_decodes = sum(n == 1 for n in queries)
    return AttentionMetadata(
        unused,
        unused,
        starts,
        torch.tensor(lengths, dtype=torch.int32),
        tables,
        num_decodes,
        max(queries),
        max(lengths),
    )


def decode(backend: str, rows: Rows, v_dim: int, **scales: Tensor) -> Tensor:
    form = latent_backend(ATTENTION_BACKENDS[backend]).decode
    return form(rows.q, rows.cache, rows.step(), v_dim=v_dim, scale=SCALE, **scales)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "v_dim"),
    [
        (Rows((70, 41, 5, 1), 6, 32), 20),
        (Rows((2, 9), 17, 21, block_size=1), 13),  # more heads than a program takes, and no width that is a power of 2
        (Rows((33,), 1, 16, block_size=16), 16),  # the value is the whole key
        (Rows((40, 3), 2, 576), 512),  # DeepSeek's
    ],
    ids=["odd", "many-heads", "all-value", "deepseek"],
)
def test_every_backend_computes_the_definition(backend, rows, v_dim) -> None:
    out = decode(backend, rows, v_dim)
    torch.testing.assert_close(out.double(), rows.expected(v_dim), atol=1e-5, rtol=1e-5)


CODED = [(backend, kind) for backend in BACKENDS[:3] for kind in LARGEST_CODE] + [("triton", torch.float8_e4m3fn)]


@pytest.mark.parametrize(("backend", "kind"), [*CODED, ("triton", torch.int8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_8_bits_are_read_as_what_they_stand_for(backend, kind, dtype) -> None:
    """In any company, with the same bits: a row alone is the row among others, but for sdpa's sums of torch."""
    rows = Rows((40, 9, 1), 6, 41, dtype=dtype)
    rows.cache[-1] = 0.0
    codes, *scales = quantise_latents(rows.cache, 26, kind)
    scales = dict(zip(LATENT_SCALES, scales, strict=True))
    read = [dequantise_latents(*_coded(latents, kind), dtype) for latents in rows.latents]
    rows.cache, rows.latents = codes.view(kind), read
    out = decode(backend, rows, 26, **scales)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), rows.expected(26), atol=tolerance, rtol=tolerance)
    form = latent_backend(ATTENTION_BACKENDS[backend]).decode
    alone = form(rows.q[1:2], rows.cache, step_of([1], (9,), rows.tables[1:2]), v_dim=26, scale=SCALE, **scales)
    assert torch.equal(alone, out[1:2]) or backend == "sdpa"


def _coded(latents: Tensor, kind: torch.dtype) -> tuple[Tensor, int, Tensor, Tensor]:
    codes, scale, rest_scale = quantise_latents(latents, 26, kind)
    return codes.view(kind), 26, scale, rest_scale


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_bfloat16_the_sums_are_float32(backend) -> None:
    rows = Rows((50, 7), 4, 40, dtype=torch.bfloat16)
    out = decode(backend, rows, 24)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), rows.expected(24), atol=2e-2, rtol=2e-2)


def test_a_row_of_length_zero_which_pads_a_captured_batch_gives_zero_in_triton() -> None:
    rows = Rows((9, 4), 2, 20)
    step = rows.step()
    step.seq_lens[1] = 0
    out = latent_decode(rows.q, rows.cache, step, v_dim=16, scale=SCALE)
    torch.testing.assert_close(out[0].double(), rows.expected(16)[0], atol=1e-5, rtol=1e-5)
    assert not out[1].any()


@pytest.mark.parametrize(("dim", "v_dim"), [(640, 576), (577, 512 - 31), (600, 8)])
def test_widths_beyond_the_kernel_go_to_the_reference_and_that_is_logged_once(dim, v_dim, caplog) -> None:
    mla.warn_once.cache_clear()
    rows = Rows((5, 3), 2, dim)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out = latent_decode(rows.q, rows.cache, rows.step(), v_dim=v_dim, scale=SCALE)
    assert torch.equal(out, latent_decode_reference(rows.q, rows.cache, rows.step(), v_dim=v_dim, scale=SCALE))
    assert len(caplog.records) == 1 and f"{v_dim} + {dim - v_dim}" in caplog.text


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [24, 300])  # 300: beyond the kernels' heads
def test_expanded_heads_are_dense_attention_of_the_last_tokens(backend, width) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 3, n, width, generator=rng) for n in (4, 9, 9))
    out = latent_backend(ATTENTION_BACKENDS[backend]).dense(q, k, v, SCALE)
    scores = q.double() @ k.double().transpose(2, 3) * SCALE
    hidden = torch.ones(4, 9, dtype=torch.bool).triu(6)
    expected = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v.double()
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_form_of_a_sequence_depends_on_its_own_lengths_alone() -> None:
    tables = torch.arange(12, dtype=torch.int32).view(3, 4)
    step = step_of([1, 2, 5], (7, 8, 9), tables)
    plan = plan_latent(step, 3, lambda num_queries, length: num_queries > 4)
    assert plan.rows is not None and plan.tokens is not None
    assert plan.tokens.tolist() == [2, 1, 0]  # those that see most first
    assert plan.rows.seq_lens.tolist() == [8, 7, 7]
    assert plan.rows.block_tables.tolist() == [[4, 5, 6, 7], [4, 5, 6, 7], [0, 1, 2, 3]]
    ((tokens, slots),) = plan.chunks
    assert tokens == slice(3, 8) and slots.tolist() == list(range(24, 33))
    assert plan_latent(step, 3, lambda *lengths: True).rows is None


def test_a_decode_step_is_its_own_plan_and_the_host_reads_no_length() -> None:
    step = step_of([1, 1], (7, 8), torch.zeros(2, 4, dtype=torch.int32))
    step.seq_lens = step.query_start_loc = None  # type: ignore[assignment]
    assert plan_latent(step, 3, lambda *lengths: True).rows is step


def test_a_users_own_backend_gets_the_reference_for_mla_and_that_is_logged_once(caplog) -> None:
    def mine(q, k_cache, v_cache, step, *, window):
        raise AssertionError("it is for keys and values")

    mla.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert latent_backend(mine).decode is latent_backend(mine).decode is latent_decode_reference
    assert len(caplog.records) == 1 and "mine" in caplog.text
    own = latent_backend(ATTENTION_BACKENDS["sdpa"])
    LATENT_BACKENDS.append((mine, own))
    try:
        assert latent_backend(mine) is own
    finally:
        LATENT_BACKENDS.pop()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": torch.zeros(2, 3, 8)}, "expects q"),
        ({"cache": torch.zeros(4, 3, 2, 9)}, "expects q"),
        ({"v_dim": 10}, "Dv 10"),
        ({"q": torch.zeros(2, 3, 9, dtype=torch.float64)}, "one dtype"),
        ({"cache": torch.zeros(4, 3, 1, 18)[..., ::2]}, "contiguous cache"),
        ({"latent_scale": torch.zeros(4, 3, 1).half()}, "latent_scale and rest_scale must be given together"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shape(wrong, message) -> None:
    step = step_of([1, 1], (2, 3), torch.zeros(2, 1, dtype=torch.int32))
    given = {"q": torch.zeros(2, 3, 9), "cache": torch.zeros(4, 3, 1, 9), "step": step, "v_dim": 6, "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        latent_decode(**{**given, **wrong})
