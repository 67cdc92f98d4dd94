"""Keys and values stored in 8 bits: the codes and scales of ``quantise_kv`` at their slots, and nothing elsewhere."""

from __future__ import annotations

import pytest
import torch

from paged_infer.kernels.fused.store_kv import store_kv_reference
from paged_infer.kernels.kv_quant import LARGEST_CODE, quantise_kv

STORES = {"torch": store_kv_reference}


@pytest.mark.parametrize("store", STORES.values(), ids=STORES.keys())
@pytest.mark.parametrize("kind", LARGEST_CODE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 64), (3, 7), (1, 80), (5, 256)])
def test_tokens_are_stored_as_codes_and_scales_at_their_slots(store, kind, dtype, shape) -> None:
    heads, dim = shape
    qkv = torch.randn(12, 2 * heads + 3, dim).to(dtype)
    size = 10 ** torch.linspace(-9, 8, 12) if dtype != torch.float16 else 10 ** torch.linspace(-5, 3, 12)
    qkv *= size[:, None, None].to(dtype)
    qkv[1], qkv[2, 4, 3], qkv[3, -1, 1] = 0.0, torch.nan, torch.inf
    k, v = qkv[:, 3 : 3 + heads], qkv[:, -heads:]
    slots = torch.tensor([14, 2, 9, 0, -1, 7, 1, 12, -1, 3, 5, 8])
    caches = [torch.full((4, 4, heads, dim), 77, dtype=torch.uint8).view(kind) for _ in "kv"]
    scales = [torch.full((4, 4, heads), 7.0, dtype=torch.float16) for _ in "kv"]
    store(k, v, *caches, slots, *scales)
    kept = slots >= 0
    for x, cache, scale in zip((k, v), caches, scales, strict=True):
        codes, own = quantise_kv(x, kind)
        flat, flat_scale = cache.view(torch.uint8).flatten(0, 1), scale.flatten(0, 1)
        assert torch.equal(flat[slots[kept]], codes.view(torch.uint8)[kept])
        torch.testing.assert_close(flat_scale[slots[kept]], own[kept], rtol=0, atol=0, equal_nan=True)
        flat[slots[kept]], flat_scale[slots[kept]] = 77, 7.0
        assert (flat == 77).all() and (flat_scale == 7).all()


@pytest.mark.parametrize("store", STORES.values(), ids=STORES.keys())
def test_a_step_without_tokens_stores_nothing(store) -> None:
    cache, scale = torch.zeros(2, 4, 2, 8, dtype=torch.int8), torch.zeros(2, 4, 2, dtype=torch.float16)
    none = torch.zeros(0, 2, 8)
    store(none, none, cache, cache.clone(), torch.zeros(0, dtype=torch.int64), scale, scale.clone())
    assert not cache.any() and not scale.any()
