"""config.json files that people have: what is read from each gives transformers' logits, and says what has no effect.

Sizes are narrowed, and keys that neither side reads (dropout, dtype, ids of tokens) left out; every other key is as
the model's authors published it. The weights are random.
"""

from __future__ import annotations

import copy
import json
import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import logits
from transformers import AutoConfig, AutoModelForCausalLM

from paged_infer.model.config import ModelConfig
from paged_infer.model.loading.load import load_decoder

VOCAB, IDS = 307, random.Random(3).choices(range(307), k=60)
LISTS = {"short_factor": [1 + 0.02 * i for i in range(48)], "long_factor": [1 + 0.7 * i for i in range(48)]}


def _pattern(layers: int, every: int) -> list[str]:
    return ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)]


def _llama(
    hidden: int, heads: int, kv_heads: int, theta: float, length: int, eps: float, **keys: Any
) -> dict[str, Any]:
    """What most families write."""
    return {
        "hidden_act": "silu", "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "rope_theta": theta, "max_position_embeddings": length, "rms_norm_eps": eps, "tie_word_embeddings": False,
        **keys,
    }  # fmt: skip


_LLAMA = {"model_type": "llama", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
_QWEN2 = {"model_type": "qwen2", "use_sliding_window": False}
_QWEN3 = {"model_type": "qwen3", "attention_bias": False, "head_dim": 128, "sliding_window": None, **_QWEN2}
_QWEN3 |= {"model_type": "qwen3", "max_window_layers": 36, "tie_word_embeddings": True}
_PHI3 = {
    "model_type": "phi3", "attention_bias": False, "sliding_window": 262144, "original_max_position_embeddings": 4096,
}  # fmt: skip
_GRANITE = {
    "model_type": "granite", "attention_bias": False, "mlp_bias": False, "rope_scaling": None,
    "tie_word_embeddings": True, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
    "logits_scaling": 8.0, "residual_multiplier": 0.22,
}  # fmt: skip
_SMOLLM3 = {
    "model_type": "smollm3", "attention_bias": False, "mlp_bias": False, "layer_types": ["full_attention"] * 36,
    "max_window_layers": 28, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "pretraining_tp": 2,
    "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA = {
    "attention_bias": False, "head_dim": 256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
}  # fmt: skip
_GEMMA2 = {
    **_GEMMA, "model_type": "gemma2", "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256, "sliding_window": 4096,
}  # fmt: skip
_GEMMA3 = {
    **_GEMMA, "model_type": "gemma3_text", "attn_logit_softcapping": None, "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32768, "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
}  # fmt: skip
_LLAMA3 = {
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
_OLMO3_ROPE = {
    "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
    "original_max_position_embeddings": 8192, "rope_type": "yarn",
}  # fmt: skip
_YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
# model -> its config.json, and the keys that a warning names
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "Qwen2.5-0.5B": (
        _llama(896, 14, 2, 1e6, 32768, 1e-6, **_QWEN2, max_window_layers=24, sliding_window=32768, use_mrope=False),
        "use_mrope",
    ),
    "Qwen2.5-7B with its card's YaRN": (
        _llama(3584, 28, 4, 1e6, 32768, 1e-6, **_QWEN2, sliding_window=131072, rope_scaling={**_YARN, "type": "yarn"}),
        "",
    ),
    "Qwen2.5-7B-1M": (
        _llama(3584, 28, 4, 1e7, 1010000, 1e-5, **_QWEN2, sliding_window=None, dual_chunk_attention_config={"a": 1}),
        "dual_chunk_attention_config",
    ),
    "Qwen3-0.6B": (_llama(1024, 16, 8, 1000000, 40960, 1e-6, rope_scaling=None) | _QWEN3, ""),
    "Qwen3-4B with its card's YaRN": (
        _llama(2560, 32, 8, 1000000, 40960, 1e-6, rope_scaling={**_YARN, "rope_type": "yarn"}) | _QWEN3,
        "",
    ),
    "Llama-3.2-1B": (_llama(2048, 32, 8, 5e5, 131072, 1e-5, **_LLAMA, head_dim=64, rope_scaling=_LLAMA3), ""),
    "TinyLlama": (_llama(2048, 32, 4, 10000.0, 2048, 1e-5, **_LLAMA, rope_scaling=None), ""),
    "deepseek-coder-1.3b": (
        _llama(2048, 16, 16, 100000, 16384, 1e-6, **_LLAMA, rope_scaling={"factor": 4.0, "type": "linear"}),
        "",
    ),
    "SmolLM2-135M-Instruct": (
        _llama(576, 9, 3, 100000, 8192, 1e-5, **_LLAMA, is_llama_config=True, rope_interleaved=False),
        "is_llama_config, rope_interleaved",
    ),
    "SmolLM3-3B": (_llama(2048, 16, 4, 5e6, 65536, 1e-6) | _SMOLLM3, "max_window_layers, pretraining_tp"),
    "gemma-2b": (
        {**_GEMMA, "model_type": "gemma", "hidden_act": "gelu", "num_attention_heads": 8, "num_key_value_heads": 1},
        "",
    ),
    "gemma-2-2b-it": ({**_GEMMA2, "num_attention_heads": 8, "num_key_value_heads": 4}, "hidden_act"),
    "gemma-3-270m": (
        {
            **_GEMMA3,
            "_sliding_window_pattern": 6,
            "layer_types": _pattern(18, 6),
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "use_bidirectional_attention": False,
        },
        "",
    ),
    "gemma-3-1b-it": ({**_GEMMA3, "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window_pattern": 6}, ""),
    "Phi-3-mini-4k": (
        _llama(3072, 32, 32, 10000.0, 4096, 1e-5, rope_scaling=None) | _PHI3 | {"sliding_window": 2047},
        "attention_bias",
    ),
    "Phi-3.5-mini": (
        _llama(3072, 32, 32, 10000.0, 131072, 1e-5, rope_scaling={**LISTS, "type": "longrope"}) | _PHI3,
        "attention_bias",
    ),
    "Phi-3.5-mini without its top-level original length": (
        _llama(3072, 32, 32, 10000.0, 131072, 1e-5, rope_scaling={**LISTS, "type": "longrope"})
        | {key: value for key, value in _PHI3.items() if not key.startswith("original")},
        "attention_bias",
    ),
    "Phi-4-mini": (
        _llama(3072, 24, 8, 10000.0, 131072, 1e-5, rope_scaling={**LISTS, "type": "longrope"})
        | {**_PHI3, "partial_rotary_factor": 0.75, "full_attn_mod": 1, "lm_head_bias": False, "mlp_bias": False},
        "attention_bias, full_attn_mod, lm_head_bias, mlp_bias",
    ),
    "phi-4": (
        _llama(5120, 40, 10, 250000, 16384, 1e-5, rope_scaling=None)
        | {**_PHI3, "sliding_window": None, "original_max_position_embeddings": 16384},
        "attention_bias",
    ),
    "OLMo-2-0425-1B": (
        _llama(2048, 16, 16, 500000, 4096, 1e-6, model_type="olmo2", attention_bias=False, rope_scaling=None),
        "",
    ),
    "Olmo-3-7B": (
        _llama(4096, 32, 32, 500000, 65536, 1e-6, model_type="olmo3", attention_bias=False, sliding_window=4096)
        | {"layer_types": _pattern(32, 4), "rope_scaling": _OLMO3_ROPE},
        "",
    ),
    "granite-3.1-2b": (_llama(2048, 32, 8, 5e6, 131072, 1e-5) | _GRANITE, ""),
    "granite-3.3-2b": (_llama(2048, 32, 8, 1e7, 131072, 1e-5) | _GRANITE, ""),
    "Mistral-7B-v0.1": (_llama(4096, 32, 8, 10000.0, 32768, 1e-5, model_type="mistral", sliding_window=4096), ""),
    "Mistral-7B-v0.3": (_llama(4096, 32, 8, 1e6, 32768, 1e-5, model_type="mistral", sliding_window=None), ""),
}


def narrowed(config: dict[str, Any]) -> dict[str, Any]:
    """With the same heads' size, but two key heads, seven layers and a window that the text exceeds."""
    config = copy.deepcopy(config)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = 2 * min(2, config["num_attention_heads"] // config["num_key_value_heads"])
    config |= {"num_attention_heads": heads, "num_key_value_heads": 2, "hidden_size": heads * head_dim}
    config |= {"num_hidden_layers": 7, "intermediate_size": 56, "vocab_size": VOCAB, "pad_token_id": 0}
    config |= {key: config[key][:7] for key in ("layer_types", "no_rope_layers") if key in config}
    if config.get("sliding_window"):
        config["sliding_window"] = 13
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_people_have_gives_the_logits_of_transformers(name: str, tmp_path: Path, caplog) -> None:
    raw, without_effect = narrowed(CONFIGS[name][0]), CONFIGS[name][1]
    torch.manual_seed(0)
    config = AutoConfig.for_model(**copy.deepcopy(raw), attn_implementation="eager")
    theirs = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
        else:
            parameter.data.normal_(std=0.06)
    theirs.save_pretrained(tmp_path)
    saved = ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "generation_config.json").unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        ours = load_decoder(tmp_path, torch.float32, max_model_len=4096)
    expected = [f"config.json: {without_effect}: without effect, here and in transformers"] if without_effect else []
    assert caplog.messages == expected
    with torch.inference_mode():
        wanted = theirs(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits(ours, IDS), wanted, atol=2e-3, rtol=1e-3)
    assert ours.config.num_parameters == theirs.num_parameters()

    ends = {"bos_token_id": None, "eos_token_ids": (), "dtype": "", "max_model_len": None}
    if "without" not in name:  # transformers saves a config without the length that it computes with
        assert replace(saved, **ends) == replace(ours.config, **ends)
