"""store_kv: each token to its slot, and nothing anywhere else."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from paged_infer.kernels.store_kv import store_kv


@given(
    num_blocks=st.integers(1, 6),
    block_size=st.sampled_from([1, 3, 16]),
    num_skipped=st.integers(0, 3),
    data=st.data(),
)
def test_each_token_goes_to_its_slot_and_slot_minus_one_nowhere(
    num_blocks, block_size, num_skipped, data
) -> None:
    slots = data.draw(st.lists(st.integers(0, num_blocks * block_size - 1), unique=True, max_size=12))
    slots = data.draw(st.permutations(slots + [-1] * max(num_skipped, not slots)))
    k, v = torch.randn(2, len(slots), 2, 5)
    k_cache, v_cache = torch.full((2, num_blocks, block_size, 2, 5), 7.0)
    store_kv(k, v, k_cache, v_cache, torch.tensor(slots))
    for cache, stored in ((k_cache, k), (v_cache, v)):
        for slot in range(num_blocks * block_size):
            here = cache[slot // block_size, slot % block_size]
            assert torch.equal(here, stored[slots.index(slot)] if slot in slots else torch.full((2, 5), 7.0))
