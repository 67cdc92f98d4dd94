"""Storing to an 8-bit KV cache: the codes and scales of ``quantise_kv`` at their slots, and nothing elsewhere."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from paged_infer.kernels.attention.mla import LATENT_SCALES
from paged_infer.kernels.attention.paged_attention import paged_attention
from paged_infer.kernels.cpu.ops import store_kv_c, store_latents_c
from paged_infer.kernels.fused.store_kv import store_kv, store_kv_reference, store_latents, store_latents_reference
from paged_infer.kernels.kv_quant import LARGEST_CODE, quantise_kv, quantise_latents

STORES = {"torch": store_kv_reference, "c": store_kv_c, "triton": store_kv}


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CASES = [*product(("torch", "c"), FLOATS, [(2, 64), (3, 7), (1, 80), (5, 256)])]
CASES += [("triton", dtype, (1, 7)) for dtype in FLOATS]  # interpreted


@pytest.mark.parametrize(("name", "dtype", "shape"), CASES)
@pytest.mark.parametrize("kind", LARGEST_CODE)
def test_tokens_are_stored_as_codes_and_scales_at_their_slots(name, kind, dtype, shape) -> None:
    heads, dim = shape
    qkv = torch.randn(12, 2 * heads + 3, dim).to(dtype)
    size = 10 ** torch.linspace(-9, 8, 12) if dtype != torch.float16 else 10 ** torch.linspace(-5, 3, 12)
    qkv *= size[:, None, None].to(dtype)
    qkv[1], qkv[2, 4, 3], qkv[3, -1, 1] = 0.0, torch.nan, torch.inf
    k, v = qkv[:, 3 : 3 + heads], qkv[:, -heads:]
    slots = torch.tensor([14, 2, 9, 0, -1, 7, 1, 12, -1, 3, 5, 8])
    caches = [torch.full((4, 4, heads, dim), 77, dtype=torch.uint8).view(kind) for _ in "kv"]
    scales = [torch.full((4, 4, heads), 7.0, dtype=torch.float16) for _ in "kv"]
    STORES[name](k, v, *caches, slots, *scales)
    kept = slots >= 0
    for x, cache, scale in zip((k, v), caches, scales, strict=True):
        codes, own = quantise_kv(x, kind)
        flat, flat_scale = cache.view(torch.uint8).flatten(0, 1), scale.flatten(0, 1)
        assert torch.equal(flat[slots[kept]], codes.view(torch.uint8)[kept])
        torch.testing.assert_close(flat_scale[slots[kept]], own[kept], rtol=0, atol=0, equal_nan=True)
        flat[slots[kept]], flat_scale[slots[kept]] = 77, 7.0
        assert (flat == 77).all() and (flat_scale == 7).all()


LATENT_STORES = {"torch": store_latents_reference, "c": store_latents_c, "triton": store_latents}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "kind"), [*product(("torch", "c"), LARGEST_CODE), ("triton", torch.int8)])
def test_latents_are_stored_as_codes_with_a_scale_for_each_part(name, kind, dtype) -> None:
    x = torch.randn(6, 50)[:, 3:44].to(dtype)
    x[1], x[2, 3], x[3, 40] = 0.0, torch.nan, torch.inf
    x[:, 30:] *= 100
    slots = torch.tensor([4, 2, 7, -1, 0, 5])
    cache = torch.full((3, 3, 1, 41), 77, dtype=torch.uint8).view(kind)
    scales = {name: torch.full((3, 3, 1), 7.0, dtype=torch.float16) for name in LATENT_SCALES}
    LATENT_STORES[name](x, cache, slots, v_dim=30, **scales)
    kept = slots >= 0
    expected = quantise_latents(x[kept], 30, kind)
    for found, own in zip((cache.view(torch.int8), *scales.values()), expected, strict=True):
        flat = found.flatten(0, 2)
        torch.testing.assert_close(flat[slots[kept]], own, rtol=0, atol=0, equal_nan=True)
        flat[slots[kept]] = 7
        assert ((flat == 7) | (flat == 77)).all()
    assert expected[1][2].isnan() and expected[2][2].isfinite()  # NaN in one part leaves the other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v_dim": 8}, "Dv within 1..Dk-1; got Dv 8"),
        ({"x": torch.zeros(3, 9)}, r"store_latents expects x \[T, Dk\].*x \[3, 9\]"),
        ({"cache": torch.zeros(2, 4, 1, 8)}, "with caches of int8"),
        ({"slot_mapping": torch.tensor([0, 3, 8])}, "slots 0..8 must be within -1..7"),
    ],
)
def test_latents_that_do_not_fit_are_refused(changes, message) -> None:
    scales = {name: torch.zeros(2, 4, 1).half() for name in LATENT_SCALES}
    given = {"x": torch.zeros(3, 8), "cache": torch.zeros(2, 4, 1, 8, dtype=torch.int8), "v_dim": 5, **scales}
    given |= {"slot_mapping": torch.tensor([0, 3, 1])}
    with pytest.raises(ValueError, match=message):
        store_latents(**given | changes)


@pytest.mark.parametrize("store", STORES.values(), ids=STORES.keys())
def test_a_step_without_tokens_stores_nothing(store) -> None:
    cache, scale = torch.zeros(2, 4, 2, 8, dtype=torch.int8), torch.zeros(2, 4, 2, dtype=torch.float16)
    none = torch.zeros(0, 2, 8)
    store(none, none, cache, cache.clone(), torch.zeros(0, dtype=torch.int64), scale, scale.clone())
    assert not cache.any() and not scale.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_scale": None}, "k_scale and v_scale must be given together"),
        ({"v_scale": torch.zeros(2, 4, 3).half()}, r"scales must be float16 .* got .*v_scale \[2, 4, 3\]"),
        ({"k_scale": torch.zeros(2, 4, 2)}, "scales must be float16 .*k_scale torch.float32"),
        ({"k_cache": torch.zeros(2, 4, 2, 8)}, "with caches of int8, .*; got .*torch.float32"),
    ],
)
def test_scales_that_do_not_fit_are_refused_before_launch(changes, message) -> None:
    x, codes, scale = torch.zeros(3, 2, 8), torch.zeros(2, 4, 2, 8, dtype=torch.int8), torch.zeros(2, 4, 2).half()
    given = {"k": x, "v": x, "k_cache": codes, "v_cache": codes.clone(), "slot_mapping": torch.tensor([0, 3, 1])}
    given |= {"k_scale": scale, "v_scale": scale.clone()}
    store_kv(**given)
    with pytest.raises(ValueError, match=message):
        store_kv(**given | changes)
    read = {"block_tables": torch.tensor([[0, 1]]).int(), "seq_lens": torch.tensor([3]).int()}
    read |= {"query_start_loc": torch.tensor([0, 3]).int()}
    read |= {name: (given | changes)[name] for name in ("k_cache", "v_cache", "k_scale", "v_scale")}
    with pytest.raises(ValueError, match=message):
        paged_attention(x, **read)
