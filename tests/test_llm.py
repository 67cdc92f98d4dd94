"""LLM: what a user meets at the door, in the outputs, and in a stream."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from paged_infer import LLM, RequestOutput, SamplingParams
from paged_infer.baselines import generate_cached, generate_naive, generate_static
from paged_infer.config import EngineConfig
from paged_infer.control.policies import Chunked
from paged_infer.outputs import TokenLogprobs

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
BASELINES = (generate_naive, generate_cached, generate_static)


def generate(llm: LLM, prompts: Any, params: Any = None) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


# -- the door -------------------------------------------------------------------------------------------------------


def test_nothing_asked_is_nothing_answered(llm) -> None:
    assert generate(llm, []) == generate(llm, [], []) == []
    assert all(baseline(llm, []) == [] for baseline in BASELINES)


def test_a_lone_prompt_is_a_text_or_a_list_of_ids(text_llm) -> None:
    (by_text,) = generate(text_llm, "ab ba", GREEDY)
    (by_ids,) = generate(text_llm, text_llm.tokenizer.encode("ab ba"), GREEDY)
    assert by_text.outputs == by_ids.outputs
    assert (by_text.prompt, by_ids.prompt) == ("ab ba", None)
    assert by_text.prompt_token_ids == by_ids.prompt_token_ids
    mixed = generate(text_llm, ["ab ba", by_ids.prompt_token_ids, (9, 9)], GREEDY)
    assert mixed[0].outputs == mixed[1].outputs == by_text.outputs and mixed[2].prompt_token_ids == [9, 9]


@pytest.mark.parametrize(
    "prompts",
    [
        np.array([5, 6, 7]),
        np.array([5, 6, 7], dtype=np.uint16),
        torch.tensor([5, 6, 7]),
        torch.tensor([5, 6, 7], dtype=torch.int32),
        array("i", [5, 6, 7]),
        range(5, 8),
        [np.int64(5), 6, torch.tensor(7)],
        [[np.int64(5), np.int32(6), 7]],
        [np.array([5, 6, 7])],
        (torch.tensor([5, 6, 7]),),
    ],
)
def test_integers_of_numpy_and_torch_are_a_prompt_as_ints_are(prompts, llm) -> None:
    (expected,) = generate(llm, [5, 6, 7], GREEDY)
    (output,) = generate(llm, prompts, GREEDY)
    assert output.prompt_token_ids == [5, 6, 7] and {type(t) for t in output.prompt_token_ids} == {int}
    assert output.outputs == expected.outputs
    if not isinstance(prompts, list | tuple):
        assert generate(llm, [prompts, prompts], GREEDY)[1].outputs == expected.outputs
        *_, last = llm.stream(prompts, GREEDY)
        assert last.outputs == expected.outputs


def test_an_array_of_texts_is_a_list_of_prompts(text_llm) -> None:
    outputs = generate(text_llm, np.array(["ab", "ba"]), GREEDY)
    assert [output.prompt for output in outputs] == ["ab", "ba"]
    assert {type(output.prompt) for output in outputs} == {str}


@pytest.mark.parametrize(
    ("prompts", "params", "parts"),
    [
        ([[5], []], GREEDY, ["prompt 1", "empty", "at least 1"]),
        ("", GREEDY, ["prompt 0", "empty"]),
        ([[5] * 600], GREEDY, ["600 tokens", "max_model_len=512"]),
        ([[5], [1003]], GREEDY, ["prompt 1", "1003", "[0, 1003)"]),
        ([[5, -1]], GREEDY, ["-1", "[0, 1003)"]),
        ([5, "a"], GREEDY, ["prompt 0", "int"]),
        ([None], GREEDY, ["prompt 0", "NoneType"]),
        ([[[5]]], GREEDY, ["[5]", "[0, 1003)"]),
        (["a", {"prompt": 5}], GREEDY, ["prompt 1", "prompt=5", "must be a str"]),
        ({"text": "a"}, GREEDY, ["prompt 0", "unknown key text", "prompt_token_ids"]),
        (None, GREEDY, ["prompts must be", "NoneType"]),
        (7, GREEDY, ["prompts must be", "int"]),
        (b"abc", GREEDY, ["prompts must be", "bytes"]),
        ([b"abc"], GREEDY, ["prompt 0", "bytes"]),
        (bytearray(b"abc"), GREEDY, ["prompts must be", "bytearray"]),
        ([memoryview(b"abc")], GREEDY, ["prompt 0", "memoryview"]),
        (torch.tensor([[5, 6]]), GREEDY, ["one dimension", "(1, 2)", "list of prompts"]),
        ([np.array([[5], [6]])], GREEDY, ["prompt 0", "one dimension", "(2, 1)"]),
        (np.array(5), GREEDY, ["one dimension", "()"]),
        (torch.tensor([5.0]), GREEDY, ["prompt 0", "float"]),
        ([np.array([5.0, 6.0])], GREEDY, ["prompt 0", "5.0", "not an integer"]),
        ([torch.tensor([True])], GREEDY, ["prompt 0", "True", "not an integer"]),
        ([[np.bool_(True)]], GREEDY, ["prompt 0", "True", "not an integer"]),
        ([np.array([], dtype=np.int64)], GREEDY, ["prompt 0", "empty"]),
        ([np.array([5, 1003])], GREEDY, ["prompt 0", "1003", "[0, 1003)"]),
        (["\ud800"], GREEDY, ["prompt 0", "surrogate"]),
        ([[5], [6]], [GREEDY], ["1 sampling_params for 2 prompts"]),
        ([[5]], [GREEDY] * 3, ["3 sampling_params for 1 prompt"]),
        ([], [GREEDY], ["1 sampling_params for 0 prompts"]),
        ([[5]], {"max_tokens": 5}, ["sampling_params", "max_tokens"]),
        ([[5]], [None], ["sampling_params", "None"]),
        ([[5]], SamplingParams(n=16385), ["n=16385", "16384"]),
        ([[5]], SamplingParams(logprobs=1004), ["logprobs=1004", "1003"]),
        ([[5]], SamplingParams(stop_token_ids=[1003]), ["1003", "[0, 1003)"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_error_at_the_door_and_costs_nobody_anything(prompts, params, parts, text_llm) -> None:
    stream = text_llm.stream([9, 8, 7], LONG)
    before = next(stream)
    for entry in (generate, *BASELINES):
        with pytest.raises(ValueError) as refusal:
            entry(text_llm, prompts, params)
        assert all(part in str(refusal.value) for part in parts), refusal.value
    assert text_llm.stats()["num_waiting"] == 0 and text_llm.stats()["num_running"] == 1
    *_, last = stream
    assert last.outputs[0].token_ids[0] == before.outputs[0].token_ids[0]
    assert ids([last]) == ids(generate(text_llm, [9, 8, 7], LONG))


def test_bad_input_to_a_stream_is_told_before_the_first_step(llm) -> None:
    with pytest.raises(ValueError, match="prompt 0: the prompt is empty"):
        llm.stream([])


def test_requests_with_a_seed_of_minus_one_have_the_engines_seeds(llm) -> None:
    seeds = [r.sequences[0].seed for r in llm.prepare([[5], [5]], SamplingParams(seed=-1))]
    assert len(set(seeds)) == 2 and -1 not in seeds


def test_none_of_the_prompts_is_begun_when_one_is_bad(llm) -> None:
    with pytest.raises(ValueError, match="prompt 2"):
        generate(llm, [[5], [6], [2000]], GREEDY)
    assert llm.stats()["steps"] == 0


def test_an_unknown_option_is_a_type_error_that_lists_the_known_ones(checkpoint) -> None:
    with pytest.raises(TypeError, match=r"unknown option blok_size \(did you mean block_size\?\); known: dtype, "):
        LLM(checkpoint("qwen3"), blok_size=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size=0: must be an integer >= 1"),
        ({"block_size": True}, "block_size=True"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"max_num_batched_tokens": -1}, "max_num_batched_tokens=-1"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"num_blocks": 2.5}, "num_blocks=2.5"),
        ({"max_model_len": 0}, "max_model_len=0"),
        ({"max_model_len": 513}, "max_model_len=513 exceeds the model's max_position_embeddings=512"),
        ({"block_size": np.bool_(True)}, "block_size=np.True_"),
        ({"block_size": np.float32(16)}, "block_size=np.float32(16.0): must be an integer >= 1"),
        ({"max_model_len": torch.tensor([8])}, "max_model_len=tensor([8]): must be an integer >= 1"),
        ({"gpu_memory_utilization": "0.5"}, "gpu_memory_utilization='0.5': must be a finite number > 0 and <= 1"),
        ({"gpu_memory_utilization": True}, "gpu_memory_utilization=True"),
        ({"scheduler_delay_factor": math.nan}, "scheduler_delay_factor=nan"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5"),
        ({"gpu_memory_utilization": math.nan}, "gpu_memory_utilization=nan"),
        ({"dtype": "int8"}, "dtype='int8': must be one of auto, float32"),
        ({"attention_backend": "flash9"}, "attention_backend='flash9': must be one of auto, c, sdpa, torch, triton"),
        ({"device": "tpu9"}, "device='tpu9'"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching=1: must be True or False"),
        ({"preemption_mode": "drop"}, "preemption_mode='drop': must be one of recompute, swap"),
        ({"swap_space": -1}, "swap_space=-1: must be a finite number >= 0"),
        ({"swap_space": math.nan}, "swap_space=nan"),
        ({"swap_space": 2.0}, "swap_space=2.0 with preemption_mode='recompute': nothing is swapped"),
        ({"swap_space": 0, "preemption_mode": "swap"}, "swap_space=0 GiB is less than a block of 18432 bytes"),
        ({"scheduling_policy": "fifo"}, "scheduling_policy='fifo': must be a Policy or one of chunked"),
        ({"scheduler_delay_factor": 2}, "scheduler_delay_factor=2 with scheduling_policy='chunked'"),
        ({"scheduler_delay_factor": "x"}, "scheduler_delay_factor='x'"),
        ({"scheduling_policy": "prefill_first", "scheduler_delay_factor": -1}, "scheduler_delay_factor=-1"),
        (
            {"scheduling_policy": "static", "max_num_batched_tokens": 511},
            "max_num_batched_tokens=511 is less than max_model_len=512",
        ),
        ({"seed": 2**63}, "seed=9223372036854775808"),
        ({"seed": "x"}, "seed='x'"),
    ],
)
def test_a_bad_option_is_refused_by_value_and_limit(options, message, checkpoint) -> None:
    with pytest.raises(ValueError) as refusal:
        LLM(checkpoint("qwen3"), **options)
    assert message in str(refusal.value)


def test_an_option_may_be_a_number_of_numpy_or_torch_and_is_kept_as_pythons_own() -> None:
    options = {
        "block_size": np.int64(8),
        "num_blocks": torch.tensor(64),
        "max_model_len": np.array(40),
        "gpu_memory_utilization": np.float32(0.5),
        "preemption_mode": "swap",
        "swap_space": np.int32(2),
        "enable_prefix_caching": np.bool_(False),
        "async_scheduling": torch.tensor(False),
        "seed": np.uint8(7),
    }
    config = EngineConfig(**options)
    kept = {name: getattr(config, name) for name in options}
    assert kept == {
        "block_size": 8,
        "num_blocks": 64,
        "max_model_len": 40,
        "gpu_memory_utilization": 0.5,
        "preemption_mode": "swap",
        "swap_space": 2,
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "seed": 7,
    }
    assert {type(value) for value in kept.values()} == {int, float, bool, str}
    speculation = {"method": "ngram", "num_speculative_tokens": np.int64(3), "prompt_lookup_max": np.int64(2)}
    drafts = EngineConfig(speculative_config=speculation).speculation
    assert drafts is not None and type(drafts.num_speculative_tokens) is type(drafts.prompt_lookup_max) is int


def test_what_is_no_model_is_refused_in_one_line(tmp_path) -> None:
    for name in (tmp_path / "nowhere", "a/b/c", "no-such-owner/no-such-model"):
        with pytest.raises(ValueError) as refusal:
            LLM(name)
        assert str(name) in str(refusal.value) and "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        LLM(tmp_path)


def test_a_checkpoint_without_tokenizer_serves_ids_and_says_so_when_given_text(llm) -> None:
    (output,) = generate(llm, [5, 6], SamplingParams(temperature=0, max_tokens=3, logprobs=1, prompt_logprobs=1))
    assert llm.tokenizer is None and output.outputs[0].text == "" and len(output.outputs[0].token_ids) == 3
    assert all(entry.decoded_token is None for row in output.outputs[0].logprobs for entry in row.values())
    for call, message in (
        (lambda: generate(llm, "text", GREEDY), "has no tokenizer: pass token ids"),
        (lambda: generate(llm, [5], SamplingParams(stop="x")), "stop=.*has no tokenizer"),
        (lambda: llm.chat([{"role": "user", "content": "x"}]), "has no tokenizer, so it cannot chat"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_pool_and_the_context_are_planned_from_the_options(make_llm) -> None:
    assert make_llm(num_blocks=None, max_num_seqs=3).engine.memory.num_blocks == 3 * 32
    assert make_llm(num_blocks=None, max_num_seqs=3, max_model_len=50).engine.memory.num_blocks == 3 * 4
    memory = make_llm(num_blocks=5, block_size=7).engine.memory
    assert (memory.max_model_len, memory.pool_bytes) == (35, 35 * memory.kv_bytes_per_token)
    assert memory.kv_bytes_per_token == 2 * 3 * 2 * 24 * 4  # keys and values, layers, heads, dimensions, bytes
    assert memory.num_swap_blocks == 0
    swapping = make_llm(num_blocks=5, preemption_mode="swap").engine.memory
    assert swapping.num_swap_blocks == 5  # 1 GiB, and never more than the pool
    space = 3.5 * 16 * swapping.kv_bytes_per_token / 2**30
    assert make_llm(preemption_mode="swap", swap_space=space).engine.memory.num_swap_blocks == 3
    with pytest.raises(ValueError, match="num_blocks=5"):  # a longer context is legal; the pool is a second gate
        generate(make_llm(num_blocks=5, block_size=7, max_model_len=100), [5] * 30, SamplingParams(max_tokens=None))


# -- endings --------------------------------------------------------------------------------------------------------


def test_max_model_len_clamps_the_output_and_the_reason_is_length(make_llm) -> None:
    llm = make_llm(max_model_len=12)
    for max_tokens in (50, None):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        for entry in (generate, *BASELINES):
            (output,) = entry(llm, [5] * 8, params)
            assert len(output.outputs[0].token_ids) == 4 and output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(("keep", "kept"), [(3, 3), (100, 20), (-1, 11)])
def test_truncate_prompt_tokens_keeps_the_last_ones(keep: int, kept: int, make_llm) -> None:
    llm, prompt = make_llm(max_model_len=12 if keep == -1 else 64), list(range(5, 25))
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, truncate_prompt_tokens=keep)
    (output,) = generate(llm, prompt, params)
    assert output.prompt_token_ids == prompt[20 - kept :]
    assert len(output.outputs[0].token_ids) == (1 if keep == -1 else 4)


def test_both_end_tokens_of_the_checkpoint_are_honoured(text_llm) -> None:
    assert text_llm.engine.decoder.config.eos_token_ids == (0, 1)
    for end in (0, 1):
        force = {end: 100.0}
        (output,) = generate(text_llm, [5, 6], SamplingParams(temperature=0, max_tokens=6, logit_bias=force))
        sample = output.outputs[0]
        assert (sample.token_ids, sample.text, sample.finish_reason, sample.stop_reason) == ([end], "", "stop", None)
        params = SamplingParams(temperature=0, max_tokens=6, logit_bias=force, ignore_eos=True)
        assert ids(generate(text_llm, [5, 6], params)) == [[end] * 6]


def test_min_tokens_holds_off_every_end(text_llm) -> None:
    forced = {"temperature": 0, "max_tokens": 9, "min_tokens": 4}
    for end, options in ((0, {}), (77, {"stop_token_ids": [77]})):
        params = SamplingParams(**forced, **options, logit_bias={end: 100.0})
        (output,) = generate(text_llm, [5, 6], params)
        said = output.outputs[0].token_ids
        assert end not in said[:4] and said[4:] == [end] and output.outputs[0].finish_reason == "stop"


def test_a_stop_string_may_span_tokens_and_is_cut_off(text_llm) -> None:
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=30, ignore_eos=True)
    whole = generate(text_llm, "ab ba", params)[0].outputs[0]
    pieces = [text_llm.tokenizer.token_text(t) for t in whole.token_ids]
    seams = [a[-1] + b[0] for a, b in itertools.pairwise(pieces) if (a + b).isascii()]
    seam = next(s for s in seams if not any(s in piece for piece in pieces))
    for entry in (generate, *BASELINES):
        params = SamplingParams(temperature=0.9, seed=3, max_tokens=30, ignore_eos=True, stop=["\x00", seam])
        sample = entry(text_llm, "ab ba", params)[0].outputs[0]
        assert sample.text == whole.text[: whole.text.index(seam)]
        assert (sample.finish_reason, sample.stop_reason) == ("stop", seam)
        assert sample.token_ids == whole.token_ids[: len(sample.token_ids)]
    assert [o.outputs[0] for o in text_llm.stream("ab ba", params)][-1] == sample


def test_prompt_and_text_are_the_decode_of_the_whole(make_llm, llama_checkpoint) -> None:
    """With a tokenizer of Llama 2's kind, whose decoder strips the first space of a text."""
    llm = make_llm(llama_checkpoint)
    prompts = ["Once", "a b c d e f g h i j k l m n"]
    streamed = [list(llm.stream(prompt, GREEDY))[-1] for prompt in prompts]
    for outputs in (streamed, *(entry(llm, prompts, GREEDY) for entry in (generate, *BASELINES))):
        for prompt, output in zip(prompts, outputs, strict=True):
            whole = llm.tokenizer.decode([*output.prompt_token_ids, *output.outputs[0].token_ids])
            assert prompt + output.outputs[0].text == whole and output.outputs[0].text.startswith(" t")


def test_samples_of_one_request_differ_and_are_those_of_their_index(llm) -> None:
    params = SamplingParams(temperature=1.0, n=4, seed=11, max_tokens=8, ignore_eos=True)
    (output,) = generate(llm, [5, 6, 7], params)
    assert [sample.index for sample in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 4
    (fewer,) = generate(llm, [5, 6, 7], SamplingParams(temperature=1.0, n=2, seed=11, max_tokens=8, ignore_eos=True))
    assert fewer.outputs == output.outputs[:2]


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 3},
        {"max_num_seqs": 5, "enable_prefix_caching": False},
        {"max_num_seqs": 4, "max_num_batched_tokens": 6},
        {"max_num_seqs": 3, "num_blocks": 12, "block_size": 4},
        {"max_num_seqs": 4, "scheduling_policy": "prefill_first"},
        {"max_num_seqs": 4, "scheduling_policy": "static"},
        {"max_num_seqs": 3, "num_blocks": 12, "block_size": 4, "preemption_mode": "swap"},
        {"max_num_seqs": 3, "async_scheduling": True},
    ],
)
def test_samples_are_the_same_however_few_of_them_run_at_once(options, make_llm) -> None:
    params = SamplingParams(temperature=1.0, n=9, seed=11, max_tokens=8, ignore_eos=True)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 1]]
    few = make_llm(**options)
    together, crowded = (
        [[sample.token_ids for sample in output.outputs] for output in generate(llm, prompts, params)]
        for llm in (make_llm(max_num_seqs=32), few)
    )
    assert crowded == together and len({*map(tuple, crowded[0])}) == 9
    few.check_integrity()
    assert few.stats()["free_blocks"] == few.stats()["num_blocks"]


def test_another_request_is_served_while_one_of_many_samples_goes_on(make_llm) -> None:
    engine = make_llm(max_num_seqs=4).engine
    crowd = SamplingParams(n=16, max_tokens=200, ignore_eos=True)
    engine.add_request("crowd", [5, 6, 7], crowd)
    for number in range(5):
        engine.step()
        engine.add_request(str(number), [8, 9], SamplingParams(max_tokens=1))
        assert [output.request_id for output in engine.step().outputs] == [str(number)]
    assert engine.stats()["num_running"] == 3 and engine.stats()["num_waiting"] == 13
    engine.abort("crowd")


def test_each_prompt_may_have_its_own_parameters(llm) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 1, 7)]
    assert [len(t) for t in ids(generate(llm, [[5], [6], [7]], params))] == [3, 1, 7]


# -- logprobs -------------------------------------------------------------------------------------------------------


def check_logprobs(rows: list[TokenLogprobs], chosen: list[int], raw: torch.Tensor, num_top: int) -> None:
    """``raw`` [N, V]: transformers' log-probabilities at the N positions."""
    assert len(rows) == len(chosen) == len(raw)
    for row, token, expected in zip(rows, chosen, raw, strict=True):
        assert next(iter(row)) == token
        assert set(row) == {token, *expected.topk(num_top).indices.tolist()}
        for token_id, entry in row.items():
            own = expected[token_id].item()
            assert entry.logprob == pytest.approx(own, abs=1e-3)
            surely, perhaps = (int((expected > own + margin).sum()) for margin in (1e-3, -1e-3))
            assert 1 + surely <= entry.rank <= 1 + perhaps


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 7, "block_size": 3}, {"num_blocks": 15, "block_size": 4}],
    ids=["whole", "chunked", "preempted"],
)
def test_logprobs_are_those_of_transformers_forward(options, make_llm, transformers_model) -> None:
    llm = make_llm("llama2", **options)
    prompts = [[5 + 7 * i for i in range(n)] for n in (23, 1, 12, 18)]
    params = SamplingParams(
        temperature=0.7, top_k=20, seed=5, max_tokens=20, ignore_eos=True, logprobs=3, prompt_logprobs=2
    )
    outputs = generate(llm, prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        sample = output.outputs[0]
        with torch.inference_mode():
            raw = transformers_model("llama2")(torch.tensor([prompt + sample.token_ids])).logits[0].log_softmax(-1)
        check_logprobs(sample.logprobs, sample.token_ids, raw[len(prompt) - 1 : -1], 3)
        assert output.prompt_logprobs[0] is None
        check_logprobs(output.prompt_logprobs[1:], prompt[1:], raw[: len(prompt) - 1], 2)
        chosen = raw[len(prompt) - 1 : -1].gather(1, torch.tensor(sample.token_ids)[:, None]).sum().item()
        assert sample.cumulative_logprob == pytest.approx(chosen, abs=1e-2)
    assert (llm.stats()["preemptions"] > 0) == (options.get("num_blocks") == 15)


def test_a_long_prompts_logprobs_are_made_in_slices(make_llm, transformers_model) -> None:
    prompt = [3 + (37 * i) % 1000 for i in range(300)]  # more rows than one slice of logits holds
    (output,) = generate(make_llm(), prompt, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    with torch.inference_mode():
        raw = transformers_model("qwen3")(torch.tensor([prompt])).logits[0].log_softmax(-1)
    check_logprobs(output.prompt_logprobs[1:], prompt[1:], raw[:-1], 0)


def test_logprobs_name_their_tokens_text_and_are_none_where_not_asked_for(text_llm) -> None:
    asked, plain = generate(text_llm, ["ab", "ab"], [SamplingParams(logprobs=2, prompt_logprobs=1), SamplingParams()])
    for row in (*asked.outputs[0].logprobs, *asked.prompt_logprobs[1:]):
        assert all(entry.decoded_token == text_llm.tokenizer.token_text(t) for t, entry in row.items())
    sample = plain.outputs[0]
    assert sample.logprobs is sample.cumulative_logprob is plain.prompt_logprobs is None


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_baseline_gives_the_same_request_outputs(baseline, text_llm) -> None:
    prompts: list[Any] = ["ab ba cd", [7], "zz", [5] * 40]
    params = [
        SamplingParams(temperature=0.8, seed=1, n=2, max_tokens=9, logprobs=2, prompt_logprobs=1, stop=["e", "xq"]),
        SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=0, repetition_penalty=1.3),
        SamplingParams(temperature=1.1, seed=2, max_tokens=15, min_tokens=3, logprobs=0),
        SamplingParams(temperature=0, max_tokens=5, truncate_prompt_tokens=6, ignore_eos=True),
    ]
    for ours, theirs in zip(baseline(text_llm, prompts, params), generate(text_llm, prompts, params), strict=True):
        assert ours.finished and theirs.finished
        assert (ours.prompt, ours.prompt_token_ids) == (theirs.prompt, theirs.prompt_token_ids)
        for mine, other in zip(ours.outputs, theirs.outputs, strict=True):
            assert (mine.index, mine.token_ids, mine.text) == (other.index, other.token_ids, other.text)
            assert (mine.finish_reason, mine.stop_reason) == (other.finish_reason, other.stop_reason)
            assert (mine.cumulative_logprob is None) == (other.cumulative_logprob is None)
            same_logprobs(mine.logprobs, other.logprobs)
        same_logprobs(ours.prompt_logprobs, theirs.prompt_logprobs)
        check_metrics(ours)


def same_logprobs(ours: list[TokenLogprobs | None] | None, theirs: list[TokenLogprobs | None] | None) -> None:
    assert (ours is None) == (theirs is None)
    for mine, other in zip(ours or [], theirs or [], strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            assert list(mine) == list(other)
            assert [e.logprob for e in mine.values()] == pytest.approx([e.logprob for e in other.values()], abs=1e-3)
            assert [e[1:] for e in mine.values()] == [e[1:] for e in other.values()]


# -- metrics --------------------------------------------------------------------------------------------------------


def check_metrics(output: RequestOutput) -> None:
    metrics = output.metrics
    assert 0 < metrics.arrival_time_s <= metrics.first_token_time_s <= metrics.finished_time_s
    assert 0 <= metrics.ttft <= metrics.latency
    assert metrics.num_generation_tokens == sum(len(sample.token_ids) for sample in output.outputs)
    assert metrics.num_cached_tokens == 0
    assert (metrics.tpot is None) == (max(len(sample.token_ids) for sample in output.outputs) < 2)


def test_metrics_rise_and_count_preemptions(make_llm) -> None:
    llm = make_llm(num_blocks=12, block_size=4)
    outputs = generate(llm, [[5 + i] * 9 for i in range(4)], [LONG, LONG, GREEDY, SamplingParams(max_tokens=1)])
    for output in outputs:
        check_metrics(output)
    assert sum(o.metrics.num_preemptions for o in outputs) == llm.stats()["preemptions"] > 0
    assert outputs[0].metrics.num_preemptions == 0


def test_cached_prompt_tokens_are_counted_per_request_and_per_salt(llm) -> None:
    def cached(prompts: list[list[int]], **options: Any) -> list[int]:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False, **options)
        return [output.metrics.num_cached_tokens for output in outputs]

    story = list(range(5, 45))
    assert cached([story, [*story[:33], 9], story]) == [0, 32, 32]
    assert cached([story], cache_salt="mine") == [0]
    assert cached([story], cache_salt="mine") == cached([story]) == [32]
    assert llm.stats()["prefix_hit_tokens"] == 4 * 32
    with pytest.raises(ValueError, match="cache_salt=7: must be a str or None"):
        cached([story], cache_salt=7)


def test_a_trace_is_kept_where_it_is_asked_for(make_llm, llm, tmp_path) -> None:
    assert llm.trace is None
    llm = make_llm(trace=True)
    generate(llm, [[5] * 20, [6] * 3], GREEDY)
    steps = llm.trace.steps
    assert [step.num_running for step in steps] == [2] * 5
    assert [list(step.scheduled.values()) for step in steps] == [[20, 3], *[[1, 1]] * 4]
    assert all(step.began_s < step.ended_s for step in steps)
    assert llm.trace.replay(2).pool.num_used == 2 + 1
    llm.trace.to_perfetto(tmp_path / "trace.json")
    assert (tmp_path / "trace.json").stat().st_size > 0


@pytest.mark.parametrize(
    "policy",
    ["static", "dynamic", "prefill_first", Chunked()],
    ids=lambda policy: policy if isinstance(policy, str) else "own",
)
def test_requests_that_arrive_while_others_run_are_served_by_every_policy(policy, make_llm) -> None:
    llm = make_llm(scheduling_policy=policy)
    want = [ids(generate(llm, p, LONG))[0] for p in ([5, 6], [7])]
    stream = llm.stream([5, 6], LONG)
    next(stream)
    assert ids(generate(llm, [[7]], LONG)) == want[1:]
    assert ids([list(stream)[-1]]) == want[:1]
    assert llm.stats()["free_blocks"] == llm.stats()["num_blocks"]


# -- streams, failures and aborts -----------------------------------------------------------------------------------


def test_a_stream_yields_the_output_so_far_and_ends_as_generate_does(text_llm) -> None:
    params = SamplingParams(temperature=0.9, seed=2, max_tokens=25, ignore_eos=True, stop=["\x01"], logprobs=1)
    outputs = list(text_llm.stream("ab ba", params))
    assert [len(o.outputs[0].token_ids) for o in outputs] == list(range(1, 26))
    assert [o.finished for o in outputs] == [False] * 24 + [True]
    for before, after in itertools.pairwise(outputs):
        assert after.outputs[0].text.startswith(before.outputs[0].text)
        assert len(before.outputs[0].logprobs) == len(before.outputs[0].token_ids)  # not changed afterwards
    assert outputs[-1].outputs == generate(text_llm, "ab ba", params)[0].outputs


def test_a_stream_and_generate_may_be_under_way_together(llm) -> None:
    want = [ids(generate(llm, p, LONG))[0] for p in ([5, 6], [7], [8, 9, 10])]
    first, second = llm.stream([5, 6], LONG), llm.stream([7], LONG)
    next(first), next(first), next(second)
    assert ids(generate(llm, [[8, 9, 10]], LONG)) == want[2:]
    assert [ids([list(stream)[-1]])[0] for stream in (second, first)] == [want[1], want[0]]


def test_an_id_that_somebody_else_uses_costs_them_nothing(llm) -> None:
    llm.engine.add_request("0", [5, 6], SamplingParams(max_tokens=3))
    with pytest.raises(ValueError, match="request_id='0' is already being served"):
        llm.generate([[7]], use_tqdm=False)
    assert llm.engine.has_unfinished_requests
    llm.generate([[7]], use_tqdm=False)
    assert not llm.engine.has_unfinished_requests


def test_closing_a_stream_aborts_it(llm) -> None:
    stream = llm.stream([5, 6], LONG)
    next(stream)
    assert llm.stats()["num_running"] == 1
    stream.close()
    assert llm.stats()["num_running"] == 0 and llm.stats()["free_blocks"] == llm.stats()["num_blocks"]


def test_a_stream_that_is_forgotten_or_never_begun_holds_nothing(llm) -> None:
    llm.stream([5, 6], LONG)
    for _ in llm.stream([5, 6], LONG):
        break
    gc.collect()
    assert not llm.engine.has_unfinished_requests


def test_a_stream_that_is_aborted_elsewhere_ends(llm) -> None:
    outputs = []
    for output in llm.stream([5, 6], LONG):
        outputs.append(output)
        if len(outputs) == 3:
            llm.engine.abort(output.request_id)
    assert len(outputs) == 3


@pytest.mark.parametrize("error", [RuntimeError("device lost"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("fails_at", [1, 3, 7])
def test_a_failing_step_leaves_no_blocks_held_and_the_llm_usable(error, fails_at, make_llm, monkeypatch) -> None:
    llm = make_llm(max_num_batched_tokens=7)
    prompts = [[5] * 12, [6], [7] * 9]
    want = ids(generate(llm, prompts, GREEDY))
    launch, calls = llm.engine.executor.runner.launch, []

    def failing(step: Any) -> Any:
        calls.append(step)
        if len(calls) == fails_at:
            raise error
        return launch(step)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.executor.runner, "launch", failing)
        with pytest.raises(type(error)):
            generate(llm, prompts, GREEDY)
    assert llm.stats()["free_blocks"] == llm.stats()["num_blocks"] and not llm.engine.has_unfinished_requests
    llm.check_integrity()
    assert ids(generate(llm, prompts, GREEDY)) == want


def test_a_stream_survives_a_step_that_fails_in_somebody_elses_call(make_llm, monkeypatch) -> None:
    llm = make_llm()
    want = ids(generate(llm, [5, 6], LONG))[0]
    stream = llm.stream([5, 6], LONG)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.executor.runner, "launch", lambda step: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            generate(llm, [[7]], LONG)
    assert ids([list(stream)[-1]])[0] == want


def test_logits_that_are_nan_are_an_error_and_not_a_token(make_llm) -> None:
    llm = make_llm()
    llm.engine.decoder.final_norm.weight[0] = math.nan
    for rung in (generate, *BASELINES):
        (output,) = rung(llm, [[5, 6]], GREEDY)
        assert output.finished and output.outputs[0].finish_reason == "error"
        assert "NaN" in output.outputs[0].error and output.outputs[0].token_ids == []
    assert llm.stats()["free_blocks"] == llm.stats()["num_blocks"]


# -- what small engines get wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rung", [generate, *BASELINES])
def test_identical_prompts_in_one_batch_say_the_same(rung: Callable[..., Any], llm) -> None:
    outputs = rung(llm, [[5, 6, 7, 8] * 4] * 6, GREEDY)
    assert len({tuple(t) for t in ids(outputs)}) == 1


def test_no_more_than_max_num_seqs_ever_run(make_llm, monkeypatch) -> None:
    llm = make_llm(max_num_seqs=4)
    launch, running = llm.engine.executor.runner.launch, []

    def counting(step: Any) -> Any:
        running.append(llm.stats()["num_running"])
        return launch(step)

    monkeypatch.setattr(llm.engine.executor.runner, "launch", counting)
    generate(llm, [[5 + i] for i in range(20)], GREEDY)
    assert max(running) == 4


def test_one_long_request_after_another_reuses_blocks_without_a_trace(make_llm) -> None:
    """What an earlier owner left in a block never reaches a later one."""
    llm = make_llm(num_blocks=4, block_size=16)
    want = ids(generate(llm, [9, 8, 7], LONG))
    for seed in range(3):
        generate(llm, [3 + seed] * 40, SamplingParams(temperature=1.0, seed=seed, max_tokens=20))
        for keys in (*llm.engine.executor.runner.cache.keys, *llm.engine.executor.runner.cache.values):
            keys[:-1] = math.nan  # worse than anything a request leaves
        assert ids(generate(llm, [9, 8, 7], LONG)) == want


def test_chat_answers_one_conversation_or_several(text_llm) -> None:
    one = [{"role": "user", "content": "ab"}]
    other = [{"role": "user", "content": "cd"}, {"role": "assistant", "content": "e"}, {"role": "user", "content": "f"}]
    (alone,) = text_llm.chat(one, GREEDY, use_tqdm=False)
    both = text_llm.chat([one, other], GREEDY, use_tqdm=False)
    assert both[0].outputs == alone.outputs and len(both) == 2
    assert alone.prompt_token_ids == text_llm.tokenizer.encode("<|turn|>user ab<|turn|>")
    with pytest.raises(ValueError, match="'wizard'"):
        text_llm.chat([{"role": "wizard", "content": "x"}])


def test_chat_passes_tools_and_variables_to_the_template(text_llm, monkeypatch) -> None:
    ask, tools = [{"role": "user", "content": "ab"}], [{"type": "function", "function": {"name": "cd"}}]
    with pytest.raises(ValueError, match=r"tools\[0\]: the chat template has no place for tools"):
        text_llm.chat(ask, GREEDY, tools=tools)
    with pytest.raises(ValueError, match="the chat template has no variable 'ending'"):
        text_llm.chat(ask, GREEDY, chat_template_kwargs={"ending": "ef"})
    template = "{% for t in tools %}{{ t.function.name }}{% endfor %}{{ messages[0].content }}{{ ending }}"
    monkeypatch.setattr(text_llm.tokenizer._hf, "chat_template", template)
    (output,) = text_llm.chat(ask, GREEDY, use_tqdm=False, tools=tools, chat_template_kwargs={"ending": "ef"})
    assert text_llm.tokenizer.decode(output.prompt_token_ids) == "cdabef"


def test_chat_takes_contents_in_parts(text_llm) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    in_parts, at_once = (
        text_llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)[0] for content in (parts, "a\nb")
    )
    assert in_parts.outputs == at_once.outputs
    with pytest.raises(ValueError, match=r"content of type image_url is not supported"):
        text_llm.chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
