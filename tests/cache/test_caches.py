"""NoCache, ContiguousCache and PagedCache: three places for keys and values, one answer."""

from __future__ import annotations

import mmap
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paged_infer import SamplingParams
from paged_infer.cache.contiguous import ContiguousCache
from paged_infer.cache.lazy_zeros import untouched_zeros
from paged_infer.cache.none import NoCache
from paged_infer.cache.paged import PagedCache
from paged_infer.cache.spec import LayerSpec, kv_bytes_per_token
from paged_infer.control.step import BlockTransfers
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.attention_backends import ATTENTION_BACKENDS

H, H_KV, D = 6, 2, 8
LENGTHS = (3, 9, 6)  # tokens of three sequences, all but the last of each in the first step


def spec(window: int | None, layers: int = 2) -> list[LayerSpec]:
    return [LayerSpec(H_KV, D, D, window, torch.float32)] * layers


def step_meta(query_lens, seq_lens, *, slots=(), tables=((0,),), num_decodes=0) -> AttentionMetadata:
    starts = [0]
    for n in query_lens:
        starts.append(starts[-1] + n)
    return AttentionMetadata(
        positions=torch.empty(0, dtype=torch.int64),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        num_decodes=num_decodes,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )


def sequences(layer: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(layer)
    return [tuple(torch.randn(length, heads, D, generator=rng) for heads in (H, H_KV, H_KV)) for length in LENGTHS]


def packed(layer: int, slices: list[slice]) -> tuple[Tensor, Tensor, Tensor]:
    parts = [[x[s] for x in qkv] for qkv, s in zip(sequences(layer), slices, strict=True)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


SCORES = [{}, {"scale": 0.6, "softcap": 1.5}, {"sinks": torch.linspace(-2, 3, H)}]  # as Gemma 2, and as gpt-oss
with_scores = pytest.mark.parametrize("scores", SCORES, ids=["plain", "soft cap", "sinks"])


def whole(window: int | None, layer: int, scores: dict[str, Any]) -> list[Tensor]:
    """What each sequence's tokens see, computed without a cache."""
    cache, step = NoCache(spec(window)), step_meta(LENGTHS, LENGTHS)
    out = cache.attend(layer, *packed(layer, [slice(None)] * 3), step, **scores)
    return list(out.split(LENGTHS))


@pytest.mark.parametrize("backend", ["torch", "sdpa", "c"])
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("window", [None, 4])
@with_scores
def test_the_paged_cache_remembers_across_steps_what_no_cache_computes_at_once(
    backend, block_size, window, scores
) -> None:
    cache = PagedCache(spec(window), 20, block_size, ATTENTION_BACKENDS[backend])
    for keys in (*cache.keys, *cache.values):
        keys[:-1] = torch.nan  # what an earlier owner may have left
    needed = [-(-length // block_size) for length in LENGTHS]
    free = random.Random(0).sample(range(20), 20)
    tables = [[free.pop() for _ in range(n)] + [0] * (max(needed) - n) for n in needed]

    def slot(row: int, token: int) -> int:
        return tables[row][token // block_size] * block_size + token % block_size

    prompts = [slice(0, length - 1) for length in LENGTHS]
    prompt_lens = [length - 1 for length in LENGTHS]
    first = step_meta(
        prompt_lens,
        prompt_lens,
        slots=[slot(row, t) for row in range(3) for t in range(prompt_lens[row])],
        tables=tables,
    )
    last = step_meta(
        [1] * 3, LENGTHS, slots=[slot(row, LENGTHS[row] - 1) for row in range(3)], tables=tables, num_decodes=3
    )
    for layer in range(2):
        out = cache.attend(layer, *packed(layer, prompts), first, **scores).split(prompt_lens)
        for row, expected in enumerate(whole(window, layer, scores)):
            torch.testing.assert_close(out[row], expected[:-1])
    for layer in range(2):
        out = cache.attend(layer, *packed(layer, [slice(-1, None)] * 3), last, **scores)
        torch.testing.assert_close(out, torch.stack([o[-1] for o in whole(window, layer, scores)]))
    assert all(not keys[-1].any() for keys in (*cache.keys, *cache.values))  # the last block stays zero


@pytest.mark.parametrize("window", [None, 4])
@with_scores
def test_the_contiguous_cache_pads_on_the_left_and_nobody_sees_the_padding(window, scores) -> None:
    width = max(LENGTHS) - 1
    pad_lens = [width - (length - 1) for length in LENGTHS]
    cache = ContiguousCache(spec(window), width + 4, pad_lens)
    for layer in range(2):
        parts = []
        for qkv, pad in zip(sequences(layer), pad_lens, strict=True):
            parts.append([torch.cat((torch.full((pad, *x.shape[1:]), 50.0), x[:-1])) for x in qkv])
        q, k, v = (torch.cat(column) for column in zip(*parts, strict=True))
        out = cache.attend(layer, q, k, v, step_meta([width] * 3, [width] * 3), **scores).view(3, width, H, D)
        for row, expected in enumerate(whole(window, layer, scores)):
            torch.testing.assert_close(out[row, pad_lens[row] :], expected[:-1])
        step = step_meta([1] * 3, [width + 1] * 3)
        out = cache.attend(layer, *packed(layer, [slice(-1, None)] * 3), step, **scores)
        torch.testing.assert_close(out, torch.stack([o[-1] for o in whole(window, layer, scores)]))


def test_the_contiguous_cache_shows_what_it_holds_and_that_the_rest_of_a_row_is_empty() -> None:
    cache = ContiguousCache(spec(None), 12, [0])
    q, k, v = sequences(1)[1]  # 9 tokens
    cache.attend(1, q, k, v, step_meta([9], [9]))
    for held, kept in ((cache.keys, k), (cache.values, v)):
        assert held[1].shape == (1, H_KV, 12, D)
        assert torch.equal(held[1][0, :, :9].transpose(0, 1), kept)
        assert not held[1][:, :, 9:].any() and not held[0].any()


def test_blocks_are_copied_in_every_layer_all_of_them_read_before_any_is_written() -> None:
    cache = PagedCache(spec(None), 6, 4, ATTENTION_BACKENDS["torch"])
    for number, blocks in enumerate((*cache.keys, *cache.values)):
        blocks.copy_(torch.arange(7)[:, None, None, None] + 10 * number)
    cache.copy_blocks([(0, 3), (3, 1), (0, 5)])
    for number, blocks in enumerate((*cache.keys, *cache.values)):
        assert (blocks[:, 0, 0, 0] - 10 * number).tolist() == [0, 3, 2, 0, 4, 0, 6]
        assert (blocks == blocks[:, :1, :1, :1]).all()
    cache.copy_blocks([])


def test_swapped_blocks_come_back_as_they_were_before_anything_is_copied() -> None:
    cache = PagedCache(spec(None), 6, 4, ATTENTION_BACKENDS["torch"], num_swap_blocks=2)
    for number, blocks in enumerate((*cache.keys, *cache.values)):
        blocks.copy_(torch.arange(7)[:, None, None, None] + 10 * number)
    cache.move_blocks(BlockTransfers(swap_outs=[(4, 0), (1, 1)]))
    cache.move_blocks(BlockTransfers(swap_outs=[(2, 1)], swap_ins=[(0, 2)], copies=[(2, 3)]))
    cache.move_blocks(BlockTransfers(swap_ins=[(1, 5)]))
    for number, blocks in enumerate((*cache.keys, *cache.values)):
        assert (blocks[:, 0, 0, 0] - 10 * number).tolist() == [0, 1, 4, 4, 4, 2, 6]


def test_bytes_are_counted_for_keys_and_values_of_every_layer() -> None:
    layers = [LayerSpec(2, 24, 24, None, torch.float32), LayerSpec(4, 16, 8, 5, torch.bfloat16)]
    assert kv_bytes_per_token(layers) == 2 * 48 * 4 + 4 * 24 * 2
    assert ContiguousCache(layers, 10, [0, 3]).num_bytes == 2 * 10 * kv_bytes_per_token(layers)
    cache = PagedCache(layers, 5, 3, ATTENTION_BACKENDS["torch"])
    assert cache.bytes_per_block == 3 * kv_bytes_per_token(layers)
    stored = sum(t.nbytes for t in (*cache.keys, *cache.values))
    assert stored == 6 * cache.bytes_per_block  # 5 blocks, and the one that is never assigned


# -- Storing by the kernel that rotates


@pytest.mark.parametrize("backend", ["triton", "c"])
@pytest.mark.parametrize(("family", "is_fused"), [("qwen3", True), ("mistral", True), ("gpt2", False)])
def test_keys_are_stored_by_the_kernel_that_rotates_them_where_there_is_one(
    family, is_fused, backend, make_llm
) -> None:
    """Same tokens, same pool as by a launch of its own; GPT-2 rotates nothing, so its cache stores."""
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    caches, tokens = [], []
    for fuses in (True, False):
        llm = make_llm(family, attention_backend=backend, num_blocks=8, block_size=4)
        cache, stored = llm.engine.executor.runner.cache, []
        store_kv = cache.ops.store_kv
        cache.ops = cache.ops._replace(store_kv=lambda *a, s=stored, f=store_kv: s.append(1) or f(*a))
        for layer in llm.engine.decoder.layers:
            layer.attention.ops = layer.attention.ops._replace(fuses_store=fuses)
        tokens.append(llm.generate([[5, 6, 7, 8, 9], [3]], params, use_tqdm=False))
        caches.append(cache)
        assert bool(stored) == (not (fuses and is_fused))
    assert [o.outputs[0].token_ids for o in tokens[0]] == [o.outputs[0].token_ids for o in tokens[1]]
    for ours, theirs in zip(caches[0].keys + caches[0].values, caches[1].keys + caches[1].values, strict=True):
        assert torch.equal(ours, theirs) and ours.any()


LATENT = LayerSpec(1, 576, 512, None, torch.bfloat16, v_in_k=True)  # DeepSeek's


def test_a_latent_takes_576_elements_of_a_layer_where_its_value_is_a_part_of_it() -> None:
    assert LATENT.bytes_per_token == 576 * 2
    assert kv_bytes_per_token([LATENT] * 61) == 70_272  # DeepSeek-V3: 0.067 MiB a token
    heads = LayerSpec(128, 192, 128, None, torch.bfloat16)  # of the same model, expanded
    assert heads.bytes_per_token / LATENT.bytes_per_token == pytest.approx(71.1, abs=0.05)
    assert ContiguousCache([LATENT] * 2, 10, [0, 0, 0]).num_bytes == 3 * 10 * 2 * 576 * 2


def test_latents_are_stored_once_and_copied_and_swapped_as_keys_are() -> None:
    cache = PagedCache([LATENT] * 2, 4, 3, ATTENTION_BACKENDS["sdpa"], num_swap_blocks=2)
    for keys, values in zip(cache.keys, cache.values, strict=True):
        keys[:4] = torch.randn(4, 3, 1, 576)
        assert values.data_ptr() == keys.data_ptr() and values.shape == (5, 3, 1, 512)
    before = [keys.clone() for keys in cache.keys]
    cache.move_blocks(BlockTransfers(copies=[(0, 1)], swap_outs=[(2, 1)], swap_ins=[]))
    cache.move_blocks(BlockTransfers(copies=[], swap_outs=[], swap_ins=[(1, 3)]))
    for keys, old in zip(cache.keys, before, strict=True):
        assert torch.equal(keys, old[[0, 0, 2, 2, 4]])


# -- Memory


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts the resident pages that Linux reports")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_takes_memory_block_by_block_as_it_is_written(dtype: torch.dtype) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    pool_bytes, layers = 2**28, [LayerSpec(4, 64, 64, None, dtype)] * 4
    num_blocks = pool_bytes // (16 * kv_bytes_per_token(layers))
    before = resident_bytes()
    cache = PagedCache(layers, num_blocks, 16, ATTENTION_BACKENDS["torch"])
    pool = [*cache.keys, *cache.values]
    assert sum(t.nbytes for t in pool) > pool_bytes
    assert not any(t[block].any() for t in pool for block in (0, num_blocks // 2, num_blocks))  # reading takes none
    assert all(t.dtype == dtype and t.data_ptr() % 64 == 0 for t in pool)
    assert resident_bytes() - before < pool_bytes // 8
    for tensor in pool:
        tensor[: num_blocks // 2] = 1
    assert pool_bytes // 4 < resident_bytes() - before < pool_bytes * 3 // 4
    assert not any(t[num_blocks // 2 :].any() for t in pool)
    del tensor, pool, cache
    assert resident_bytes() - before < pool_bytes // 8  # and gives it back


@pytest.mark.parametrize("missing", ["MAP_ANONYMOUS", "mmap"])
def test_where_pages_cannot_be_mapped_the_pool_is_zeros_as_well(missing: str, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no room")

    if missing == "mmap":
        monkeypatch.setattr(mmap, "mmap", fail)
    else:
        monkeypatch.delattr(mmap, "MAP_ANONYMOUS", raising=False)
    zeros = untouched_zeros(3, 2, dtype=torch.bfloat16, device="cpu")
    assert zeros.shape == (3, 2) and zeros.dtype == torch.bfloat16 and not zeros.any()
