"""Each key of a ``quantization_config`` is read, or refused by its name."""

from __future__ import annotations

import json
from itertools import permutations
from typing import Any

import pytest
import torch
from compressed_tensors.utils.match import match_targets
from transformers import AwqConfig, FineGrainedFP8Config, GPTQConfig, Mxfp4Config
from transformers.quantizers.quantizers_utils import should_convert_module

from paged_infer.model.quantization_config import read_quantization

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True, "damp_percent": 0.01}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "GEMM"}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def compressed(weights: Any = INT4, *, form: str = "pack-quantized", top: Any = (), **group: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, **group}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": []} | dict(top)


def stored(raw: dict[str, Any], module: str = "model.layers.0.mlp.up_proj") -> Any:
    config = read_quantization(raw)
    assert config is not None
    return config.of(module)


def test_a_model_without_one_has_none() -> None:
    assert read_quantization(None) is None


@pytest.mark.parametrize("raw", [compressed(), GPTQ, AWQ, FP8, {"quant_method": "mxfp4"}])
def test_known_methods_are_read(raw) -> None:
    assert stored(raw).bits == (8 if raw is FP8 else 4)


def test_gptq_v1_stores_zero_points_less_one() -> None:
    assert stored(GPTQ).zero_offset == 1 and stored({**GPTQ, "checkpoint_format": "gptq_v2"}).zero_offset == 0
    assert stored({**GPTQ, "group_size": -1}).group_size is None


def test_names_and_patterns_choose_the_layers() -> None:
    raw = compressed(top={"ignore": ["re:.*down_proj", "model.layers.1.mlp.up_proj"]})
    assert stored(raw) is not None and stored(raw, "model.layers.10.mlp.up_proj") is not None
    assert stored(raw, "model.layers.0.mlp.down_proj") is stored(raw, "model.layers.1.mlp.up_proj") is None
    several = compressed()
    several["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.*"]
    several["config_groups"]["group_1"] = {"targets": ["Linear"], "weights": {**INT4, "num_bits": 8}}
    assert (stored(several).bits, stored(several, "model.layers.0.self_attn.q_proj").bits) == (8, 4)
    named = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    assert stored(named, "model.layers.3.self_attn.q_proj") is stored(named, "lm_head") is None
    parts = {**GPTQ, "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]}
    assert stored(parts) is not None and stored(parts, "model.layers.0.mlp.gate_proj") is None


def test_of_several_targets_the_one_that_compressed_tensors_takes_counts() -> None:
    """A name before a pattern, and a pattern before Linear, in whatever order the groups are."""
    bits = {"Linear": 4, "re:.*up_proj": 3, "re:.*mlp.*": 5, "model.layers.0.mlp.up_proj": 6}
    for order in permutations(bits):
        raw = compressed()
        raw["config_groups"] = {
            f"group_{i}": {"targets": [target], "weights": {**INT4, "num_bits": bits[target]}}
            for i, target in enumerate(order)
        }
        for name in ("0.mlp.up_proj", "1.mlp.up_proj", "1.mlp.down_proj", "1.self_attn.q_proj"):
            first = match_targets(f"model.layers.{name}", torch.nn.Linear(1, 1), bits)[0]
            assert stored(raw, f"model.layers.{name}").bits == bits[first]
    again = compressed()
    again["config_groups"]["group_1"] = {"targets": ["Linear"], "weights": {**INT4, "num_bits": 8}}
    assert stored(again).bits == 8  # the last group of a target


@pytest.mark.parametrize("raw", [FP8, {"quant_method": "mxfp4"}], ids=["fp8", "mxfp4"])
def test_layers_that_stay_floats_are_those_of_transformers(raw) -> None:
    """``mlp.gate`` is a router, and no part of ``mlp.gate_proj``; layer 1 is not layer 11."""
    patterns = "lm_head mlp.gate model.layers.1 model.layers.*.self_attn q_proj model.layers.1. a|model.layers.3.mlp"
    names = [f"model.layers.{i}.{n}" for i in (1, 3, 11) for n in ("mlp.gate", "mlp.gate_proj", "self_attn.q_proj")]
    for pattern in patterns.split():
        for name in (*names, "lm_head"):
            own = stored({**raw, "modules_to_not_convert": [pattern]}, name)
            assert (own is not None) == should_convert_module(name, [pattern]), (pattern, name)


@pytest.mark.parametrize(
    "config",
    [AwqConfig(), GPTQConfig(4), GPTQConfig(8, desc_act=True), FineGrainedFP8Config(), Mxfp4Config()],
    ids=["awq", "gptq", "gptq-8", "fp8", "mxfp4"],
)
def test_the_sections_that_transformers_writes_are_read(config) -> None:
    assert stored(json.loads(config.to_json_string(use_diff=False))) is not None


def test_without_a_strategy_the_group_size_decides() -> None:
    """As in compressed-tensors' ``QuantizationArgs``."""
    one = {key: value for key, value in INT4.items() if key != "strategy"}
    found = [stored(compressed({**one, "group_size": size})) for size in (32, -1, None)]
    assert [(own.group_size, own.per_tensor) for own in found] == [(32, False), (None, False), (None, True)]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("int8", "quantization_config='int8': must be an object"),
        ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes': must be one of compressed-tensors, awq"),
        (compressed(form="marlin-24"), "group_0 format='marlin-24': must be one of pack-quantized"),
        (compressed(form="float-quantized"), "format='float-quantized' with weights of type 'int'"),
        (compressed({**INT4, "num_bits": 9}), "num_bits=9"),
        (compressed({**INT4, "num_bits": 1}), "weights num_bits=1: must be 2 to 8"),
        (compressed({**INT4, "strategy": "tensor_group"}), "strategy='tensor_group': must be one of"),
        (compressed({**INT4, "group_size": None}), "strategy='group' lacks group_size"),
        (compressed({**INT4, "dynamic": True}), "weights dynamic=True is not supported"),
        (compressed({**INT4, "colour": 3}), "weights colour=3 is not supported"),
        (compressed(input_activations={**TOKEN, "dynamic": False}), "dynamic=False: static scales are not supported"),
        (compressed(input_activations={**TOKEN, "strategy": "tensor"}), "strategy='tensor': must be one of token"),
        (compressed(input_activations={**TOKEN, "strategy": None}), "activations strategy=None: must be one of token"),
        (compressed({**INT4, "strategy": "channel"}), "weights group_size=32 does not go with strategy='channel'"),
        (compressed(input_activations={**TOKEN, "symmetric": False}), "symmetric=False is not supported"),
        (compressed(output_activations=TOKEN), "output_activations="),
        (compressed(top={"kv_cache_scheme": {"num_bits": 8}}), "kv_cache_scheme="),
        (compressed(top={"sparsity_config": {"format": "sparse-24-bitmask"}}), "sparsity_config="),
        (compressed(top={"quantization_status": "calibration"}), "status='calibration': must be one of compressed, fr"),
        (compressed(top={"ignore": "lm_head"}), "ignore='lm_head': must be a list of names"),
        (compressed(top={"ignore": ["re:("]}), r"ignore: 're:\(' is not a valid pattern"),
        (compressed(top={"config_groups": {}}), "config_groups={}: must be an object"),
        ({**GPTQ, "bits": 3}, "bits=3: must be one of 2, 4, 8"),
        ({**GPTQ, "lm_head": True}, "lm_head=True is not supported"),
        ({**GPTQ, "dynamic": {"-:.*down": {}}}, "dynamic="),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format='marlin': must be one of gptq, gptq_v2"),
        ({**GPTQ, "group_size": 0}, "group_size=0: must be an integer from 1"),
        ({**GPTQ, "rotation": "hadamard"}, "rotation='hadamard' is not supported"),
        ({**GPTQ, "bits": True}, "bits=True: must be one of 2, 4, 8"),
        ({**GPTQ, "bits": 4.0}, "bits=4.0: must be one of 2, 4, 8"),
        ({**GPTQ, "bits": None}, "bits=None: must be one of 2, 4, 8"),
        ({**GPTQ, "group_size": None}, "group_size=None: must be an integer"),
        ({**GPTQ, "desc_act": 1}, "desc_act=1: must be true or false"),
        ({**GPTQ, "sym": "no"}, "sym='no': must be true or false"),
        ({**GPTQ, "pack_dtype": "int16"}, "pack_dtype='int16' is not supported; only 'int32'"),
        ({**GPTQ, "is_marlin_format": True}, "is_marlin_format=True is not supported"),
        ({**GPTQ, "checkpoint_format": "gptq_v2", "format": "gptq"}, "format='gptq' contradicts 'gptq_v2'"),
        ({**GPTQ, "modules_in_block_to_quantize": 3}, "modules_in_block_to_quantize=3: must be lists of names"),
        ({**GPTQ, "modules_in_block_to_quantize": "q_proj"}, "to_quantize='q_proj': must be lists of names"),
        ({**GPTQ, "modules_in_block_to_quantize": [["q_proj", 7]]}, "must be lists of names"),
        ({**AWQ, "version": "gemv"}, "version='gemv' is not supported; only 'gemm' is"),
        ({**AWQ, "zero_point": False}, "zero_point=False is not supported"),
        ({**AWQ, "bits": 3}, "bits=3 is not supported; only 4"),
        ({**AWQ, "bits": 8}, "bits=8 is not supported; only 4"),
        ({**AWQ, "version": "marlin"}, "version='marlin' is not supported; only 'gemm' is"),
        ({**AWQ, "version": 2}, "version=2 is not supported; only 'gemm' is"),
        ({**AWQ, "group_size": "128"}, "group_size='128': must be an integer"),
        ({"quant_method": "awq", "bits": 4}, "lacks 'group_size'|group_size=None"),
        ({**AWQ, "modules_to_not_convert": "lm_head"}, "modules_to_not_convert='lm_head': must be a list of names"),
        ({**AWQ, "w_bit": 4}, "w_bit=4 is not supported"),
        ({**FP8, "activation_scheme": "static"}, "activation_scheme='static': static scales are not supported"),
        ({**FP8, "weight_block_size": None}, "weight_block_size=None: must be two integers >= 1"),
        ({**FP8, "scale_fmt": "ue8m0"}, "scale_fmt='ue8m0' is not supported"),
        ({**FP8, "dequantize": True}, "dequantize=True is not supported"),
        ({**FP8, "modules_to_not_convert": ["(?i)a"]}, r"not_convert: .\(\?i\)a. is not a valid pattern"),
        ({**AWQ, "backend": "llm-awq"}, "backend=.llm-awq. is not supported"),
        ({**AWQ, "format": "gemv"}, "format=.gemv. is not supported; only .gemm. is"),
    ],
)
def test_unknown_keys_and_values_are_refused_by_name(raw, message) -> None:
    with pytest.raises(ValueError, match=message):
        read_quantization(raw)
