"""Models described by their shape: what is read and computed for a token, and what a token leaves in the cache."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from paged_infer.model.config import ModelConfig
from paged_infer.model.moe_config import expected_experts
from paged_infer.suggestions import value_hint

# Bits of a linear layer's weight, scales included: int4 has one of 16 bits for 32 weights, int8 one for a row.
WEIGHT_BITS = {"w8a16": 8.0, "w4a16": 4.5, "w8a8": 8.0}
KV_DTYPES = ("auto", "int8", "fp8", "fp8_e5m2")
SCALE_BYTES = 2  # for each head of an 8-bit key or value; for both parts of an MLA latent

# fmt: off
_COMMON = {"hidden_act": "silu", "attention_bias": False, "num_key_value_heads": 8}
_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **_COMMON, "head_dim": 128, "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0, "bos_token_id": 151643, "eos_token_id": 151645, "max_position_embeddings": 40960,
    "vocab_size": 151936, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", **_COMMON, "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "mlp_bias": False, "bos_token_id": 128000, "eos_token_id": 128001, "max_position_embeddings": 131072,
    "vocab_size": 128256, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}
_OURS: dict[str, Any] = {  # not published models
    **_QWEN3, "rope_theta": 10_000.0, "bos_token_id": None, "eos_token_id": 0, "max_position_embeddings": 2048,
    "torch_dtype": "float32",
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        **_QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    },
    "qwen3-8b": {
        **_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "llama-3.1-70b": {
        **_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
    "qwen3-32b": {
        **_QWEN3, "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
        "tie_word_embeddings": False,
    },
    "qwen2-7b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0, "bos_token_id": 151643, "eos_token_id": 151643, "max_position_embeddings": 32768,
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
    # 29.4 million parameters: 8 layers of 3.1 and an embedding of 4.2, which is the head too.
    "qwen3-30m": {
        **_OURS, "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    },
    # The storyteller's shape, 3.1 million, with a longer context.
    "qwen3-3m": {
        **_OURS, "vocab_size": 2048, "hidden_size": 192, "intermediate_size": 640, "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 131072,
    },
}
# fmt: on


@dataclass(frozen=True)
class ModelShape:
    """What steps of a model read and compute. Weights are numbers of elements, not bytes."""

    name: str
    config: ModelConfig

    @classmethod
    def named(cls, name: str) -> ModelShape:
        """One of ``SHAPES``, or the shape of a folder with a config.json in Hugging Face's format.

        Raises:
            ValueError: neither; the message lists the known shapes. Or the checkpoint is quantised already.
        """
        if name in SHAPES:
            return cls(name, ModelConfig.from_hf(SHAPES[name]))
        if not Path(name, "config.json").is_file():
            raise ValueError(f"model {name!r}: no folder with a config.json, and no shape; known: {', '.join(SHAPES)}")
        config = ModelConfig.from_pretrained(Path(name))
        if config.quantization is not None:
            raise ValueError(f"model {name!r}: is quantised already; pass the original model, and quantization")
        return cls(Path(name).name, config)

    @cached_property
    def head_weights(self) -> int:
        """Weights of the head, which only sampled rows need."""
        return self.config.vocab_size * self.config.hidden_size

    @cached_property
    def embedding_weights(self) -> int:
        """Weights that are only looked up: an embedding that is not also the head, and GPT-2's positions."""
        positions = self.config.learned_positions * self.config.max_position_embeddings * self.config.hidden_size
        return positions + (0 if self.config.tie_word_embeddings else self.head_weights)

    @cached_property
    def layer_weights(self) -> int:
        """Weights of all layers; of routed experts, only those that one token passes through."""
        idle = 0 if self.config.moe is None else self.config.moe.idle_parameters(self.config.hidden_size)
        return self.config.num_parameters - self.embedding_weights - self.head_weights - idle

    def layer_weights_read(self, num_tokens: int) -> float:
        """Weights that a step of ``num_tokens`` reads; experts if any token chooses them (routing taken as uniform)."""
        moe = self.config.moe
        if moe is None:
            return self.layer_weights
        more = expected_experts(moe.num_experts, moe.top_k, num_tokens) - moe.top_k
        return self.layer_weights + sum(moe.layers) * more * moe.expert_parameters(self.config.hidden_size)

    @cached_property
    def windows(self) -> dict[int | None, int]:
        """Attention window -> number of layers that have it; None: all earlier tokens."""
        return Counter(self.config.sliding_windows or (None,) * self.config.num_layers)

    @property
    def num_kv_heads(self) -> int:
        return 1 if self.config.mla is not None else self.config.num_kv_heads

    @cached_property
    def kv_elements(self) -> int:
        """Elements that a token leaves in the cache of one layer."""
        mla = self.config.mla
        return mla.cached_dim if mla is not None else 2 * self.num_kv_heads * self.config.head_dim

    @cached_property
    def attention_flops(self) -> int:
        """Operations of one token with one earlier token in one layer: 2 per element of a score and a weighted sum."""
        mla, heads = self.config.mla, self.config.num_heads
        return 2 * heads * (2 * self.config.head_dim if mla is None else mla.cached_dim + mla.kv_lora_rank)

    def kv_element_bytes(self, kv_cache_dtype: str, dtype_bytes: int) -> float:
        """Bytes of a cached element, including its share of the scales.

        Raises:
            ValueError: an unknown type; the message lists the known ones.
        """
        if kv_cache_dtype not in KV_DTYPES:
            allowed = ", ".join(KV_DTYPES) + value_hint(kv_cache_dtype, KV_DTYPES)
            raise ValueError(f"kv_cache_dtype={kv_cache_dtype!r}: must be one of {allowed}")
        if kv_cache_dtype == "auto":
            return dtype_bytes
        return 1 + 2 * SCALE_BYTES * self.num_kv_heads / self.kv_elements
