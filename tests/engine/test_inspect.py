"""Looking into a running request: what is seen is what was computed, and looking changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from paged_infer import LLM, LLMEngine, SamplingParams
from paged_infer.engine.sequence_view import SequenceView
from paged_infer.kernels import AttentionRecorder, attention_weights
from paged_infer.kernels.attention_backends import ATTENTION_BACKENDS, register_attention_backend, torch_backend

PROMPT = [7, 91, 400, 12, 5, 8, 650, 33, 21, 90, 3, 14, 15, 92, 65, 35, 89, 79, 32]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def running(llm: LLM, num_outputs: int = 3, prompt: list[int] = PROMPT) -> tuple[Any, SequenceView]:
    """A stream after so many outputs, and its request."""
    stream = llm.stream(prompt, GREEDY)
    for _ in range(num_outputs):
        output = next(stream)
    return stream, llm.inspect(output.request_id)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral", "gpt2", "gpt-oss", "deepseek2", "mixtral"])
def test_logits_and_attention_weights_are_those_of_transformers(family: str, make_llm, checkpoint) -> None:
    llm = make_llm(family, block_size=4)
    stream, view = running(llm)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint(family), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    computed = view.token_ids[: view.num_computed_tokens]
    assert len(computed) == len(PROMPT) + 2 and view.state == "running"
    with torch.inference_mode():
        expected = model(torch.tensor([computed]), output_attentions=True)
    torch.testing.assert_close(view.logits, expected.logits[0, -1], rtol=1e-3, atol=1e-4)
    for layer, weights in enumerate(expected.attentions):
        torch.testing.assert_close(
            view.attention_weights(layer), weights[0, :, -1, : len(computed)], rtol=1e-3, atol=1e-5
        )
    stream.close()


def test_keys_and_values_are_gathered_through_the_block_table(make_llm) -> None:
    llm = make_llm(block_size=4)
    stream, view = running(llm)
    cache, num = llm.engine.in_process.runner.cache, view.num_computed_tokens
    assert len(view.block_table) == -(-num // 4)
    for layer in range(len(cache.spec)):
        keys, values = view.keys(layer), view.values(layer)
        assert keys.shape == values.shape == (num, 2, 24)
        for token in range(num):
            block, offset = view.block_table[token // 4], token % 4
            assert keys[token].equal(cache.keys[layer][block, offset])
            assert values[token].equal(cache.values[layer][block, offset])
    stream.close()


@pytest.mark.parametrize("family", ["qwen3", "deepseek2"])
@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_codes_are_read_as_the_numbers_that_they_stand_for(family: str, kv_cache_dtype: str, make_llm) -> None:
    (one, coded), (other, wide) = (
        running(make_llm(family, kv_cache_dtype=dtype), 1) for dtype in (kv_cache_dtype, "auto")
    )
    for read in (SequenceView.keys, SequenceView.values):
        a, b = read(coded, 0), read(wide, 0)  # the first layer's do not depend on what others have stored
        assert a.dtype is torch.float32 and a.shape == b.shape
        assert 0 < (a - b).abs().max() < 0.07 * b.abs().max()
    one.close(), other.close()


def test_inspecting_changes_no_token_and_no_stored_bit(make_llm) -> None:
    prompts = [PROMPT, [*PROMPT[:16], 1, 2, 3], [9, 9, 9]]  # the first two share a block
    (plain, looked) = (make_llm(block_size=16).engine for _ in range(2))
    for engine in (plain, looked):
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), prompt, GREEDY)
    outputs: dict[str, list[Any]] = {"plain": [], "looked": []}
    while plain.has_unfinished_requests:
        outputs["plain"] += plain.step().outputs
        outputs["looked"] += looked.step().outputs
        for request_id in looked.requests.by_id:
            view = looked.inspect(request_id)
            before = [keys.clone() for keys in looked.in_process.runner.cache.keys]
            view.logits, view.attention_weights(1), view.keys(0), view.values(2)
            assert all(map(torch.equal, before, looked.in_process.runner.cache.keys))
    a, b = ([one.outputs[0].token_ids for one in found] for found in outputs.values())
    assert a == b
    looked.check_integrity()


def test_logits_choose_the_next_greedy_token(llm) -> None:
    stream, view = running(llm)
    assert view.token_ids[-1] == int(view.logits.argmax())  # sampled, and not computed yet
    assert view.num_computed_tokens == len(view.token_ids) - 1
    stream.close()


def test_a_view_is_out_of_date_after_a_step_and_says_so(llm) -> None:
    stream, view = running(llm)
    view.keys(0)
    next(stream)
    for look in (lambda: view.keys(0), lambda: view.logits, lambda: view.attention_weights(0)):
        with pytest.raises(RuntimeError, match="call it again after each step"):
            look()
    stream.close()


def test_what_cannot_be_inspected_is_refused_with_the_reason(make_llm) -> None:
    engine: LLMEngine = make_llm(max_num_seqs=1).engine
    engine.add_request("first", PROMPT, GREEDY)
    engine.add_request("second", PROMPT, GREEDY)
    engine.step()
    second = engine.inspect("second")
    assert (second.state, second.block_table, second.priority, second.num_prompt_tokens) == ("waiting", (), 0, 19)
    assert "waiting, 0 of 19 tokens computed" in repr(second)
    with pytest.raises(ValueError, match="nothing of the sequence is in the pool: it is waiting"):
        _ = engine.inspect("second").logits
    with pytest.raises(ValueError, match="request_id='third' is not being served; unfinished requests: 'first', 'sec"):
        engine.inspect("third")
    with pytest.raises(ValueError, match=r"sample_index=1: must be within \[0, 0\]"):
        engine.inspect("first", 1)
    with pytest.raises(ValueError, match=r"layer=3: must be within \[0, 2\]"):
        engine.inspect("first").keys(3)


def test_samples_of_a_request_are_inspected_one_by_one(make_llm) -> None:
    engine: LLMEngine = make_llm(block_size=4).engine
    engine.add_request("mine", PROMPT, SamplingParams(n=3, seed=1, max_tokens=8, ignore_eos=True))
    for _ in range(3):
        engine.step()
    views = [engine.inspect("mine", sample) for sample in range(3)]
    assert len({tuple(view.token_ids) for view in views}) == 3
    assert len({view.block_table[:4] for view in views}) == 1  # of the prompt, shared
    assert views[0].keys(1)[: len(PROMPT)].equal(views[2].keys(1)[: len(PROMPT)])


def test_a_backend_with_a_parameter_for_it_is_given_its_layer(make_llm, monkeypatch) -> None:
    monkeypatch.setattr("paged_infer.kernels.attention_backends.ATTENTION_BACKENDS", ATTENTION_BACKENDS.copy())
    seen: list[int] = []

    @register_attention_backend("mine")
    def mine(q, k_cache, v_cache, step, *, window, layer):
        seen.append(layer)
        return torch_backend(q, k_cache, v_cache, step, window=window)

    mine_llm, plain = make_llm(attention_backend="mine"), make_llm(attention_backend="torch")
    (a,), (b,) = (one.generate(PROMPT, GREEDY, use_tqdm=False) for one in (mine_llm, plain))
    assert a.outputs[0].token_ids == b.outputs[0].token_ids
    assert seen == [0, 1, 2] * 8


def test_a_recorder_keeps_the_weights_of_every_query_of_a_step(make_llm, monkeypatch) -> None:
    monkeypatch.setattr("paged_infer.kernels.attention_backends.ATTENTION_BACKENDS", ATTENTION_BACKENDS.copy())
    recorder = AttentionRecorder()
    register_attention_backend("recorder")(recorder)
    for family in ("qwen3", "gemma2", "gpt-oss"):
        llm = make_llm(family, attention_backend="recorder", block_size=4)
        stream, view = running(llm, 1)
        recorded = dict(recorder.weights)  # the view computes another step by the same backend
        for layer in range(3):
            (weights,) = recorded[layer]
            assert weights.shape == (6, len(PROMPT), len(PROMPT)) and weights.equal(weights.tril())
            torch.testing.assert_close(view.attention_weights(layer), weights[:, -1])
        stream.close()


def test_with_a_step_in_flight_its_known_tokens_are_seen(make_llm) -> None:
    engine, found = make_llm(async_scheduling=True).engine, dict[int, int]()
    engine.add_request("mine", PROMPT, GREEDY)
    while engine.has_unfinished_requests:
        outputs = engine.step().outputs
        if engine.has_unfinished_requests:
            view = engine.inspect("mine")
            found[view.num_computed_tokens] = int(view.logits.argmax())
    tokens = [*PROMPT, *outputs[0].outputs[0].token_ids]
    assert len(found) >= 7 and all(tokens[place] == token for place, token in found.items())


def test_weights_times_values_are_the_attention() -> None:
    from paged_infer.kernels import paged_attention_reference

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 16, generator=generator) for n, h in ((3, 4), (11, 2), (11, 2)))
    for options in ({}, {"window": 4}, {"softcap": 2.0, "scale": 0.7}, {"sinks": torch.randn(4, generator=generator)}):
        weights = attention_weights(q, k, **options)
        assert weights.shape == (4, 3, 11) and (("sinks" in options) == bool((weights.sum(-1) < 0.999).all()))
        out = torch.einsum("hnm,mhd->nhd", weights, v.repeat_interleave(2, 1))
        expected = paged_attention_reference(
            q, k[None], v[None], block_tables=torch.tensor([[0]]), seq_lens=torch.tensor([11]),
            query_start_loc=torch.tensor([0, 3]), **options,
        )  # fmt: skip
        torch.testing.assert_close(out, expected)
