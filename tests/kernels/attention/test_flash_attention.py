"""flash_attention, interpreted: equal to a float64 loop over queries, for every shape, mask and dtype it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paged_infer.kernels.attention.flash_attention import causal_mask, flash_attention, flash_attention_reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # bfloat16: two units in the last place


@dataclass
class Problem:
    batch: int
    num_kv_heads: int
    group: int
    num_queries: int
    num_keys: int
    head_dim: int
    causal: bool
    window: int | None
    dtype: torch.dtype
    seed: int

    def __post_init__(self) -> None:
        self.window = self.window if self.causal else None
        rng = torch.Generator().manual_seed(self.seed)
        heads, kv_heads = self.num_kv_heads * self.group, self.num_kv_heads

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng).to(self.dtype)

        # As views into larger tensors full of NaN: a read beside the head or behind the last key would show.
        def buried(num_heads: int, length: int) -> Tensor:
            around = torch.full((self.batch, length + 3, num_heads, self.head_dim + 5), math.nan, dtype=self.dtype)
            inside = around[:, :length, :, : self.head_dim].transpose(1, 2)
            inside.copy_(random(self.batch, num_heads, length, self.head_dim))
            return inside

        self.q = buried(heads, self.num_queries)
        self.k, self.v = buried(kv_heads, self.num_keys), buried(kv_heads, self.num_keys)

    def expected(self) -> tuple[Tensor, Tensor]:
        """The definition, one query at a time in float64: (output, log-sum-exp)."""
        q, k, v = self.q.double(), self.k.double(), self.v.double()
        out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
        for query in range(self.num_queries):
            last = self.num_keys - self.num_queries + query if self.causal else self.num_keys - 1
            first = 0 if self.window is None else max(0, last - self.window + 1)
            if last < first:
                continue
            for head in range(q.shape[1]):
                keys = k[:, head // self.group, first : last + 1]
                scores = (keys @ q[:, head, query, :, None])[..., 0] / math.sqrt(self.head_dim)  # [B, keys]
                lse[:, head, query] = scores.exp().sum(-1).log()
                weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
                out[:, head, query] = (weights[:, None] @ v[:, head // self.group, first : last + 1])[:, 0]
        return out, lse


PROBLEMS = st.builds(
    Problem,
    batch=st.integers(1, 2),
    num_kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 3]),
    num_queries=st.integers(1, 40),
    num_keys=st.integers(1, 70),
    head_dim=st.sampled_from([1, 8, 20, 64, 80]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 50),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
)


@given(PROBLEMS)
@settings(max_examples=25)
def test_kernel_and_reference_equal_the_definition_and_read_nothing_beside(problem: Problem) -> None:
    expected, expected_lse = problem.expected()
    tolerance = TOLERANCE[problem.dtype]
    for attend in (flash_attention, flash_attention_reference):
        out, lse = attend(
            problem.q, problem.k, problem.v, causal=problem.causal, window=problem.window, return_lse=True
        )
        assert out.dtype == problem.dtype and lse.dtype == torch.float32
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def test_a_head_of_256_is_not_too_wide() -> None:
    q, k, v = make(1, 1, 3, 256), make(1, 1, 20, 256), make(1, 1, 20, 256)
    torch.testing.assert_close(flash_attention(q, k, v), flash_attention_reference(q, k, v), atol=1e-5, rtol=1e-5)


def test_queries_before_the_first_key_see_nothing_and_get_zeros() -> None:
    q, k = make(1, 1, 40, 8), make(1, 1, 3, 8)
    out, lse = flash_attention(q, k, k, return_lse=True)
    assert not out[:, :, :37].any() and (lse[:, :, :37] == -math.inf).all()
    assert out[:, :, 37:].all() and lse[:, :, 37:].isfinite().all()


def test_scores_too_large_for_an_exponential_are_no_trouble() -> None:
    q, k, v = make(1, 1, 5, 8) * 1e3, make(1, 1, 40, 8) * 1e3, make(1, 1, 40, 8)
    torch.testing.assert_close(flash_attention(q, k, v), flash_attention_reference(q, k, v), atol=1e-5, rtol=1e-5)


def test_nan_that_is_read_comes_out_as_nan() -> None:
    q, k = make(1, 1, 3, 8), make(1, 1, 40, 8)
    k[0, 0, 20] = math.nan
    for attend in (flash_attention, flash_attention_reference):
        out, lse = attend(q, k, k, return_lse=True)
        assert out.isnan().all() and lse.isnan().all()


def test_a_window_beyond_32_bits_hides_nothing() -> None:
    q, k = make(1, 1, 40, 8), make(1, 1, 20, 8)
    for window in (2**31 - 1, 2**63):
        assert torch.equal(flash_attention(q, k, k, window=window), flash_attention(q, k, k))


def test_an_output_shaped_like_overlapping_queries_is_dense() -> None:
    q, k = make(1, 2, 47).unfold(2, 40, 1)[:, :, :8], make(1, 2, 9, 40)
    assert q.shape == (1, 2, 8, 40)
    torch.testing.assert_close(flash_attention(q, k, k), flash_attention_reference(q, k, k), atol=1e-5, rtol=1e-5)


def test_a_scale_of_ones_own_is_used() -> None:
    q, k, v = make(1, 2, 9, 8), make(1, 1, 9, 8), make(1, 1, 9, 8)
    out = flash_attention(q, k, v, scale=3.0)
    torch.testing.assert_close(out, flash_attention_reference(q, k, v, scale=3.0), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out, flash_attention(q, k, v))


def test_a_last_dimension_that_is_not_dense_is_no_trouble() -> None:
    q, k, v = (make(1, 2, 16, 24).transpose(2, 3) for _ in "qkv")
    torch.testing.assert_close(flash_attention(q, k, v), flash_attention_reference(q, k, v), atol=1e-5, rtol=1e-5)


def test_nothing_asked_is_nothing_answered() -> None:
    assert flash_attention(make(1, 2, 0, 8), make(1, 2, 5, 8), make(1, 2, 5, 8)).shape == (1, 2, 0, 8)
    assert not flash_attention(make(1, 2, 3, 8), make(1, 2, 0, 8), make(1, 2, 0, 8)).any()


GOOD = (make(2, 6, 4, 8), make(2, 2, 9, 8), make(2, 2, 9, 8))


@pytest.mark.parametrize(
    ("q", "k", "v", "options", "message"),
    [
        (GOOD[0][0], *GOOD[1:], {}, r"got q \[6, 4, 8\], k \[2, 2, 9, 8\], v \[2, 2, 9, 8\]"),
        (GOOD[0], GOOD[1], make(2, 2, 8, 8), {}, r"v \[2, 2, 8, 8\]"),
        (GOOD[0], make(3, 2, 9, 8), make(3, 2, 9, 8), {}, r"share batch size and head_dim; .*k \[3, 2, 9, 8\]"),
        (make(2, 5, 4, 8), *GOOD[1:], {}, r"5 query heads cannot share 2 key heads evenly; got q \[2, 5, 4, 8\]"),
        (GOOD[0].half(), *GOOD[1:], {}, r"q torch.float16 on cpu, k torch.float32 on cpu"),
        (GOOD[0].to("meta"), *GOOD[1:], {}, r"q torch.float32 on meta, k torch.float32 on cpu"),
        (*(x.double() for x in GOOD), {}, r"float32, float16 and bfloat16; got torch.float64"),
        (*GOOD, {"scale": 0.0}, r"scale=0.0: must be > 0"),
        (*GOOD, {"window": 0}, r"window=0: must be an integer >= 1"),
        (*GOOD, {"window": 4, "causal": False}, r"window=4 with causal=False"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_shapes(q, k, v, options, message) -> None:
    for attend in (flash_attention, flash_attention_reference):
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, **options)


def test_the_kernel_refuses_heads_that_only_the_reference_takes() -> None:
    wide = make(1, 1, 2, 257)
    with pytest.raises(ValueError, match=r"head_dim=257 must be within 1..256; got q \[1, 1, 2, 257\]"):
        flash_attention(wide, wide, wide)
    expected = torch.nn.functional.scaled_dot_product_attention(wide, wide, wide, is_causal=True)
    torch.testing.assert_close(flash_attention_reference(wide, wide, wide), expected)


def test_the_causal_diagonal_ends_in_the_last_key() -> None:
    assert causal_mask(2, 4, None, torch.device("cpu")).tolist() == [
        [True, True, True, False],
        [True, True, True, True],
    ]


def test_a_window_counts_the_token_itself() -> None:
    assert causal_mask(2, 4, 2, torch.device("cpu")).tolist() == [
        [False, True, True, False],
        [False, False, True, True],
    ]
