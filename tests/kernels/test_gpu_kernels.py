"""Every kernel, compiled for the GPU at hand, at a model's shapes: against float64, and against its reference in torch.

The interpreter's tests beside this file vary the shapes. What only a GPU can show is here, in test_gpu_attention.py
and in test_gpu_few_bits.py: real tiles, real dtypes, CUDA graphs, pools of more than 2^31 elements.
"""

from __future__ import annotations

import pytest
import torch
from gpu_tensors import DEVICE, ON_GPU, assert_near, random

from paged_infer.bench.kernels.checks import CHECKS, COMPILED
from paged_infer.kernels.fused.copy_blocks import copy_blocks, copy_blocks_reference
from paged_infer.kernels.fused.grouped_gemm import grouped_experts
from paged_infer.kernels.fused.moe import ExpertWeights, sort_experts
from paged_infer.kernels.fused.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from paged_infer.kernels.fused.rms_norm import add_rms_norm, add_rms_norm_reference
from paged_infer.kernels.fused.sample import sample, sample_reference
from paged_infer.kernels.fused.silu_mul import silu_mul, silu_mul_reference
from paged_infer.kernels.fused.store_kv import store_kv, store_kv_reference

pytestmark = ON_GPU


@pytest.mark.parametrize("kernel", CHECKS)
def test_every_kernel_equals_float64_at_a_models_shapes(kernel: str) -> None:
    results = list(CHECKS[kernel](DEVICE, COMPILED))
    assert [result for result in results if not result.passed] == []
    assert results


# -- The pieces around attention, against their references -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("width", [192, 1024, 4096, 16_384])
def test_norm_and_activation_equal_their_references(width: int, dtype: torch.dtype) -> None:
    both, weight = random(300, 2 * width, dtype=dtype), random(width, dtype=dtype, seed=1)
    x, residual = both.chunk(2, 1)  # rows apart, as in a fused matrix
    for ours, reference in zip(
        add_rms_norm(x, residual, weight, 1e-5), add_rms_norm_reference(x, residual, weight, 1e-5), strict=True
    ):
        assert_near(ours, reference)
    assert_near(silu_mul(both), silu_mul_reference(both))


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("has_norm", [True, False])
def test_qk_norm_rope_equals_its_reference_and_stores_what_it_returns(head_dim: int, has_norm: bool) -> None:
    tokens, heads, kv_heads = 257, 16, 8
    qkv = random(tokens, heads + 2 * kv_heads, head_dim)
    cos, sin = (random(tokens, 1, head_dim, seed=seed).clamp(-1, 1) for seed in (1, 2))
    slots = torch.randperm(tokens + 9, generator=torch.Generator().manual_seed(0))[:tokens].to(DEVICE)
    slots[7] = -1
    options = {"num_heads": heads, "num_kv_heads": kv_heads}
    options |= {"norm_weight": random(heads + kv_heads, head_dim, seed=3) if has_norm else None}
    outs, caches = [], []
    for function in (qk_norm_rope, qk_norm_rope_reference):
        caches.append([torch.zeros(tokens + 9, 1, kv_heads, head_dim, dtype=qkv.dtype, device=DEVICE) for _ in "kv"])
        k_cache, v_cache = caches[-1]
        outs.append(function(qkv, cos, sin, **options, k_cache=k_cache, v_cache=v_cache, slot_mapping=slots))
    torch.testing.assert_close(outs[0].double(), outs[1].double(), atol=0.1, rtol=0.02)
    stored = slots >= 0
    assert torch.equal(caches[0][0][slots[stored], 0], outs[0][stored, heads:])
    assert torch.equal(caches[0][1], caches[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_stores_and_copies_equal_their_references_to_the_bit(dtype: torch.dtype) -> None:
    k, v = random(500, 4, 80, dtype=dtype), random(500, 4, 80, dtype=dtype, seed=1)
    slots = torch.randperm(800, generator=torch.Generator().manual_seed(0))[:500].to(DEVICE)
    slots[::7] = -1
    pairs = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:20].to(DEVICE).view(2, 10)
    ours, references = ([random(50, 16, 4, 80, dtype=dtype, seed=seed) for seed in (2, 3)] for _ in "ab")
    store_kv(k, v, *ours, slots)
    store_kv_reference(k, v, *references, slots)
    copy_blocks(ours, pairs[0], pairs[1])
    copy_blocks_reference(references, pairs[0], pairs[1])
    for a, b in zip(ours, references, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("vocab_size", [1003, 32_000, 151_936])
def test_drawn_tokens_are_those_of_the_reference(vocab_size: int) -> None:
    """To a few units in the last place of exp and log: in 256 draws one may fall to the runner-up."""
    rows = 256
    logits = 3 * random(rows, vocab_size, dtype=torch.float32)
    temperatures = torch.linspace(0, 2, rows, device=DEVICE)
    seeds, samples = (torch.arange(rows, device=DEVICE) * 104_729 - 10**12, torch.arange(rows, device=DEVICE) % 3)
    positions = torch.arange(rows, device=DEVICE) + 2**20
    tokens, scores = sample(logits, temperatures, seeds, samples, positions)
    reference_tokens, reference_scores = sample_reference(logits, temperatures, seeds, samples, positions)
    assert int((tokens != reference_tokens).sum()) <= 1
    assert tokens[0] == logits[0].argmax()
    torch.testing.assert_close(scores, reference_scores, atol=1e-4, rtol=1e-5)
    masks = torch.randint(-(2**31), 2**31 - 1, (rows, -(-vocab_size // 32)), device=DEVICE, dtype=torch.int32)
    masked, _ = sample(logits, temperatures, seeds, samples, positions, masks)
    expected, _ = sample_reference(logits, temperatures, seeds, samples, positions, masks)
    assert int((masked != expected).sum()) <= 1
    words = masks.gather(1, (masked // 32)[:, None])[:, 0]
    assert bool((words >> (masked % 32).int() & 1).all())


# -- Experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 32, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_grouped_experts_equal_sorted_segments_in_float64_and_in_a_graph(num_tokens: int, dtype: torch.dtype) -> None:
    """Padding routes nowhere, and rows keep their bits alone and among others in blocks of the same height."""
    up, down = (random(16, *size, dtype=dtype) / size[1] ** 0.5 for size in ((2 * 768, 1024), (1024, 768)))
    x, preference = random(num_tokens, 1024, dtype=dtype), random(num_tokens, 16, dtype=torch.float32, seed=1)
    scores, ids = preference.softmax(-1).topk(4)
    ids[1::5] = -1
    product = grouped_experts(ExpertWeights(up, down, silu_mul))
    out = product(x, ids, scores)
    exact = sort_experts(ExpertWeights(up.double(), down.double(), silu_mul_reference))(x.double(), ids, scores)
    assert_near(out, exact)
    some = slice(0, min(num_tokens, 20))
    if num_tokens < 100:
        assert torch.equal(product(x[some], ids[some], scores[some]), out[some])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = product(x, ids, scores)
    ids.copy_(ids.roll(1, 0))
    graph.replay()
    assert torch.equal(captured, product(x, ids, scores))
