"""ModelConfig: every family is read as transformers reads it; what the decoder does not compute is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import FAMILIES
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
GEMMA = {**LLAMA, "model_type": "gemma3_text"}
GPT2 = {"model_type": "gpt2", "vocab_size": 50, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}


def read(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf({**LLAMA, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_num_parameters_is_the_count_of_transformers(family, checkpoint, transformers_model) -> None:
    config = ModelConfig.from_pretrained(checkpoint(family))
    model = transformers_model(family)
    biases = [b for name, b in model.named_buffers() if name.endswith("correction_bias")]  # a weight, by its use
    assert config.num_parameters == sum(p.numel() for p in (*model.parameters(), *biases))


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="model_type='mamba': must be one of deepseek_v2, deepseek_v3, gemma, gemma2, gemma3_text"
    ):
        read(model_type="mamba")
    with pytest.raises(ValueError, match="model_type=None: must be one of"):
        ModelConfig.from_hf({})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({**LLAMA, "hidden_act": "mish"}, "hidden_act='mish': must be one of silu"),
        ({**LLAMA, "num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({**LLAMA, "pretraining_tp": 2}, "pretraining_tp=2 is not supported; only 1"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({**GPT2, "scale_attn_weights": False}, "scale_attn_weights=False"),
        ({**GPT2, "add_cross_attention": True}, "add_cross_attention=True"),
        ({**GPT2, "activation_function": "tanh"}, "activation_function='tanh'"),
        ({**GPT2, "n_embd": 33}, "hidden_size=33 is not a multiple of num_attention_heads=4"),
        ({**LLAMA, "hidden_size": 33}, "hidden_size=33 is not a multiple of num_attention_heads=4"),
        ({**LLAMA, "head_dim": 7}, "head_dim=7: must be even"),
        ({**LLAMA, "quantization_config": {"quant_method": "hqq", "bits": 4}}, "quant_method='hqq': must be one of"),
        ({**GPT2, "quantization_config": {}}, "quantization_config quant_method=None: must be one of"),
        ({**LLAMA, "is_causal": False}, "is_causal=False"),
        ({**LLAMA, "per_layer_config": {"1": {"head_dim": 4}}}, "per_layer_config={'1'"),
        ({**LLAMA, "text_config": {"vocab_size": 60}}, "text_config={'vocab_size'"),
        ({**LLAMA, "transformers_weights": "other.safetensors"}, "transformers_weights='other.safetensors'"),
        ({**LLAMA, "configuration_files": ["config.4.json"]}, "configuration_files=['config.4.json']"),
        ({**LLAMA, "attention_chunk_size": 16}, "attention_chunk_size=16"),
        ({**LLAMA, "sliding_window": 16}, "sliding_window=16 is not supported; only None is"),
        ({**GPT2, "sliding_window": 5}, "sliding_window=5 is not supported; only None is"),
        ({**GPT2, "layer_types": ["sliding_attention"] * 2}, "no sliding_window is in use"),
        ({**LLAMA, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "no sliding_window is in use"),
        ({**LLAMA, "model_type": "mistral", "layer_types": ["full_attention"] * 4}, "contradicts sliding_window=4096"),
        ({**LLAMA, "model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers=[1]: must be a list of num_hid"),
        ({**LLAMA, "model_type": "smollm3", "no_rope_layers": [1, 2, 3, 4]}, "no_rope_layers=[1, 2, 3, 4]"),
        ({**GEMMA, "use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ({**GEMMA, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported; only None is"),
        ({**GEMMA, "query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0: must be a number > 0"),
        ({**LLAMA, "model_type": "granite", "logits_scaling": 0}, "logits_scaling=0: must be a number > 0"),
        ({**LLAMA, "model_type": "qwen3", "layer_types": ["sliding_attention"] * 4}, "no sliding_window is in use"),
        ({**LLAMA, "model_type": "qwen3", "layer_types": ["full_attention"]}, "must be a list of num_hidden_layers=4"),
        ({**LLAMA, "model_type": "qwen3", "layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
    ],
)  # fmt: skip
def test_what_the_decoder_does_not_compute_is_refused_by_name(raw, message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        ModelConfig.from_hf(raw)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({**LLAMA, "vocab_size": 10**12}, "vocab_size=1000000000000: must be an integer from 1 to 2147483647"),
        ({**LLAMA, "num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: must be an integer from 1 to 10000"),
        ({**GPT2, "n_layer": 10**9}, "n_layer=1000000000"),
        ({**LLAMA, "hidden_size": 0}, "hidden_size=0"),
        ({**LLAMA, "hidden_size": -32}, "hidden_size=-32"),
        ({**LLAMA, "hidden_size": 32.0}, "hidden_size=32.0"),
        ({**LLAMA, "num_attention_heads": True}, "num_attention_heads=True"),
        ({**LLAMA, "vocab_size": "50"}, "vocab_size='50'"),
        ({**LLAMA, "vocab_size": None}, "vocab_size=None"),
        ({**LLAMA, "head_dim": 0}, "head_dim=0"),
        ({**LLAMA, "rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6': must be a number > 0"),
        ({**LLAMA, "rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({**LLAMA, "hidden_act": ["silu"]}, "hidden_act=['silu']"),
        ({**LLAMA, "tie_word_embeddings": "yes"}, "tie_word_embeddings='yes': must be true or false"),
        ({**LLAMA, "attention_bias": None}, "attention_bias=None"),
        ({**LLAMA, "model_type": ["llama"]}, "model_type=['llama']: must be one of"),
        ({**LLAMA, "model_type": "mistral", "sliding_window": 0}, "sliding_window=0"),
    ],
)  # fmt: skip
def test_a_malformed_value_is_refused_by_name(raw, message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        ModelConfig.from_hf(raw)
    assert message in str(refusal.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_read_to_the_last_key(family, checkpoint, caplog) -> None:
    ModelConfig.from_pretrained(checkpoint(family))
    assert not caplog.records


def test_a_key_that_nothing_reads_is_named(caplog) -> None:
    read(attn_logit_softcapping=50.0, attention_dropout=0.1, vocab_pad=7)
    (record,) = caplog.records
    assert "config.json: attn_logit_softcapping, vocab_pad: without effect" in record.getMessage()


def test_a_bias_that_the_family_does_not_have_is_named_and_not_computed(caplog) -> None:
    config = read(model_type="mistral", attention_bias=True)
    assert not config.qkv_bias and "attention_bias: without effect" in caplog.text


def test_sizes_of_gpt2_under_transformers_long_names_win_as_there() -> None:
    theirs = AutoConfig.for_model(**{**GPT2, "num_hidden_layers": 1, "hidden_size": 64})
    ours = ModelConfig.from_hf({**GPT2, "num_hidden_layers": 1, "hidden_size": 64})
    assert (ours.num_layers, ours.hidden_size) == (theirs.n_layer, theirs.n_embd) == (1, 64)


def test_what_a_generation_config_asks_for_is_named(caplog) -> None:
    generation = {"eos_token_id": 2, "repetition_penalty": 1.05, "top_p": 1.0, "do_sample": True, "odd": 1}
    ModelConfig.from_hf(LLAMA, generation)
    (record,) = caplog.records
    assert "generation_config.json sets odd=1, repetition_penalty=1.05:" in record.getMessage()


def test_a_default_of_generation_in_an_old_config_is_named(caplog) -> None:
    read(repetition_penalty=1.3, temperature=1.0, no_repeat_ngram_size=0, max_length=20)
    (record,) = caplog.records
    assert "config.json sets repetition_penalty=1.3:" in record.getMessage()
    caplog.clear()
    ModelConfig.from_hf({**LLAMA, "repetition_penalty": 1.3}, {})  # transformers reads it in one place alone
    assert not caplog.records


@pytest.mark.parametrize("name", [key for key in LLAMA if key != "model_type"])
def test_a_config_that_lacks_a_size_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in LLAMA.items() if k != name}))
    with pytest.raises(ValueError, match=f"config.json: lacks '{name}'"):
        ModelConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '"llama"', "\xff", "[" * 100_000], ids=["cut", "list", "string", "latin-1", "deep"]
)
def test_a_config_that_is_no_json_object_is_refused_by_path(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        ModelConfig.from_pretrained(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config.json"):
        ModelConfig.from_pretrained(tmp_path)


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
