"""ModelConfig: every family is read as transformers reads it; what the decoder does not compute is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import FAMILIES, LLAMA3_ROPE
from transformers import AutoConfig

from paged_infer.model.config import ModelConfig

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 50, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}


def read(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf({**LLAMA, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_num_parameters_is_the_count_of_transformers(family, checkpoint, twin) -> None:
    config = ModelConfig.from_pretrained(checkpoint(family))
    assert config.num_parameters == sum(p.numel() for p in twin(family).parameters())


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"model_type='mamba' is not known; known: gpt2, llama, mistral, qwen2, qwen3"
    ):
        read(model_type="mamba")
    with pytest.raises(ValueError, match="model_type=None is not known"):
        ModelConfig.from_hf({})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not known; known: def"),
        ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type='dynamic'"),
        ({**LLAMA, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({**LLAMA, "partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
        ({**LLAMA, "hidden_act": "mish"}, "hidden_act='mish' is not known; known: silu"),
        ({**LLAMA, "num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        ({**LLAMA, "pretraining_tp": 2}, "pretraining_tp=2 is not supported; only 1"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({**GPT2, "scale_attn_weights": False}, "scale_attn_weights=False"),
        ({**GPT2, "add_cross_attention": True}, "add_cross_attention=True"),
        ({**GPT2, "activation_function": "tanh"}, "activation_function='tanh'"),
        ({**LLAMA, "model_type": "qwen3", "layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
    ],
)  # fmt: skip
def test_what_the_decoder_does_not_compute_is_refused_by_name(raw, message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        ModelConfig.from_hf(raw)
    assert message in str(refusal.value)


@pytest.mark.parametrize("name", [key for key in LLAMA if key != "model_type"])
def test_a_config_that_lacks_a_size_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in LLAMA.items() if k != name}))
    with pytest.raises(ValueError, match=f"config.json: lacks '{name}'"):
        ModelConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '"llama"', "\xff"], ids=["cut", "list", "string", "latin-1"])
def test_a_config_that_is_no_json_object_is_refused_by_path(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        ModelConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("rope", [{"rope_type": "linear"}, {"rope_type": "llama3", "factor": 8.0}])
def test_a_rope_scaling_that_lacks_a_number_is_refused_by_name(rope: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "rope_scaling": rope}))
    with pytest.raises(ValueError, match=r"lacks '(factor|low_freq_factor)'"):
        ModelConfig.from_pretrained(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config.json there"):
        ModelConfig.from_pretrained(tmp_path)


def test_both_spellings_of_rope_are_read() -> None:
    scaling = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
    old = read(rope_theta=500.0, rope_scaling=scaling)
    new = read(rope_parameters={**scaling, "rope_theta": 500.0})
    assert old == new and old.rope_theta == 500.0 and old.rope_llama3 is not None
    assert read(rope_scaling={"type": "linear", "factor": 2.0}).rope_linear_factor == 2.0


def test_end_tokens_of_the_generation_config_come_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 2}))
    assert ModelConfig.from_pretrained(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert ModelConfig.from_pretrained(tmp_path).eos_token_ids == (7, 8)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 9}),
        ("qwen2", {"sliding_window": 9}),
        ("qwen2", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3}),
        ("qwen3", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}),
    ],
)
def test_the_layers_that_slide_are_those_of_transformers(family: str, settings: dict[str, Any]) -> None:
    theirs = AutoConfig.for_model(family, **{k: v for k, v in LLAMA.items() if k != "model_type"}, **settings)
    ours = ModelConfig.from_hf({**LLAMA, "model_type": family, **settings})
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 4
    slides = [kind == "sliding_attention" and theirs.sliding_window is not None for kind in kinds]
    assert ours.sliding_windows == tuple(theirs.sliding_window if slide else None for slide in slides)
