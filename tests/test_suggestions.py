"""Unknown names and wrong values: the error names what was given, what may be meant, and what is allowed."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paged_infer import LLM, AsyncLLM, BeamSearchParams, SamplingParams, StructuredOutputsParams
from paged_infer.baselines import generate_naive
from paged_infer.config import ASYNC_OPTIONS, EngineConfig
from paged_infer.control.policies import Chunked
from paged_infer.control.speculation import SpeculativeConfig
from paged_infer.engine.prompts import plain_prompt
from paged_infer.kernels import paged_attention_reference
from paged_infer.kernels.device import device_of
from paged_infer.suggestions import OTHER_NAMES, PLACES, suggestion

OPTIONS = [field.name for field in dataclasses.fields(EngineConfig)]
PARAMS = [field.name for kind in (SamplingParams, BeamSearchParams) for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(
    ("name", "meant"),
    [("max_num_seq", "max_num_seqs"), ("max_seq_len", "max_model_len"), ("Block-Size", "block_size"),
     ("torch_dtype", "dtype"), ("attention", "attention_backend")],
)  # fmt: skip
def test_an_unknown_option_is_refused_with_the_one_that_may_be_meant(name: str, meant: str) -> None:
    for kind in (LLM, AsyncLLM):
        with pytest.raises(TypeError) as error:
            kind(**{name: 4})
        assert f"unknown option {name} (did you mean {meant}?); known: " in str(error.value)


def test_an_async_llm_also_suggests_options_of_its_own() -> None:
    with pytest.raises(TypeError, match=r"max_num_waitin \(did you mean max_num_waiting\?\)"):
        AsyncLLM(max_num_waitin=4)


Call = Callable[..., Any]
ELSEWHERE: list[tuple[Call, str, str]] = [
    (LLM, "temperature", "unknown option temperature (belongs to SamplingParams); known: dtype, "),
    (LLM, "temp", "unknown option temp (did you mean temperature of SamplingParams?); known: dtype, "),
    (LLM, "num_speculative_tokens", "num_speculative_tokens (belongs to speculative_config)"),
    (LLM, "data_parallel_size", "data_parallel_size (belongs to AsyncLLM())"),
    (LLM, "tools", "tools (belongs to LLM.chat())"),
    (plain_prompt, "role", "role (belongs to LLM.chat())"),
    (AsyncLLM, "max_tokens", "max_tokens (belongs to SamplingParams or BeamSearchParams)"),
    (SamplingParams, "num_beams", "num_beams (did you mean beam_width of BeamSearchParams?)"),
    (SamplingParams, "max_model_len", "max_model_len (belongs to LLM())"),
    (SamplingParams, "regex", "regex (belongs to StructuredOutputsParams)"),
    (SamplingParams, "priority", "priority (belongs to LLM.generate())"),
    (BeamSearchParams, "temperature", "temperature (belongs to SamplingParams)"),
    (LLM.generate, "top_p", "LLM.generate: unknown parameter top_p (belongs to SamplingParams); known: prompts, "),
    (LLM.generate, "num_beams", "num_beams (did you mean beam_width of BeamSearchParams?)"),
    (LLM.generate, "stream", "stream (belongs to LLM.stream())"),
    (LLM.generate, "params", "params (did you mean sampling_params?)"),
    (LLM.chat, "temperature", "LLM.chat: unknown parameter temperature (belongs to SamplingParams)"),
    (LLM.stream, "cache_salt", "cache_salt (belongs to LLM.generate())"),
    (LLM.beam_search, "beam_width", "beam_width (belongs to BeamSearchParams)"),
    (AsyncLLM.generate, "sampling_params", "sampling_params (did you mean params?)"),
    (
        generate_naive,
        "max_new_tokens",
        "max_new_tokens (did you mean max_tokens of SamplingParams or BeamSearchParams?)",
    ),
    (plain_prompt, "seed", "seed (belongs to SamplingParams or LLM())"),
]


@pytest.mark.parametrize(("call", "name", "message"), ELSEWHERE)
def test_a_name_that_belongs_elsewhere_is_refused_with_where(call: Call, name: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        call({name: 4}) if call is plain_prompt else call(**{name: 4})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("option", "value", "meant"),
    [("dtype", "half", "float16"), ("dtype", "fp16", "float16"), ("dtype", "bf16", "bfloat16"),
     ("dtype", "float", "float32"), ("dtype", "Float32", "float32"), ("kv_cache_dtype", "fp8_e4m3", "fp8"),
     ("preemption_mode", "recomputed", "recompute")],
)  # fmt: skip
def test_an_unknown_value_is_refused_with_the_one_that_may_be_meant(option: str, value: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"^{option}={value!r}: must be one of .*, .* \\(did you mean {meant}\\?\\)$"):
        EngineConfig(**{option: value})


@pytest.mark.parametrize(("option", "value"), [("dtype", "int8"), ("kv_cache_dtype", "int4"), ("dtype", 16)])
def test_a_value_that_is_like_none_is_refused_without_a_guess(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{option}={value!r}: must be one of auto, [a-z0-9_, ]*$"):
        EngineConfig(**{option: value})


def test_every_option_of_an_async_llm_is_one_that_an_llm_names() -> None:
    own = {*inspect.signature(AsyncLLM).parameters} - {"model", *OPTIONS}
    assert own == {*ASYNC_OPTIONS}


def test_a_parameter_without_its_name_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^SamplingParams: parameters are given by name, as in n=\.\.\., not 0\.8$"):
        SamplingParams(0.8)  # type: ignore[misc]
    assert BeamSearchParams(4, 9) == BeamSearchParams(beam_width=4, max_tokens=9)


def test_a_call_that_checks_its_keywords_keeps_its_signature_and_what_python_refuses() -> None:
    assert [*inspect.signature(LLM.generate).parameters][:3] == ["self", "prompts", "sampling_params"]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'prompt'"):
        LLM.stream(object())  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize(
    ("kind", "name", "meant"),
    [(SamplingParams, "temp", "temperature"), (SamplingParams, "max_new_tokens", "max_tokens"),
     (SamplingParams, "best_of", "n"), (SamplingParams, "stop_token_id", "stop_token_ids"),
     (EngineConfig, "max_num_seq", "max_num_seqs"), (SpeculativeConfig, "num_spec_tokens", "num_speculative_tokens"),
     (BeamSearchParams, "num_beams", "beam_width"), (StructuredOutputsParams, "regexp", "regex")],
)  # fmt: skip
def test_an_unknown_parameter_is_refused_with_the_one_that_may_be_meant(kind: type, name: str, meant: str) -> None:
    with pytest.raises(TypeError) as error:
        kind(**{name: 1})
    start = f"{kind.__name__}: unknown parameter {name} (did you mean {meant}?); known: "
    assert str(error.value).startswith(start)


def test_parameters_keep_their_signature_and_are_pickled_and_replaced_as_before() -> None:
    assert "temperature: 'float' = 1.0" in str(inspect.signature(SamplingParams))
    params = dataclasses.replace(SamplingParams(n=2), max_tokens=3)
    assert pickle.loads(pickle.dumps(params)) == params == SamplingParams(n=2, max_tokens=3)


def test_each_name_of_another_library_leads_to_one_of_ours() -> None:
    for name, ours in OTHER_NAMES.items():
        assert name not in (*OPTIONS, *PARAMS) and {*ours} <= {*OPTIONS, *PARAMS, "logits_processors"}, name
    assert suggestion("frobnicate", OPTIONS, PLACES) is None


@pytest.mark.parametrize("model", [5, ["storyteller"], "", 2.5])
def test_a_model_that_is_no_name_is_refused(model: object) -> None:
    with pytest.raises(ValueError) as error:
        LLM(model)  # type: ignore[arg-type]
    assert f"model={model!r}: must be a folder, a GGUF file, a hub id (owner/name), or one of story" in str(error.value)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("gpu_memory_utilization", "a", "must be a finite number > 0 and <= 1"),
        ("device", None, "must be a str: auto, cpu, cuda"),
        ("device", 3, "must be a str: auto, cpu, cuda"),
        ("dtype", 16, "must be one of auto, float32, bfloat16, float16"),
        ("preemption_mode", np.array(["swap", "x"]), "must be one of recompute, swap"),
        ("scheduling_policy", Chunked, "and this is its class: pass Chunked()"),
        ("scheduling_policy", np.array(["static", "x"]), "must be a Policy or one of chunked"),
        ("attention_backend", 3, "must be the name of a backend, or module:function"),
        ("attention_backend", paged_attention_reference, "@register_attention_backend(NAME) gives it one"),
        ("speculative_config", "ngram", "must be a dict"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused_with_what_is_allowed(option: str, value: object, allowed: str) -> None:
    with pytest.raises(ValueError) as error:
        EngineConfig(**{option: value})
    assert str(error.value).startswith(f"{option}={value!r}: ") and allowed in str(error.value)


def test_an_unknown_device_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="device='gpu': did you mean cuda\\? must be auto, cpu, cuda, or cuda:N"):
        device_of("gpu")
    with pytest.raises(ValueError, match="device='cpuu': must be auto, cpu, cuda, or cuda:N"):
        device_of("cpuu")
    with pytest.raises(ValueError, match="device='mps': must be auto, cpu, cuda, or cuda:N"):
        device_of("mps")  # which torch knows, and nothing here runs on
    assert EngineConfig(device=torch.device("cpu"), dtype=torch.float16) == EngineConfig(device="cpu", dtype="float16")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "eagle"}, "speculative_config: method='eagle': must be one of ngram, draft_model"),
        ({"method": "ngram"}, "num_speculative_tokens missing"),
        ({"method": "ngram", "num_spec_tokens": 2}, r"num_spec_tokens \(did you mean num_speculative_tokens\?\)"),
    ],
)
def test_a_speculative_config_is_refused_for_its_method_first(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(speculative_config=given)


INTEGERS = {
    EngineConfig: ["block_size", "num_blocks", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "seed",
                   "tensor_parallel_size"],
    SamplingParams: ["n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs",
                     "truncate_prompt_tokens"],
    BeamSearchParams: ["beam_width", "max_tokens", "min_tokens"],
}  # fmt: skip


@pytest.mark.parametrize("integer", [np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.int16)])
def test_integers_of_numpy_and_torch_are_kept_as_int(integer: object) -> None:
    needed = {BeamSearchParams: {"beam_width": 4, "max_tokens": 9}}
    for kind, names in INTEGERS.items():
        for name in names:
            value = getattr(kind(**{**needed.get(kind, {}), name: integer}), name)
            assert (type(value), value) == (int, 3), (kind, name)
    speculative = {"method": "ngram", "num_speculative_tokens": integer, "prompt_lookup_max": integer}
    assert EngineConfig(speculative_config=speculative).speculation == EngineConfig(
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    ).speculation  # fmt: skip


def test_a_folder_may_be_a_path_or_its_name() -> None:
    for folder in (Path("nowhere/at/all"), "nowhere/at/all"):
        with pytest.raises(ValueError, match=r"model 'nowhere/at/all' is neither a folder"):
            LLM(folder)


def test_one_message_that_is_no_list_is_refused_before_anything_is_looked_up() -> None:
    with pytest.raises(ValueError, match=r"messages=\{'role': 'user', 'content': 'x'\}: must be a list of such dicts"):
        LLM.chat(object(), {"role": "user", "content": "x"})  # type: ignore[arg-type]


def test_a_pool_that_the_machine_has_no_room_for_is_refused_with_its_size() -> None:
    with pytest.raises(
        ValueError,
        match=r"KV pool with [\d,.]+ GiB in each tensor does not fit this machine: lower num_blocks or block_size",
    ):
        LLM(num_blocks=10**12)
