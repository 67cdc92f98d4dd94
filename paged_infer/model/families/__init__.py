"""How each family's config.json becomes settings of ``ModelConfig``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paged_infer.model.config_reader import ConfigReader
from paged_infer.model.families import deepseek, dense, moe

FAMILIES: dict[str, Callable[[ConfigReader], dict[str, Any]]] = {
    "deepseek_v2": deepseek.deepseek_v2,
    "deepseek_v3": deepseek.deepseek_v3,
    "gemma": dense.gemma,
    "gemma2": dense.gemma2,
    "gemma3_text": dense.gemma3_text,
    "gpt2": dense.gpt2,
    "gpt_oss": moe.gpt_oss,
    "granite": dense.granite,
    "llama": dense.llama,
    "mistral": dense.mistral,
    "mixtral": moe.mixtral,
    "olmo2": dense.olmo2,
    "olmo3": dense.olmo3,
    "phi3": dense.phi3,
    "qwen2": dense.qwen2,
    "qwen2_moe": moe.qwen2_moe,
    "qwen3": dense.qwen3,
    "qwen3_moe": moe.qwen3_moe,
    "smollm3": dense.smollm3,
}
