"""Every kernel, compiled for the GPU at hand, at a model's shapes: against float64, and against its reference in torch.

The interpreter's tests beside this file vary the shapes. What only a GPU can show is here: real tiles, real dtypes,
CUDA graphs, pools of more than 2^31 elements. It needs nothing but torch, triton and pytest (no hypothesis, no
conftest), so that ``make gpu`` can run it on a bare machine.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from paged_infer.bench.kernels.checks import CHECKS, COMPILED
from paged_infer.bench.kernels.linear_cases import GRIDS, linear_problem
from paged_infer.bench.kernels.problems import attention_float64, paged_attention_float64, paged_problem
from paged_infer.kernels.attention.flash_attention import flash_attention, flash_attention_reference
from paged_infer.kernels.attention.flash_tma import flash_attention_tma
from paged_infer.kernels.attention.paged_attention import paged_attention, paged_attention_reference
from paged_infer.kernels.fused.copy_blocks import copy_blocks, copy_blocks_reference
from paged_infer.kernels.fused.grouped_gemm import grouped_experts
from paged_infer.kernels.fused.moe import ExpertWeights, sort_experts
from paged_infer.kernels.fused.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from paged_infer.kernels.fused.rms_norm import add_rms_norm, add_rms_norm_reference
from paged_infer.kernels.fused.sample import sample, sample_reference
from paged_infer.kernels.fused.silu_mul import silu_mul, silu_mul_reference
from paged_infer.kernels.fused.store_kv import store_kv, store_kv_reference
from paged_infer.kernels.quant.gemm import pack_triton
from paged_infer.kernels.quant.product import float8_tokens, int8_tokens, quantised_linear
from paged_infer.kernels.quant.rounding import round_tokens
from paged_infer.kernels.quant.weight import QuantisedWeight, dequantise, pack_int4

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    rng = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, device=DEVICE, generator=rng).to(dtype)


def assert_near(out: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[out.dtype]
    torch.testing.assert_close(out.double(), expected.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kernel", CHECKS)
def test_every_kernel_equals_float64_at_a_models_shapes(kernel: str) -> None:
    results = list(CHECKS[kernel](DEVICE, COMPILED))
    assert [result for result in results if not result.passed] == []
    assert results


# -- Attention -------------------------------------------------------------------------------------------------------


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


# -- The pieces around it, against their references -------------------------------------------------------------------


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


# -- Weights of few bits ---------------------------------------------------------------------------------------------

HAS_FLOAT8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
EACH_GRID = pytest.mark.parametrize("name", GRIDS)


@EACH_GRID
def test_a_row_times_few_bits_has_the_same_bits_alone_and_in_any_crowd(name: str) -> None:
    """Few tokens in tiles of 16, 32 and 64, split over programs; many in programs that take all splits in turn."""
    problem = linear_problem(GRIDS[name], (1024, 4096), 300, torch.bfloat16, DEVICE)
    assert problem.product.splits > 1
    together = problem.product(problem.x)
    for tokens in (1, 7, 17, 33, 64, 65, 200):
        assert torch.equal(problem.product(problem.x[:tokens]), together[:tokens]), tokens


@EACH_GRID
@pytest.mark.parametrize("num_tokens", [5, 100])
def test_a_graph_of_a_product_of_few_bits_follows_its_x(name: str, num_tokens: int) -> None:
    problem = linear_problem(GRIDS[name], (1024, 4096), num_tokens, torch.bfloat16, DEVICE)
    x, product = problem.x, problem.product
    product(x)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = product(x)
    x.copy_(random(*x.shape, seed=9))
    graph.replay()
    assert torch.equal(captured, product(x))


@EACH_GRID
def test_products_of_few_bits_are_near_their_reference(name: str) -> None:
    problem = linear_problem(GRIDS[name], (1000, 4096), 40, torch.bfloat16, DEVICE)
    bias = random(1000, seed=3)
    product = pack_triton(problem.weight, bias, problem.activations)
    reference = quantised_linear(problem.x, problem.weight, bias, problem.activations)
    assert_near(product(problem.x), reference)
    if problem.activations == "int8":  # of few tokens, and of many
        assert torch.equal(product(problem.x), reference)
        many = problem.x.repeat(2, 1)
        assert torch.equal(product(many), quantised_linear(many, problem.weight, bias, "int8"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_each_code_of_4_bits_and_of_float8_is_decoded_exactly(dtype: torch.dtype) -> None:
    """Compiled kernels put the codes into the bits of a float, which the interpreter does not do for bfloat16."""
    x = torch.eye(256, dtype=dtype, device=DEVICE)
    bytes_ = torch.arange(256, device=DEVICE)
    float8 = bytes_.where(bytes_ % 128 != 127, 0).to(torch.uint8).repeat(64, 1).view(torch.float8_e4m3fn)
    for values, bits in ((float8, 8), (pack_int4((bytes_ % 16).repeat(64, 1)), 4)):
        weight = QuantisedWeight(values, torch.ones(64, 1, device=DEVICE), None, bits, 256, (64, 256))
        assert torch.equal(pack_triton(weight, None)(x).float(), dequantise(weight).t())


@pytest.mark.parametrize(
    ("activations", "reference"),
    [
        ("int8", int8_tokens),
        pytest.param("float8", float8_tokens, marks=pytest.mark.skipif(not HAS_FLOAT8, reason="needs sm89")),
    ],
)
def test_tokens_are_rounded_to_the_bits_of_their_reference(activations, reference) -> None:
    x = random(300, 5000, dtype=torch.float32)
    x[0] = torch.arange(5000, device=DEVICE).remainder(255) / 2 - 63.5  # every second one is a tie
    x[1], x[2], x[3] = 0, x[2] * 1e-38, x[3] * 1e37
    for some in (x, x.bfloat16(), x[:, 1000:]):
        codes, scales = round_tokens(some, activations)
        expected, expected_scales = reference(some)
        assert torch.equal(scales, expected_scales)
        assert torch.equal(codes.float(), expected.float())
