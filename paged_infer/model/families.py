"""How each family's config.json becomes settings of ``ModelConfig``, with transformers' defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paged_infer.model.config_reader import ConfigReader
from paged_infer.model.rope_config import read_rope

MAX_LAYERS = 10_000  # far beyond any real model; each layer is a Python module
Windows = tuple[int | None, ...]
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def _activation(config: ConfigReader, key: str, default: str) -> str:
    name = config.value(key, default)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{key}={name!r}: must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _windows(config: ConfigReader, num_layers: int, window: int | None, first: int = 0) -> Windows:
    """Which layers use a sliding window: those that ``layer_types`` names, or else all from ``first`` on."""
    kinds = config.value("layer_types")
    if kinds is None:
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ValueError(f"layer_types={kinds!r}: must be a list of num_hidden_layers={num_layers} names")
    unknown = {str(kind) for kind in kinds} - {"sliding_attention", "full_attention"}
    if unknown:
        raise ValueError(f"layer_types has {sorted(unknown)}: each must be full_attention or sliding_attention")
    if window is None and "sliding_attention" in kinds:
        raise ValueError("layer_types has sliding_attention, but no sliding_window is in use")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _one_window(config: ConfigReader, num_layers: int, window: int | None) -> Windows:
    """For families with one kind of layer: in transformers, only their cache reads ``layer_types``."""
    windows = _windows(config, num_layers, window)
    if set(windows) != {window}:
        raise ValueError(f"layer_types={config.value('layer_types')!r} contradicts sliding_window={window}")
    return windows


def _head_dim(head_dim: int | None, hidden_size: int, num_heads: int) -> int:
    if head_dim is None and hidden_size % num_heads:
        raise ValueError(f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads}")
    return head_dim or hidden_size // num_heads


def _llama_like(config: ConfigReader, head_dim: int | None = None) -> dict[str, Any]:
    heads, hidden = config.size("num_attention_heads"), config.size("hidden_size")
    max_position_embeddings = config.size("max_position_embeddings")
    return {
        "vocab_size": config.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": config.size("intermediate_size"),
        "num_layers": config.size("num_hidden_layers", most=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": config.size_or_none("num_key_value_heads") or heads,
        "head_dim": _head_dim(config.size_or_none("head_dim", head_dim), hidden, heads),
        "max_position_embeddings": max_position_embeddings,
        "norm_eps": config.number("rms_norm_eps", 1e-6),
        "activation": _activation(config, "hidden_act", "silu"),
        "tie_word_embeddings": config.flag("tie_word_embeddings", False),
        **read_rope(config, max_position_embeddings),
    }


def _llama(config: ConfigReader) -> dict[str, Any]:
    config.only(pretraining_tp=1, sliding_window=None)
    settings, bias = _llama_like(config), config.flag("attention_bias", False)
    return {
        **settings,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": config.flag("mlp_bias", False),
        "sliding_windows": _one_window(config, settings["num_layers"], None),
    }


def _mistral(config: ConfigReader) -> dict[str, Any]:
    # A missing sliding_window means transformers' default of 4,096; null means none.
    settings, window = _llama_like(config), config.size_or_none("sliding_window", 4096)
    return {**settings, "sliding_windows": _one_window(config, settings["num_layers"], window)}


def _qwen_windows(config: ConfigReader, num_layers: int) -> Windows:
    window, first = config.size_or_none("sliding_window", 4096), config.size("max_window_layers", 28, least=0)
    if not config.flag("use_sliding_window", False):
        window = None
    return _windows(config, num_layers, window, first)


def _qwen2(config: ConfigReader) -> dict[str, Any]:
    settings = _llama_like(config)
    return {**settings, "qkv_bias": True, "sliding_windows": _qwen_windows(config, settings["num_layers"])}


def _qwen3(config: ConfigReader) -> dict[str, Any]:
    settings, bias = _llama_like(config, head_dim=128), config.flag("attention_bias", False)
    return {
        **settings,
        "qk_norm": True,
        "qkv_bias": bias,
        "output_bias": bias,
        "sliding_windows": _qwen_windows(config, settings["num_layers"]),
    }


def _gpt2(config: ConfigReader) -> dict[str, Any]:
    # In transformers, a sliding_window would still limit the cache, which all families share.
    config.only(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, sliding_window=None)
    short = {
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
        "n_positions": "max_position_embeddings",
    }
    # transformers reads both names; the long one takes precedence.
    names = {key: key if config.value(long) is None else long for key, long in short.items()}
    hidden, heads = config.size(names["n_embd"]), config.size(names["n_head"])
    num_layers = config.size(names["n_layer"], most=MAX_LAYERS)
    return {
        "vocab_size": config.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": config.size_or_none("n_inner") or 4 * hidden,
        "num_layers": num_layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": _head_dim(None, hidden, heads),
        "max_position_embeddings": config.size(names["n_positions"]),
        "norm": "layer",
        "norm_eps": config.number("layer_norm_epsilon", 1e-5),
        "activation": _activation(config, "activation_function", "gelu_new"),
        "gated_mlp": False,
        "learned_positions": True,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": config.flag("tie_word_embeddings", True),
        "sliding_windows": _one_window(config, num_layers, None),
    }


FAMILIES: dict[str, Callable[[ConfigReader], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
