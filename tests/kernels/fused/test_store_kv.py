"""store_kv: each token to its slot, and nothing anywhere else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paged_infer.kernels.cpu.ops import store_kv_c
from paged_infer.kernels.fused.store_kv import store_kv, store_kv_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def views_of_qkv(num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """k and v as the decoder has them: columns of one matrix, so rows are apart."""
    qkv = torch.randn(num_tokens, 4 * num_heads, head_dim).to(dtype)
    return qkv[:, 2 * num_heads : 3 * num_heads], qkv[:, 3 * num_heads :]


@pytest.mark.parametrize("store", [store_kv, store_kv_reference])
@given(
    num_blocks=st.integers(1, 5),
    block_size=st.sampled_from([1, 3, 16]),
    num_skipped=st.integers(0, 3),
    num_heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 5, 24, 64]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
@settings(max_examples=30)
def test_each_token_goes_to_its_slot_and_slot_minus_one_nowhere(
    store, num_blocks, block_size, num_skipped, num_heads, head_dim, dtype, data
) -> None:
    slots = data.draw(st.lists(st.integers(0, num_blocks * block_size - 1), unique=True, max_size=8))
    slots = data.draw(st.permutations(slots + [-1] * num_skipped))
    k, v = views_of_qkv(len(slots), num_heads, head_dim, dtype)
    k_cache, v_cache = torch.full((2, num_blocks, block_size, num_heads, head_dim), math.nan, dtype=dtype)
    store(k, v, k_cache, v_cache, torch.tensor(slots, dtype=torch.int64))
    for cache, stored in ((k_cache, k), (v_cache, v)):
        for slot in range(num_blocks * block_size):
            here = cache[slot // block_size, slot % block_size]
            if slot in slots:
                assert torch.equal(here, stored[slots.index(slot)])
            else:
                assert here.isnan().all()


def test_a_row_wider_than_a_program_is_stored_whole() -> None:
    k, v = torch.randn(2, 2, 3, 900)
    k_cache, v_cache = torch.zeros(2, 2, 2, 3, 900)
    store_kv(k, v, k_cache, v_cache, torch.tensor([3, 0], dtype=torch.int32))
    assert torch.equal(k_cache.flatten(0, 1)[[3, 0]], k) and torch.equal(v_cache.flatten(0, 1)[[3, 0]], v)
    assert not k_cache.flatten(0, 1)[1:3].any()


@pytest.mark.parametrize("store", [store_kv, store_kv_reference, store_kv_c])
def test_keys_alone_are_stored_where_a_value_is_a_part_of_its_key(store) -> None:
    latents, cache = torch.randn(3, 1, 7), torch.zeros(2, 2, 1, 7)
    store(latents, None, cache, None, torch.tensor([3, -1, 0]))
    assert torch.equal(cache.flatten(0, 1)[[3, 0]], latents[[0, 2]]) and not cache.flatten(0, 1)[1:3].any()


@pytest.mark.parametrize("store", [store_kv, store_kv_reference])
def test_no_tokens_are_stored_without_a_launch(store) -> None:
    cache = torch.zeros(2, 2, 1, 4)
    store(torch.empty(0, 1, 4), torch.empty(0, 1, 4), cache, cache.clone(), torch.empty(0, dtype=torch.int64))
    assert not cache.any()


GOOD: dict[str, Any] = {
    "k": torch.zeros(3, 2, 4),
    "v": torch.zeros(3, 2, 4),
    "k_cache": torch.zeros(2, 2, 2, 4),
    "v_cache": torch.zeros(2, 2, 2, 4),
    "slot_mapping": torch.tensor([0, -1, 3]),
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"v": torch.zeros(3, 2, 5)}, r"v \[3, 2, 5\]"),
        ({"k": torch.zeros(3, 8), "v": torch.zeros(3, 8)}, r"k \[3, 8\]"),
        ({"k_cache": torch.zeros(2, 2, 3, 4)}, r"k_cache \[2, 2, 3, 4\]"),
        ({"k_cache": torch.zeros(4, 2, 4), "v_cache": torch.zeros(4, 2, 4)}, r"k_cache \[4, 2, 4\]"),
        ({"slot_mapping": torch.tensor([0, 1])}, r"slot_mapping \[2\]"),
        ({"slot_mapping": torch.zeros(3)}, "slot_mapping torch.float32"),
        ({"v": torch.zeros(3, 2, 4, dtype=torch.float16)}, "v torch.float16"),
        ({"k": torch.zeros(3, 2, 4, device="meta")}, "k torch.float32 on meta"),
        ({"k": torch.zeros(3, 4, 2).mT}, r"strides \(8, 1, 2\)"),
        ({"k_cache": torch.zeros(2, 2, 4, 4)[:, :, ::2]}, r"k_cache .* strides \(32, 16, 8, 1\)"),
        ({"slot_mapping": torch.tensor([0, -1, 4])}, r"slots -1\.\.4 must be within -1\.\.3"),
        ({"slot_mapping": torch.tensor([0, -2, 3])}, r"slots -2\.\.3 must be within -1\.\.3"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shape(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        store_kv(**{**GOOD, **wrong})
    assert not GOOD["k_cache"].any()
