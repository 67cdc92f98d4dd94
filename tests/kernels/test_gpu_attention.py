"""Attention compiled for the GPU at hand: every tile against float64 and its reference, in graphs, in a large pool."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_tensors import DEVICE, ON_GPU, assert_near, random

from paged_infer.bench.kernels.problems import attention_float64, paged_attention_float64, paged_problem
from paged_infer.kernels.attention.flash_attention import flash_attention, flash_attention_reference
from paged_infer.kernels.attention.flash_tma import flash_attention_tma
from paged_infer.kernels.attention.paged_attention import paged_attention, paged_attention_reference
from paged_infer.kernels.fused.copy_blocks import copy_blocks
from paged_infer.kernels.fused.store_kv import store_kv

pytestmark = ON_GPU


@pytest.mark.parametrize("head_dim", [40, 64, 80, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_flash_attention_has_tiles_for_every_head_dim(head_dim: int, dtype: torch.dtype) -> None:
    q = random(2, 6, 301, head_dim, dtype=dtype)
    k, v = (random(2, 2, 333, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    out = flash_attention(q, k, v)
    exact = [attention_float64(*(x[row].transpose(0, 1) for x in (q, k, v))) for row in range(2)]
    assert_near(out.transpose(1, 2), torch.stack(exact))


@pytest.mark.parametrize(("queries", "keys"), [(1, 700), (700, 129), (129, 129)])
def test_flash_attention_and_its_reference_agree_on_unlike_lengths_and_on_the_log_sum_exp(
    queries: int, keys: int
) -> None:
    q, k, v = random(1, 8, queries, 128), random(1, 2, keys, 128, seed=1), random(1, 2, keys, 128, seed=2)
    for window in (None, 50):
        out, lse = flash_attention(q, k, v, window=window, return_lse=True)
        reference, reference_lse = flash_attention_reference(q, k, v, window=window, return_lse=True)
        assert_near(out, reference)
        torch.testing.assert_close(lse, reference_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="TMA is in sm90 and later"
)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_flash_attention_by_tma_equals_the_kernel_with_pointers_and_float64(head_dim: int, causal: bool) -> None:
    q, k, v = (random(2, heads, length, head_dim) for heads, length in ((6, 301), (2, 333), (2, 333)))
    out = flash_attention_tma(q, k, v, causal=causal)
    assert_near(out, flash_attention(q, k, v, causal=causal))
    assert_near(out, flash_attention_reference(*(x.double() for x in (q, k, v)), causal=causal).to(out.dtype))


@pytest.mark.parametrize(
    ("block_size", "num_heads", "num_kv_heads", "head_dim", "window"),
    [(1, 8, 8, 64, None), (3, 32, 4, 128, None), (16, 8, 2, 80, 100), (16, 16, 8, 256, None)],
)
def test_a_mixed_batch_amid_nan_equals_float64_and_the_reference(
    block_size: int, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None
) -> None:
    problem = paged_problem(
        [(2500, 1), (0, 1), (255, 1), (256, 1), (0, 150), (700, 33), (90, 2)],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        device=DEVICE,
    )
    out, lse = paged_attention(**problem.arguments, window=window, return_lse=True)
    names = ("q", "k_cache", "v_cache", "block_tables", "seq_lens", "query_start_loc")
    reference, reference_lse = paged_attention_reference(
        **{name: getattr(problem, name) for name in names}, window=window, return_lse=True
    )
    assert_near(out, paged_attention_float64(problem, window))
    assert_near(out, reference)
    torch.testing.assert_close(lse, reference_lse, atol=1e-3, rtol=1e-3)


def test_a_graph_of_a_decode_step_follows_its_lengths_and_pads_its_rows() -> None:
    """Captured once with two rows to spare; then sequences grow, and one leaves."""
    rows, block_size, kv_heads, dim = 6, 16, 2, 128
    k_cache, v_cache = (torch.full((400, block_size, kv_heads, dim), math.nan, device=DEVICE) for _ in "kv")
    tables = torch.randperm(400, generator=torch.Generator().manual_seed(1))[: rows * 64].view(rows, 64)
    tables = tables.to(DEVICE, torch.int32)
    q, k, v = (torch.zeros(rows, heads, dim, device=DEVICE) for heads in (8, kv_heads, kv_heads))
    slots = torch.full((rows,), -1, device=DEVICE)
    seq_lens = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    starts = torch.zeros(rows + 1, dtype=torch.int32, device=DEVICE)
    out = torch.empty_like(q)

    def step() -> None:
        store_kv(k, v, k_cache, v_cache, slots)
        paged_attention(
            q, k_cache, v_cache, block_tables=tables, seq_lens=seq_lens, query_start_loc=starts,
            num_decodes=rows, max_query_len=1, max_seq_len=1024, out=out,
        )  # fmt: skip

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # which fills what the step reads
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    past = [random(700, 2, kv_heads, dim, dtype=torch.float32, seed=row) for row in range(rows)]
    for lengths in ([1, 9, 300, 511], [2, 10, 301, 512], [3, 302, 513], [700]):
        for row, length in enumerate(lengths):
            token = torch.arange(length - 1, device=DEVICE)
            at = tables[row, token // block_size].long() * block_size + token % block_size
            k_cache.flatten(0, 1)[at], v_cache.flatten(0, 1)[at] = past[row][: length - 1].unbind(1)
            k[row], v[row] = past[row][length - 1]
        used = len(lengths)
        q.copy_(random(rows, 8, dim, dtype=torch.float32, seed=sum(lengths)))
        slots.fill_(-1)
        seq_lens.zero_()
        seq_lens[:used] = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        last = (seq_lens[:used] - 1).long()
        blocks = tables[:used].gather(1, last[:, None] // block_size)[:, 0].long()
        slots[:used] = blocks * block_size + last % block_size
        starts.copy_(torch.arange(rows + 1, device=DEVICE).clamp(max=used))
        out.fill_(math.nan)
        graph.replay()
        for row, length in enumerate(lengths):
            exact = attention_float64(q[row : row + 1], *past[row][:length].unbind(1))
            assert_near(out[row : row + 1], exact)


def test_a_pool_of_more_than_two_to_the_31_elements_is_addressed_to_its_end() -> None:
    num_blocks, shape = (2**17 + 64, (16, 8, 128))  # 2^31 elements and 64 blocks: 4.3 GB each, for keys and for values
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free device memory")
    k_cache, v_cache = (torch.empty(num_blocks, *shape, dtype=torch.bfloat16, device=DEVICE) for _ in "kv")
    table = torch.tensor([[num_blocks - 1, 3, num_blocks - 2]], dtype=torch.int32, device=DEVICE)
    k, v = random(40, 8, 128, seed=1), random(40, 8, 128, seed=2)
    token = torch.arange(40, device=DEVICE)
    store_kv(k, v, k_cache, v_cache, table[0, token // 16].long() * 16 + token % 16)
    copy_blocks(
        [k_cache, v_cache], *(torch.tensor([block], device=DEVICE) for block in (num_blocks - 1, num_blocks - 9))
    )
    table[0, 0] = num_blocks - 9
    q = random(40, 32, 128)
    lens = torch.tensor([40], dtype=torch.int32, device=DEVICE)
    for queries in (1, 40):  # a decode, and a prompt
        starts = torch.tensor([0, queries], dtype=torch.int32, device=DEVICE)
        out = paged_attention(q[:queries], k_cache, v_cache, block_tables=table, seq_lens=lens, query_start_loc=starts)
        assert_near(out, attention_float64(q[:queries], k, v))
