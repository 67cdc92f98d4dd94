"""The course's helpers: one text through the decoder, with or without a cache, is what the engine computes."""

from __future__ import annotations

import pytest
import torch
from course import (
    device,
    float_decoder,
    hidden_states,
    inputs_of,
    layer_seconds,
    logits,
    num_host_reads,
    open_llm,
    package_sampler,
    peak_bytes,
    prepared_step,
    product_calls,
    random_decoder,
    rounded,
    routed_waits,
    seeded,
    story_cache,
    story_log_probs,
    training_stories,
    unseen_stories,
    verification_pass,
)
from my_engine import Decoder

from paged_infer import SamplingParams, storyteller
from paged_infer.cache.contiguous import ContiguousCache
from paged_infer.cache.paged import PagedCache
from paged_infer.storyteller.evaluation import quizzes
from paged_infer.storyteller.stories.grammar import FIRST_EVALUATION_SEED

TEXT = "A story about Mia and a red key. Mia found a key under the bridge."


@pytest.fixture(scope="module")
def llm():
    return open_llm()


@pytest.fixture(scope="module")
def ids(llm):
    return llm.tokenizer.encode(TEXT)


def test_greedy_tokens_are_those_of_the_engine(llm, ids):
    text = list(ids)
    for _ in range(8):
        text.append(logits(llm, text)[-1].argmax().item())
    greedy = SamplingParams(temperature=0, max_tokens=8)
    assert text[len(ids) :] == llm.generate([ids], greedy, use_tqdm=False)[0].outputs[0].token_ids


def test_it_takes_an_llm_or_its_decoder(llm, ids):
    assert hidden_states(llm, ids).equal(hidden_states(llm.engine.decoder, torch.tensor(ids)))


def caches(llm, batch, width):
    own, spec = llm.engine.executor.runner.cache, llm.engine.decoder.kv_spec()
    yield ContiguousCache(spec, width, [0] * batch, device)
    yield PagedCache(spec, batch, width, own.backend, device, own.ops)


def test_a_text_in_pieces_gives_what_it_gives_as_a_whole(llm, ids):
    whole = hidden_states(llm, ids)
    for cache in caches(llm, 1, 32):
        parts = [
            hidden_states(llm, ids[:7], cache),
            *(hidden_states(llm, [token], cache, start=7 + i) for i, token in enumerate(ids[7:])),
        ]
        assert torch.allclose(torch.cat(parts), whole, atol=1e-3)


def test_texts_of_a_batch_do_not_see_each_other(llm, ids):
    first, second = ids[:9], ids[5:14]
    alone = torch.cat([hidden_states(llm, first), hidden_states(llm, second)])
    assert torch.allclose(hidden_states(llm, [*first, *second], batch=2), alone, atol=1e-3)
    for cache in caches(llm, 2, 16):
        assert torch.allclose(hidden_states(llm, [*first, *second], cache, batch=2), alone, atol=1e-3)


def test_positions_may_be_given(llm, ids):
    shifted = hidden_states(llm, ids, positions=torch.arange(len(ids)) + 50)
    assert torch.allclose(shifted, hidden_states(llm, ids), atol=1e-3)
    assert not torch.allclose(hidden_states(llm, ids, positions=torch.arange(len(ids)) * 2), shifted, atol=0.1)


def test_the_small_ones():
    assert package_sampler(torch.eye(3, 5), temperature=0) == [0, 1, 2]
    assert seeded(1, 2, 3).equal(seeded(1, 2, 3)) and not seeded(1, 2, 3).equal(seeded(2, 2, 3))
    assert rounded(torch.tensor([[1 / 3, 2.0]]), 2) == [[0.33, 2.0]]


def test_each_piece_of_a_layer_takes_time(llm):
    assert all(seconds > 0 for seconds in layer_seconds(llm, 8).values())


def test_peak_bytes_counts_what_is_alive_at_one_time_and_no_view_of_a_weight():
    weight = torch.zeros(100, 10)

    def call(x):  # [1, 10] -> two products of 100 floats, one after the other
        for _ in range(2):
            product = x @ weight.T
            del product
        return x + x

    assert peak_bytes(call, torch.ones(1, 10), weights=[weight]) == 400


def test_a_random_decoder_steps(llm):
    decoder = random_decoder("qwen3-3m", plain=True, num_hidden_layers=1)
    assert prepared_step(decoder, 1, 8, batch=3)().shape == (3, decoder.config.vocab_size)


def test_a_verification_pass_draws_after_every_token_of_every_text(llm):
    assert len(verification_pass(llm, llm, width=3, batch=2)()) == 6


def test_a_story_cache_has_room_for_texts_side_by_side(llm, ids):
    cache = story_cache(llm, batch=2, room=32)
    both = logits(llm, ids + ids, cache, batch=2)
    torch.testing.assert_close(both[: len(ids)], both[len(ids) :])
    torch.testing.assert_close(both[: len(ids)], logits(llm, ids), atol=1e-4, rtol=1e-4)


def test_host_reads_are_counted_inside_operations_too():
    x = torch.rand(3, 5)
    assert num_host_reads(lambda: x.argmax(dim=-1)) == 0
    assert num_host_reads(lambda: x.argmax().item()) == 1
    assert num_host_reads(lambda: torch.multinomial(x, 1)) >= 1


@pytest.fixture(scope="module")
def stories(llm):
    return unseen_stories(llm.tokenizer, 2)


class TestFewBits:
    def test_both_decoders_give_the_same_probabilities(self, stories):
        ours, package = Decoder(storyteller.PATH, device), float_decoder()
        found = [story_log_probs(decoder, stories) for decoder in (ours, package)]
        torch.testing.assert_close(found[0].exp(), found[1].exp(), atol=1e-4, rtol=1e-3)

    def test_the_rows_of_an_answer_come_before_its_tokens(self, llm, stories):
        answers = [llm.tokenizer.decode(stories.ids[rows + 1].tolist()) for rows in stories.answers]
        asked = [quiz for i in range(2) for quiz in quizzes(storyteller.tell(FIRST_EVALUATION_SEED + i))]
        assert answers == [f" {answer}" for _, answer in asked]

    def test_no_row_leads_from_one_story_to_the_next(self, stories):
        last = len(stories.texts[0]) - 1
        assert stories.rows.tolist() == [row for row in range(len(stories.ids) - 1) if row != last]

    def test_no_story_of_training_is_asked_about(self, stories):
        assert not [text for text in training_stories(30) if text in stories.texts]

    def test_the_inputs_of_a_layer_are_what_it_multiplies(self, stories):
        assert inputs_of(float_decoder(), "layers.0.mlp.down", stories).shape == (len(stories.ids), 640)

    def test_each_form_of_a_product_is_near_the_dense_one(self):
        num_bytes, calls = product_calls(128, 2, (3,))
        dense = calls["bfloat16", 3]().float()
        assert num_bytes["bfloat16"] > num_bytes["W8A16"] == num_bytes["W8A8"] > num_bytes["W4A16"]
        for form in num_bytes:
            assert (calls[form, 3]().float() - dense).norm() < 0.15 * dense.norm()


class TestReplicas:
    def test_prefix_routing_finds_more_in_caches_than_round_robin(self):
        waits = {name: routed_waits(name, 24, [1] * 6, num_replicas=2) for name in ("round_robin", "prefix")}
        assert waits["prefix"].hits > waits["round_robin"].hits
        for found in waits.values():
            assert sum(found.shares) == pytest.approx(1) and found.ttft_s == sorted(found.ttft_s)
            assert 0 < found.at(0.5) <= found.at(0.9)

    def test_one_popular_beginning_fills_one_replica(self):
        assert max(routed_waits("prefix", 24, [60, 1, 1], num_replicas=2).shares) > 0.8
