"""Rotary positions: every key of them is computed as transformers does, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LLAMA3_ROPE, VOCAB
from decoding import IDS, logits
from transformers import AutoConfig, AutoModelForCausalLM

from paged_infer.model.config import ModelConfig
from paged_infer.model.loading.load import load_decoder

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
}
LLAMA3 = {k: v for k, v in LLAMA3_ROPE.items() if k in ("rope_type", "factor", "low_freq_factor", "high_freq_factor")}


def read(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf({**LLAMA, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a config.json that each test rewrites."""
    path = tmp_path_factory.mktemp("rope")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA, initializer_range=0.2)).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_theta": 700.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 700.0, "rope_type": "linear", "factor": 3.0}},
        {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 700.0}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 700.0}},
        {"rope_parameters": LLAMA3_ROPE, "original_max_position_embeddings": 64},
        {"rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
        {"rope_theta": 700.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 700.0, "rope_parameters": {"rope_type": "default", "rope_theta": 900.0}},
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 900.0}, "rope_theta": 700.0},
        {"rope_scaling": {**LLAMA3_ROPE, "rope_theta": 500.0}, "rope_parameters": {**LINEAR, "rope_theta": 900.0}},
        {"rope_scaling": {}, "rope_parameters": {**LINEAR, "rope_theta": 900.0}},
        {"rope_scaling": None, "rope_parameters": {**LINEAR, "rope_theta": 900.0}},
        {},
        {"rope_parameters": YARN},
        {"rope_theta": 700.0, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        {"rope_scaling": {**YARN, "factor": None}},
        {"rope_scaling": {**YARN, "beta_fast": 8, "beta_slow": 2.5, "truncate": False}},
        {"rope_scaling": {**YARN, "attention_factor": 0.7}},
        {"rope_scaling": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5}},
        {"rope_scaling": {**YARN, "mscale": 1.5}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 32},
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 700.0}},
        {"rope_parameters": {"rope_type": "longrope", **LONGROPE, "original_max_position_embeddings": 64}},
        {"rope_parameters": {"rope_type": "longrope", **LONGROPE, "factor": 3.0, "attention_factor": 1.3}},
        {"rope_scaling": {"type": "longrope", **LONGROPE}, "original_max_position_embeddings": 100},
    ],
    ids=str,
)
def test_rope_keys_give_the_logits_of_transformers(changes: dict[str, Any], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = IDS * 8  # beyond the length that llama3's stretch leaves alone
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0]
    ours = logits(load_decoder(folder, torch.float32), ids)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_both_spellings_of_rope_are_read_alike() -> None:
    scaling = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
    old = read(rope_theta=500.0, rope_scaling=scaling)
    new = read(rope_parameters={**scaling, "rope_theta": 500.0})
    (rope,) = set(old.ropes)
    assert old == new and rope is not None and rope.theta == 500.0 and rope.llama3 is not None


def test_longrope_takes_its_list_once_by_max_model_len_and_then_transformers_logits_of_that_length(
    folder: Path,
) -> None:
    rope = {"rope_type": "longrope", **LONGROPE, "original_max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps({**LLAMA, "rope_parameters": rope}))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    short, long = (load_decoder(folder, torch.float32, max_model_len=n) for n in (64, 65))
    for decoder, ids in ((short, IDS[:20]), (long, IDS * 8)):
        with torch.inference_mode():
            expected = theirs(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits(decoder, ids), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(long, IDS[:20]), logits(short, IDS[:20]), atol=1e-2)


def test_longrope_beyond_its_original_length_by_default_is_said(folder: Path, caplog) -> None:
    rope = {"rope_type": "longrope", **LONGROPE, "original_max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps({**LLAMA, "rope_parameters": rope}))
    for max_model_len, warnings in ((65, []), (64, []), (None, ["LongRoPE's factors for texts longer than 64 tokens"])):
        caplog.clear()
        load_decoder(folder, torch.float32, max_model_len=max_model_len)
        assert [message[: len(start)] for message, start in zip(caplog.messages, warnings, strict=True)] == warnings


def test_yarn_stretches_the_limit_of_a_config_that_names_the_original_length() -> None:
    assert read(rope_scaling={**YARN, "original_max_position_embeddings": 256}).max_position_embeddings == 1024
    assert read(rope_scaling=YARN).max_position_embeddings == 256


def test_a_rope_that_another_replaces_is_named(caplog) -> None:
    read(rope_scaling=LINEAR, rope_parameters={"rope_theta": 900.0})
    (record,) = caplog.records
    assert "replaces rope_parameters={'rope_theta': 900.0}" in record.getMessage()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "longrope", **LONGROPE, "short_factor": [1.0]}},
         "rope_type='longrope' short_factor=[1.0]: must be a list of 8 numbers > 0"),
        ({"rope_scaling": {"rope_type": "longrope", **LONGROPE, "long_factor": ["1"] * 8}}, "long_factor=['1', "),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8}}, "long_factor=None"),
        ({"rope_scaling": {"rope_type": "longrope", **LONGROPE, "original_max_position_embeddings": 1}},
         "original_max_position_embeddings=1: must be an integer from 2"),
        ({"rope_scaling": {**YARN, "rope_theta": 1}}, "rope_theta=1.0: must be greater than 1 for rope_type='yarn'"),
        ({"rope_scaling": {**YARN, "beta_fast": "32"}}, "rope_scaling beta_fast='32': must be a number > 0"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "rope_scaling truncate=1: must be true or false"),
        ({"rope_scaling": {**YARN, "short_factor": [1.0]}}, "rope_scaling has short_factor, which rope_type='yarn'"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling lacks 'factor'"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e6}}, "rope_type='proportional'"),
        ({"rope_parameters": {"rope_type": None}}, "rope_type=None"),
        ({"rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default"}}},
         "rope_parameters is nested (full_attention, sliding_attention)"),
        ({"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0]}}, "rope_type='longrope' short_"),
        ({"model_type": "phi3", "rope_scaling": {"type": ["su"]}}, "rope_type=['su']: must be one of"),
        ({"model_type": "gemma3_text", "rope_local_base_freq": 0}, "rope_local_base_freq=0: must be a number > 0"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.2}, "partial_rotary_factor=0.2 of head_dim=16 gives 3"),
        ({"model_type": "phi3", "partial_rotary_factor": 1.5}, "gives 24 rotated dimensions: must be an even number"),
        ({"model_type": "gemma3_text", "rope_parameters": {"chunked_attention": {}}}, "must be an object of full"),
        ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": {**YARN, "truncate": False}}},
         "rope_parameters full_attention truncate=False is not supported; only True is"),
        ({"model_type": "gemma3_text", "rope_scaling": "linear"}, "rope_scaling='linear': must be an object"),
        ({"model_type": "qwen3", "rope_scaling": {"full_attention": LINEAR}}, "rope_scaling is nested"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
        ({"rope_scaling": {**LINEAR, "mrope_section": [2, 3, 3]}},
         "rope_scaling has mrope_section, which rope_type='linear' does not use"),
        ({"rope_parameters": {"factor": 4.0}}, "rope_parameters has factor, which rope_type='default' does not use"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear': must be an object"),
        ({"rope_theta": None}, "rope_theta=None: must be a number > 0"),
        ({"rope_theta": "10000"}, "rope_theta='10000'"),
        ({"rope_theta": 10**400}, "must be a number > 0"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling lacks 'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scaling factor=0: must be a number > 0"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling lacks 'low_freq_factor'"),
        ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "low_freq_factor=1.0: must be less than"),
    ],
    ids=str,
)  # fmt: skip
def test_a_rope_that_is_not_computed_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        read(**changes)
    assert message in str(refusal.value)
