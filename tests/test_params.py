"""Sampling parameters: what is accepted, how it is kept, and the one clear error for what is not."""

from __future__ import annotations

import dataclasses
import math
import pickle
import subprocess
import sys
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from paged_infer.control.step import SamplingRow
from paged_infer.params import BeamSearchParams, SamplingParams

NAN, INF, HUGE = math.nan, math.inf, 10**400

# (parameter, bad value, the limit as the message must give it)
OUT_OF_RANGE: list[tuple[str, Any, str]] = [
    ("n", 0, ">= 1"),
    ("n", 1.0, "integer"),
    ("n", True, "integer"),
    ("temperature", -0.1, ">= 0"),
    ("temperature", NAN, ">= 0"),
    ("temperature", INF, "finite"),
    ("temperature", HUGE, "finite"),
    ("temperature", "1", "number"),
    ("temperature", None, "number"),
    ("temperature", True, "number"),
    ("top_k", -2, ">= -1"),
    ("top_k", 5.0, "integer"),
    ("top_p", 0.0, "> 0 and <= 1"),
    ("top_p", -0.5, "> 0 and <= 1"),
    ("top_p", 1.01, "> 0 and <= 1"),
    ("top_p", NAN, "> 0 and <= 1"),
    ("min_p", -0.01, ">= 0 and <= 1"),
    ("min_p", 1.5, ">= 0 and <= 1"),
    ("repetition_penalty", 0.0, "> 0"),
    ("repetition_penalty", -1.0, "> 0"),
    ("repetition_penalty", INF, "finite"),
    ("presence_penalty", 2.1, ">= -2 and <= 2"),
    ("presence_penalty", -2.1, ">= -2 and <= 2"),
    ("frequency_penalty", 2.1, ">= -2 and <= 2"),
    ("frequency_penalty", NAN, ">= -2 and <= 2"),
    ("seed", 2**63, str(2**63 - 1)),
    ("seed", -(2**63) - 1, str(-(2**63))),
    ("seed", 1.5, "integer"),
    ("max_tokens", 0, ">= 1"),
    ("max_tokens", -1, ">= 1"),
    ("max_tokens", 2.5, "integer"),
    ("min_tokens", -1, "within [0, 16]"),
    ("min_tokens", 17, "within [0, 16]"),
    ("stop", 5, "sequence"),
    ("stop_token_ids", 5, "sequence"),
    ("logit_bias", [(1, 2.0)], "map"),
    ("logprobs", -1, ">= 0"),
    ("logprobs", True, "integer"),
    ("prompt_logprobs", -1, ">= 0"),
    ("truncate_prompt_tokens", 0, ">= 1"),
    ("truncate_prompt_tokens", -2, ">= -1"),
    ("truncate_prompt_tokens", -1.0, "integer"),
    ("temperature", np.float32("nan"), ">= 0"),
    ("temperature", np.float64("inf"), "finite"),
    ("temperature", np.bool_(True), "number"),
    ("temperature", torch.tensor(True), "number"),
    ("temperature", torch.tensor([0.5]), "number"),
    ("temperature", np.complex64(1), "number"),
    ("max_tokens", np.int64(0), ">= 1"),
    ("max_tokens", np.float64(3), "integer"),
    ("max_tokens", np.array([3]), "integer"),
    ("max_tokens", np.bool_(True), "integer"),
    ("stop_token_ids", np.array(5), "sequence"),
    ("stop_token_ids", torch.tensor(5), "sequence"),
    ("ignore_eos", 1, "True or False"),
    ("ignore_eos", "false", "True or False"),
    ("logit_bias", [], "map"),
]


@pytest.mark.parametrize(("name", "value", "limit"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_an_error_that_names_value_and_limit(name: str, value: Any, limit: str) -> None:
    with pytest.raises(ValueError) as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    assert f"{name}={value!r}" in message
    assert limit in message


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"stop": ""}, "stop=''"),
        ({"stop": ["ok", ""]}, "stop=''"),
        ({"stop": ["ok", 3]}, "stop=3"),
        ({"stop_token_ids": [1, -1]}, "-1"),
        ({"stop_token_ids": [1, 2.0]}, "2.0"),
        ({"stop_token_ids": "12"}, "'1'"),
        ({"stop_token_ids": np.array([1.0])}, "1.0"),
        ({"stop_token_ids": [np.bool_(True)]}, "True"),
        ({"stop_token_ids": torch.tensor([[1, 2]])}, "[1, 2]"),
        ({"logit_bias": {np.float64(7): 1.0}}, "7.0"),
        ({"logit_bias": {7: np.float32("nan")}}, "logit_bias[7]=np.float32(nan)"),
        ({"logit_bias": {-3: 1.0}}, "-3"),
        ({"logit_bias": {"7": 1.0}}, "'7'"),
        ({"logit_bias": {7: 100.5}}, "logit_bias[7]=100.5"),
        ({"logit_bias": {7: NAN}}, "logit_bias[7]=nan"),
        ({"logit_bias": {7: "a"}}, "logit_bias[7]='a'"),
        ({"n": 2, "temperature": 0}, "n=2 with temperature=0"),
    ],
)
def test_a_bad_member_is_named(options: Mapping[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as error:
        SamplingParams(**options)
    assert named in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1e-300},
        {"temperature": sys.float_info.max},
        {"top_k": -1},
        {"top_k": 0},
        {"top_k": 10**30},
        {"top_p": 1e-12},
        {"top_p": 1},
        {"min_p": 1.0},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"max_tokens": None, "min_tokens": 10**6},
        {"max_tokens": 4, "min_tokens": 4},
        {"logprobs": 0, "prompt_logprobs": 0},
        {"truncate_prompt_tokens": -1},
        {"truncate_prompt_tokens": 1},
        {"logit_bias": {0: -100, 1: 100}},
        {"stop": None, "stop_token_ids": None, "logit_bias": None},
    ],
)
def test_the_limits_themselves_are_accepted(options: Mapping[str, Any]) -> None:
    SamplingParams(**options)


def test_numbers_of_numpy_and_torch_are_taken_and_kept_as_pythons_own() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int16(5),
        top_p=torch.tensor(0.5),
        min_p=np.longdouble(0.25),
        repetition_penalty=np.array(2.0),
        presence_penalty=Fraction(1, 2),
        frequency_penalty=np.int64(1),
        logit_bias={np.int64(3): np.float32(0.5), 4: torch.tensor(2)},
        seed=np.uint32(9),
        max_tokens=np.int64(3),
        min_tokens=torch.tensor(2),
        stop=np.array(["a", "b"]),
        stop_token_ids=np.array([7, 8, 7], dtype=np.uint16),
        ignore_eos=np.bool_(True),
        logprobs=np.int8(2),
        truncate_prompt_tokens=torch.tensor(4),
    )
    same = SamplingParams(
        temperature=0.5,
        top_k=5,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=1,
        logit_bias={3: 0.5, 4: 2},
        seed=9,
        max_tokens=3,
        min_tokens=2,
        stop=("a", "b"),
        stop_token_ids=(7, 8),
        ignore_eos=True,
        logprobs=2,
        truncate_prompt_tokens=4,
    )
    assert params == same and repr(params) == repr(same) and pickle.dumps(params) == pickle.dumps(same)


@pytest.mark.parametrize("token_ids", [[np.int64(7), 8], torch.tensor([7, 8]), range(7, 9)])
def test_a_beam_searchs_numbers_are_kept_as_pythons_own(token_ids) -> None:
    params = BeamSearchParams(
        beam_width=np.int64(2),
        max_tokens=torch.tensor(5),
        length_penalty=np.float32(0.5),
        early_stopping=np.bool_(True),
        min_tokens=np.int64(1),
        stop_token_ids=token_ids,
        ignore_eos=np.bool_(False),
    )
    same = BeamSearchParams(2, 5, 0.5, True, 1, (7, 8), False)
    assert params == same and repr(params) == repr(same)


@pytest.mark.parametrize("value", [np.array([True, False]), "sometimes", 1, None])
def test_when_a_beam_search_stops_early_is_one_of_three(value) -> None:
    with pytest.raises(ValueError, match=r"early_stopping=.*: must be True, False or 'never'"):
        BeamSearchParams(2, 5, early_stopping=value)


def test_a_seed_of_minus_one_is_none_as_in_vllm() -> None:
    assert SamplingParams(seed=-1) == SamplingParams(seed=np.int64(-1)) == SamplingParams()
    assert SamplingParams(seed=-2).seed == -2


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_k, params.top_p, params.min_p) == (1, 1.0, 0, 1.0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.ignore_eos) == (16, 0, None, False)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (params.logprobs, params.prompt_logprobs, params.truncate_prompt_tokens) == (None, None, None)
    assert (params.stop, params.stop_token_ids, params.logit_bias) == ((), (), {})


def test_an_unknown_name_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_a_lone_stop_string_is_one_stop_string() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_what_the_caller_changes_later_does_not_reach_the_params() -> None:
    stops, bias = [3, 4], {5: 1.0}
    params = SamplingParams(stop_token_ids=stops, logit_bias=bias)
    stops.append(9)
    bias[9] = 9.0
    assert params.stop_token_ids == (3, 4)
    assert params.logit_bias == {5: 1.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]


def test_greedy_means_temperature_zero_and_penalties_need_the_past() -> None:
    assert SamplingParams(temperature=0.0).is_greedy
    assert not SamplingParams(temperature=1e-9).is_greedy
    assert not SamplingParams().has_penalties
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert SamplingParams(**{name: 0.5}).has_penalties  # type: ignore[arg-type]


def test_params_and_rows_survive_pickling_and_replacing() -> None:
    params = SamplingParams(stop="x", logit_bias={1: 2.0}, stop_token_ids=[7], seed=-2)
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, seed=4).stop == ("x",)
    row = SamplingRow(params=params, seed=-1, sample_index=0, position=3, num_output_tokens=1, end_token_ids=(2,))
    assert pickle.loads(pickle.dumps(row)) == row


def test_params_import_no_torch() -> None:
    code = "import sys, paged_infer.params; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
