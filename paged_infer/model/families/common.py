"""What the families' configs have in common: sizes, activations, windows, biases and one RoPE for all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paged_infer.model.config_reader import ConfigReader
from paged_infer.model.rope_config import read_rope

# Far beyond any real model. Each layer is a Python module, each expert an entry of the layout, each row of a head a
# number there.
MAX_LAYERS, MAX_EXPERTS, MAX_HEADS, MAX_WIDTH = 10_000, 2**16, 2**14, 2**20
Windows = tuple[int | None, ...]
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def read_activation(config: ConfigReader, key: str, default: str) -> str:
    name = config.value(key, default)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{key}={name!r}: must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def read_windows(config: ConfigReader, num_layers: int, window: int | None, first: int = 0) -> Windows:
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


def read_one_window(config: ConfigReader, num_layers: int, window: int | None) -> Windows:
    """For families with one kind of layer: in transformers, only their cache reads ``layer_types``."""
    windows = read_windows(config, num_layers, window)
    if set(windows) != {window}:
        raise ValueError(f"layer_types={config.value('layer_types')!r} contradicts sliding_window={window}")
    return windows


def head_dim_of(head_dim: int | None, hidden_size: int, num_heads: int) -> int:
    if head_dim is None and hidden_size % num_heads:
        raise ValueError(f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads}")
    return head_dim or hidden_size // num_heads


def read_sizes(config: ConfigReader, activation: str = "hidden_act", **defaults: Any) -> dict[str, Any]:
    """What all families but GPT-2 have in common, RoPE aside.

    Args:
        activation: the key that names it.
        defaults: of transformers' class for the family, for keys that a config.json may lack.
    """
    heads, hidden = config.size("num_attention_heads", most=MAX_HEADS), config.size("hidden_size", most=MAX_WIDTH)
    kv_heads = config.size_or_none("num_key_value_heads", defaults.get("num_key_value_heads"), most=MAX_HEADS)
    head_dim = config.size_or_none("head_dim", defaults.get("head_dim"), most=MAX_WIDTH)
    return {
        "vocab_size": config.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": config.size("intermediate_size", most=MAX_WIDTH),
        "num_layers": config.size("num_hidden_layers", most=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": kv_heads or heads,
        "head_dim": head_dim_of(head_dim, hidden, heads),
        "max_position_embeddings": config.size("max_position_embeddings"),
        "norm_eps": config.number("rms_norm_eps", defaults.get("rms_norm_eps", 1e-6)),
        "activation": read_activation(config, activation, defaults.get(activation, "silu")),
        "tie_word_embeddings": config.flag("tie_word_embeddings", defaults.get("tie_word_embeddings", False)),
    }


def read_llama_like(config: ConfigReader, rope_options: Mapping[str, Any] = {}, **defaults: Any) -> dict[str, Any]:
    """``read_sizes``, and one RoPE for all layers; ``rope_options``: of ``read_rope``."""
    settings = read_sizes(config, **defaults)
    return settings | read_one_rope(config, settings, **rope_options)


def read_one_rope(config: ConfigReader, settings: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    rope = read_rope(config, settings["head_dim"], settings["max_position_embeddings"], **options)
    limit = max(settings["max_position_embeddings"], rope.max_position)
    return {"ropes": (rope,) * settings["num_layers"], "max_position_embeddings": limit}


def read_attention_biases(config: ConfigReader) -> dict[str, bool]:
    bias = config.flag("attention_bias", False)
    return {"qkv_bias": bias, "output_bias": bias}
