"""What a step costs by the data sheet, part by part, each held to arithmetic that one can do by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paged_infer.control.step import SamplingRow, ScheduledSequence, ScheduledStep
from paged_infer.params import SamplingParams
from paged_infer.simulation.cards import CARDS, Card, card_named
from paged_infer.simulation.costs import LinearCost, Roofline, num_attended
from paged_infer.simulation.memory import default_num_batched_tokens, estimate_pool
from paged_infer.simulation.shapes import ModelShape

LLAMA = ModelShape.named("llama-3.1-8b")
SLOW = Card("round numbers", 100e9, 1e12, 100e12, 200e12)
COST = Roofline(SLOW, LLAMA, share_of_bandwidth=1.0, share_of_peak=1.0)


def step(*sequences: tuple[int, int], samples: bool = True) -> ScheduledStep:
    """(computed tokens, tokens to compute) of each."""
    row = SamplingRow(SamplingParams(), 0, 0, 0, 0) if samples else None
    return ScheduledStep(1, [ScheduledSequence(i, [0] * n, before, [], row) for i, (before, n) in enumerate(sequences)])


def test_a_decode_reads_every_weight_once_and_its_own_keys():
    parts = COST.parts(step((999, 1)))
    assert parts.matrices == pytest.approx(6_979_588_096 * 2 / 1e12)
    assert parts.head == pytest.approx(128_256 * 4096 * 2 / 1e12)
    assert parts.attention == pytest.approx(1000 * 2 * 32 * 8 * 128 * 2 / 1e12)
    assert parts.all_reduces == parts.overhead == 0
    assert COST.seconds(step((999, 1))) == pytest.approx(sum(parts))


def test_a_batch_shares_the_weights_and_not_the_keys():
    one, ten = COST.parts(step((999, 1))), COST.parts(step(*[(999, 1)] * 10))
    assert ten.matrices == one.matrices and ten.attention == pytest.approx(10 * one.attention)


def test_a_prompt_is_bound_by_operations():
    parts = COST.parts(step((0, 2048)))
    assert parts.matrices == pytest.approx(2 * 6_979_588_096 * 2048 / 100e12)
    assert parts.attention == pytest.approx(32 * 4 * 32 * 128 * (2048 * 2049 / 2) / 100e12)
    assert COST.parts(step((0, 2048), samples=False)).head == 0


def test_chunks_of_a_prompt_attend_as_often_as_the_whole():
    assert sum(num_attended(before, 512, None) for before in range(0, 2048, 512)) == num_attended(0, 2048, None)
    for window in (1, 3, 7, 100):
        by_hand = sum(min(context, window) for context in range(6, 16))
        assert num_attended(5, 10, window) == by_hand


def test_few_bits_read_less_and_compute_the_same():
    decode, prompt = step((999, 1)), step((0, 4096))
    narrow = replace(COST, weight_bits=4.5, kv_bytes=1.0)
    assert narrow.parts(decode).matrices == pytest.approx(COST.parts(decode).matrices * 4.5 / 16)
    assert narrow.parts(decode).attention == pytest.approx(COST.parts(decode).attention / 2)
    assert narrow.parts(decode).head == COST.parts(decode).head
    assert narrow.parts(prompt).matrices == COST.parts(prompt).matrices
    assert replace(narrow, is_8bit_math=True).parts(prompt).matrices == COST.parts(prompt).matrices / 2


def test_two_cards_halve_the_reading_and_add_all_reduces():
    decode, pair = step((999, 1)), replace(COST, tensor_parallel=2)
    one, two = COST.parts(decode), pair.parts(decode)
    assert two.matrices == pytest.approx(one.matrices / 2) and two.attention == pytest.approx(one.attention / 2)
    link = SLOW.link
    assert two.all_reduces == pytest.approx(64 * (link.latency_s + 4096 * 2 / link.bytes_per_s))
    assert replace(COST, tensor_parallel=16).kv_bytes_per_token == COST.kv_bytes_per_token / 8  # 8 key heads


def test_a_linear_cost_counts_tokens_and_sequences():
    assert LinearCost(1.0, 0.1, 0.01).seconds(step((5, 1), (0, 4))) == pytest.approx(1.52)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "int3"}, "dtype='int3'"),
        ({"dtype": "half"}, r"did you mean float16\?"),
        ({"share_of_bandwidth": 0.0}, r"share_of_bandwidth=0\.0: must be > 0"),
        ({"share_of_peak": 1.5}, r"share_of_peak=1\.5"),
        ({"step_overhead_s": -1.0}, r"step_overhead_s=-1\.0"),
        ({"tensor_parallel": 3}, "tensor_parallel=3: must be a divisor of the model's 32 attention heads"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(COST, **wrong)


def test_cards_are_known_by_their_slugs():
    assert {"a10", "a100", "h100", "h200", "l4", "rtx-4090", "rtx-pro-6000"} == set(CARDS)
    for card in CARDS.values():
        ridge = card.flops_per_s / card.bytes_per_s
        assert 100 < ridge < 450 and card.flops_per_s_8bit >= 1.9 * card.flops_per_s
    with pytest.raises(ValueError, match=r"gpu 'rtx-9090': not known; known: a10, .*, or cpu"):
        card_named("rtx-9090")


def test_the_pool_is_what_weights_and_a_step_leave():
    """vLLM 0.19's pool for this model on an RTX 4090 had 2,588 blocks (LLMServingSim's records)."""
    limits = {"max_num_seqs": 256, "max_num_batched_tokens": 2048}
    pool = estimate_pool(Roofline(CARDS["rtx-4090"], LLAMA), **limits)
    assert pool.weights == 2 * LLAMA.config.num_parameters and pool.bytes_per_block == 16 * 2 * 32 * 8 * 128 * 2
    assert 0.9 < pool.num_blocks / 2588 < 1.1
    narrow = Roofline(CARDS["rtx-4090"], LLAMA, weight_bits=4.5, kv_bytes=1.0)
    assert estimate_pool(narrow, **limits).num_blocks > 5 * pool.num_blocks
    pair = estimate_pool(Roofline(CARDS["rtx-4090"], LLAMA, tensor_parallel=2), **limits)
    assert pair.num_blocks > 4 * pool.num_blocks
    with pytest.raises(ValueError, match=r"llama-3\.1-70b on 1 rtx-4090: 141\.1 GB of weights on each leave no block"):
        estimate_pool(Roofline(CARDS["rtx-4090"], ModelShape.named("llama-3.1-70b")), **limits)
    with pytest.raises(ValueError, match=r"gpu_memory_utilization=1\.5"):
        estimate_pool(Roofline(CARDS["h100"], LLAMA), **limits, gpu_memory_utilization=1.5)
    assert [default_num_batched_tokens(CARDS[name].memory_bytes) for name in ("l4", "h100")] == [2048, 8192]
