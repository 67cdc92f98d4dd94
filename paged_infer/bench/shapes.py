"""Models by their shape alone: a config.json, for measurements that need a size and no trained weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# fmt: off
_COMMON = {"hidden_act": "silu", "attention_bias": False, "num_key_value_heads": 8}
_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **_COMMON, "head_dim": 128, "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0, "bos_token_id": 151643, "eos_token_id": 151645, "max_position_embeddings": 40960,
    "vocab_size": 151936, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}
_OURS: dict[str, Any] = {  # no published model
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
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **_COMMON, "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "mlp_bias": False, "bos_token_id": 128000, "eos_token_id": 128001, "max_position_embeddings": 131072,
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
    # 29.4 million parameters: 8 layers of 3.1 and an embedding of 4.2, which is the head too.
    "qwen3-30m": {
        **_OURS, "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    },
    # The storyteller's shape, 3.1 million, for texts longer than it takes.
    "qwen3-3m": {
        **_OURS, "vocab_size": 2048, "hidden_size": 192, "intermediate_size": 640, "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 131072,
    },
}
# fmt: on


@contextmanager
def folder_of(model: str | None, load_format: str) -> Iterator[str | None]:
    """What ``LLM`` takes for ``model``: a shape's name becomes a folder with its config.json, kept inside the block.

    Raises:
        ValueError: a shape's name without ``load_format="dummy"``: there are no weights to read.
    """
    if model not in SHAPES:
        yield model
        return
    if load_format != "dummy":
        raise ValueError(f"{model} is a shape without weights: add --load-format dummy")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / model
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(SHAPES[model], indent=1), encoding="utf-8")
        yield str(folder)
