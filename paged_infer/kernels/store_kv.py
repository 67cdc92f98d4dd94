"""Write this step's keys and values to their slots in the paged cache."""

from __future__ import annotations

from torch import Tensor


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Copy token t to slot ``slot_mapping[t]``; slot -1 writes nothing.

    k and v [T, H_kv, D]; caches [num_blocks, block_size, H_kv, D], changed in place; slot_mapping [T].
    """
    if slot_mapping.min() < 0:
        kept = slot_mapping >= 0
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    k_cache.view(-1, *k.shape[1:]).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, *v.shape[1:]).index_copy_(0, slot_mapping, v)
