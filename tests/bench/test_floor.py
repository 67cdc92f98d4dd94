"""The floor is what its formulas give by hand; and its sizes are those of the decoder."""

from __future__ import annotations

import pytest
import torch

from paged_infer.bench.floor import LayerCost, ModelCost
from paged_infer.bench.roofline import Roofline

ROOF = Roofline(copy_bytes_per_s=100.0, read_bytes_per_s=50.0, matmul_flops_per_s=1000.0)
COST = ModelCost(
    weight_bytes=200, flops_per_token=10, head_flops=5, layers=(LayerCost(kv_bytes=4, flops=2, window=None),) * 2
)


def test_one_request_by_hand():
    """3 tokens in, 4 out: three decode steps, that attend to 4, 5 and 6 tokens in both layers."""
    floor = COST.floor([3], [4], ROOF)
    attended = 2 * (4 + 5 + 6)
    assert floor.memory_s == pytest.approx((3 * 200 + 4 * attended) / 100)
    prefill, decode = 10 * 3 + 5 + 2 * 2 * (1 + 2 + 3), 15 * 3 + 2 * attended
    assert floor.compute_s == pytest.approx((prefill + decode) / 1000)
    assert floor.decode_s == floor.memory_s
    assert floor.prefill_s == 200 / 100  # reading the weights once takes longer than computing three tokens


def test_a_batch_shares_the_weights_and_nothing_else():
    alone, together = COST.floor([3], [4], ROOF), COST.floor([3, 3], [4, 4], ROOF)
    weights_s = 3 * 200 / 100
    assert together.memory_s - weights_s == pytest.approx(2 * (alone.memory_s - weights_s))


def test_fewer_at_once_take_more_steps():
    together, one_by_one = (COST.floor([3] * 4, [5] * 4, ROOF, running) for running in (None, 1))
    assert one_by_one.memory_s - together.memory_s == pytest.approx((16 - 4) * 200 / 100)


def test_the_longest_output_sets_the_number_of_steps():
    even, uneven = COST.floor([3, 3], [5, 5], ROOF), COST.floor([3, 3], [2, 8], ROOF)
    assert uneven.memory_s - even.memory_s >= (7 - 4) * 200 / 100


@pytest.mark.parametrize("window", [None, 1, 3, 9])
def test_no_query_attends_beyond_its_window(window):
    layer = LayerCost(4, 2, window)
    expected = sum(min(before + 1, window or 100) for before in range(5, 12))
    assert layer.attended(5, 7) == expected


def test_sizes_are_those_of_the_decoder(make_llm):
    decoder = make_llm("qwen3", attention_backend="sdpa").engine.decoder  # C pads panels
    cost = ModelCost.of(decoder)
    stored = sum({p.data_ptr(): p.numel() for p in decoder.parameters()}.values())
    assert cost.weight_bytes == pytest.approx(4 * stored, rel=1e-3)  # a norm of heads is stored once a head
    matrices = sum(p.numel() for name, p in decoder.layers.named_parameters() if p.dim() >= 2 and "norm" not in name)
    assert cost.flops_per_token == pytest.approx(2 * matrices, rel=0.01)
    assert cost.head_flops == 2 * 1003 * 192


def test_an_embedding_that_is_no_head_is_looked_up_and_not_read(make_llm):
    tied, untied = (ModelCost.of(make_llm(name).engine.decoder) for name in ("qwen3", "llama2"))
    assert untied.head_flops == tied.head_flops
    decoder = make_llm("llama2", attention_backend="sdpa").engine.decoder
    stored = sum(p.numel() for p in decoder.parameters())
    assert untied.weight_bytes == 4 * (stored - decoder.embedding.weight.numel())
    assert decoder.dtype is torch.float32
