"""qk_norm_rope equals its reference, a float64 loop over heads, and the decoder's own steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from paged_infer.kernels.fused.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference

# bfloat16: the interpreter cuts off where a GPU rounds, so each of the roundings on the way may be an ulp away.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4 * 2**-7}


@dataclass
class Case:
    """Tokens of one step, as views into a wider matrix, and caches that are NaN until they are written."""

    slots: list[int]  # one a token; -1 nowhere
    num_heads: int
    num_kv_heads: int
    head_dim: int
    has_norm: bool
    stores: bool
    dtype: torch.dtype
    seed: int
    norm_offset: float = 0.0

    def __post_init__(self) -> None:
        rng = torch.Generator().manual_seed(self.seed)
        num_tokens, num_qk = len(self.slots), self.num_heads + self.num_kv_heads
        num_all = num_qk + self.num_kv_heads
        wide = torch.randn(num_tokens, num_all + 1, self.head_dim, generator=rng).to(self.dtype)
        self.qkv = wide[:, 1:]
        positions = torch.randint(0, 5000, (num_tokens, 1, 1), generator=rng)
        frequencies = 1e4 ** -torch.arange(0, 1, 2 / self.head_dim)[: self.head_dim // 2]
        cos, sin = (positions * frequencies).cos(), (positions * frequencies).sin()
        self.cos = torch.cat((cos, cos), -1).to(self.dtype)
        self.signed_sin = torch.cat((-sin, sin), -1).to(self.dtype)
        self.options: dict[str, Any] = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}
        if self.has_norm:
            weight = 1 + 0.2 * torch.randn(num_qk, self.head_dim, generator=rng)
            self.options |= {"norm_weight": weight.to(self.dtype), "eps": 1e-5, "norm_offset": self.norm_offset}

    def caches(self) -> dict[str, Tensor]:
        if not self.stores:
            return {}
        shape = (5, 3, self.num_kv_heads, self.head_dim)
        k_cache, v_cache = (torch.full(shape, math.nan, dtype=self.dtype) for _ in "kv")
        return {"k_cache": k_cache, "v_cache": v_cache, "slot_mapping": torch.tensor(self.slots).long()}

    def in_float64(self) -> Tensor:
        """One head of one token at a time."""
        num_qk, half = self.num_heads + self.num_kv_heads, self.head_dim // 2
        out = torch.empty(len(self.slots), num_qk, self.head_dim, dtype=torch.float64)
        for token in range(len(self.slots)):
            cos, sin = self.cos[token, 0, :half].double(), self.signed_sin[token, 0, half:].double()
            for head in range(num_qk):
                x = self.qkv[token, head].double()
                if self.has_norm:
                    x = (
                        x
                        / (x @ x / self.head_dim + 1e-5).sqrt()
                        * (self.options["norm_weight"][head].double() + self.norm_offset)
                    )
                a, b = x[:half], x[half:]
                out[token, head] = torch.cat((a * cos - b * sin, b * cos + a * sin))
        return out


CASES = st.builds(
    Case,
    slots=st.lists(st.integers(0, 14), unique=True, max_size=3).map(lambda s: [*s[:1], -1, *s[1:]]) | st.just([]),
    num_heads=st.sampled_from([1, 2, 6, 14]),
    num_kv_heads=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([2, 8, 24, 80, 128]),
    has_norm=st.booleans(),
    stores=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
    norm_offset=st.sampled_from([0.0, 1.0]),
)


@given(CASES)
@settings(max_examples=60)
def test_the_kernel_equals_its_reference_and_float64_and_stores_what_it_returns(case: Case) -> None:
    tolerance = {"atol": TOLERANCE[case.dtype], "rtol": TOLERANCE[case.dtype]}
    before, caches, reference_caches = case.qkv.clone(), case.caches(), case.caches()
    qk = qk_norm_rope(case.qkv, case.cos, case.signed_sin, **case.options, **caches)
    reference = qk_norm_rope_reference(case.qkv, case.cos, case.signed_sin, **case.options, **reference_caches)
    assert qk.dtype == case.dtype and qk.is_contiguous() and torch.equal(case.qkv, before)
    torch.testing.assert_close(qk, reference, **tolerance)
    torch.testing.assert_close(qk.double(), case.in_float64(), **tolerance)
    if not case.stores:
        return
    num_qk = case.num_heads + case.num_kv_heads
    for own, stored in ((caches, qk), (reference_caches, reference)):
        for name, rows in (("k_cache", stored[:, case.num_heads :]), ("v_cache", case.qkv[:, num_qk:])):
            for slot, here in enumerate(own[name].flatten(0, 1)):
                if slot in case.slots:
                    assert torch.equal(here, rows[case.slots.index(slot)])
                else:
                    assert here.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_equals_the_steps_of_transformers(dtype: torch.dtype) -> None:
    case = Case([0, 1, 2], 4, 2, 16, has_norm=True, stores=False, dtype=dtype, seed=1)
    unit = Qwen3RMSNorm(16, 1e-5).to(dtype)(case.qkv[:, :6]).detach() * case.options["norm_weight"]
    first, second = case.signed_sin[:, 0].chunk(2, dim=-1)
    cos, sin = case.cos[None, :, 0], torch.cat((-first, second), -1)[None]  # [1, T, D], sin without the sign
    q, k = apply_rotary_pos_emb(*(x.transpose(0, 1)[None] for x in (unit[:, :4], unit[:, 4:])), cos, sin)
    expected = torch.cat((q, k), 1)[0].transpose(0, 1)
    qk = qk_norm_rope(case.qkv, case.cos, case.signed_sin, **case.options)
    torch.testing.assert_close(qk, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_values_without_a_cache_to_go_to_are_not_read() -> None:
    case = Case([0, 1], 2, 1, 8, has_norm=True, stores=False, dtype=torch.float32, seed=0)
    case.qkv[:, 3:] = torch.nan
    assert qk_norm_rope(case.qkv, case.cos, case.signed_sin, **case.options).isfinite().all()


ONE = torch.ones(3, 1, 8)
CACHE = torch.zeros(2, 2, 1, 8)
GOOD: dict[str, Any] = {
    "qkv": torch.ones(3, 4, 8),
    "cos": ONE,
    "signed_sin": ONE,
    "num_heads": 2,
    "num_kv_heads": 1,
    "norm_weight": torch.ones(3, 8),
    "k_cache": CACHE,
    "v_cache": CACHE.clone(),
    "slot_mapping": torch.tensor([0, -1, 3]),
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_heads": 3}, r"got H 3, H_kv 1, qkv \[3, 4, 8\]"),
        ({"qkv": torch.ones(3, 32)}, r"qkv \[3, 32\]"),
        ({"qkv": torch.ones(3, 4, 7), "cos": ONE[..., :7], "signed_sin": ONE[..., :7]}, r"qkv \[3, 4, 7\]"),
        ({"cos": ONE[:, 0]}, r"cos \[3, 8\]"),
        ({"signed_sin": ONE[:2]}, r"signed_sin \[2, 1, 8\]"),
        ({"norm_weight": torch.ones(8)}, r"norm_weight \[8\]"),
        ({"k_cache": torch.zeros(2, 2, 2, 8)}, r"k_cache \[2, 2, 2, 8\]"),
        ({"v_cache": torch.zeros(3, 2, 1, 8)}, r"v_cache \[3, 2, 1, 8\]"),
        ({"slot_mapping": torch.tensor([0, 1])}, r"slot_mapping \[2\]"),
        ({"slot_mapping": None}, "must be given together or not at all"),
        ({"k_cache": None}, "must be given together or not at all"),
        ({"cos": ONE.half()}, "cos torch.float16"),
        ({"slot_mapping": torch.ones(3)}, "slot_mapping torch.float32"),
        ({"v_cache": torch.zeros(2, 2, 1, 8, device="meta")}, "v_cache torch.float32 on meta"),
        ({"qkv": torch.ones(3, 8, 4).mT}, r"qkv .* strides \(32, 1, 4\)"),
        ({"slot_mapping": torch.tensor([0, 1, 4])}, r"slots 0\.\.4 must be within -1\.\.3"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shape(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**{**GOOD, **wrong})
    assert not CACHE.any()
