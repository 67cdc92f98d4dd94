"""Families with one MLP in each layer: config.json to settings of ``ModelConfig``, with transformers' defaults."""

from __future__ import annotations

from typing import Any

from paged_infer.model.config_reader import ConfigReader
from paged_infer.model.families.common import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_WIDTH,
    Windows,
    head_dim_of,
    read_activation,
    read_attention_biases,
    read_llama_like,
    read_one_rope,
    read_one_window,
    read_sizes,
    read_windows,
)
from paged_infer.model.rope_config import RopeConfig, read_ropes_by_layer_type

Ropes = tuple[RopeConfig | None, ...]


def llama(config: ConfigReader) -> dict[str, Any]:
    config.only(pretraining_tp=1, sliding_window=None)
    settings = read_llama_like(config)
    return {
        **settings,
        **read_attention_biases(config),
        "mlp_bias": config.flag("mlp_bias", False),
        "sliding_windows": read_one_window(config, settings["num_layers"], None),
    }


def mistral(config: ConfigReader) -> dict[str, Any]:
    # A missing sliding_window means transformers' default of 4,096; null means none.
    settings, window = read_llama_like(config), config.size_or_none("sliding_window", 4096)
    return {**settings, "sliding_windows": read_one_window(config, settings["num_layers"], window)}


def _qwen_windows(config: ConfigReader, num_layers: int) -> Windows:
    window, first = config.size_or_none("sliding_window", 4096), config.size("max_window_layers", 28, least=0)
    if not config.flag("use_sliding_window", False):
        window = None
    return read_windows(config, num_layers, window, first)


def qwen2(config: ConfigReader) -> dict[str, Any]:
    settings = read_llama_like(config)
    return {**settings, "qkv_bias": True, "sliding_windows": _qwen_windows(config, settings["num_layers"])}


def qwen3(config: ConfigReader) -> dict[str, Any]:
    settings = read_llama_like(config, head_dim=128)
    return {
        **settings,
        **read_attention_biases(config),
        "qk_norm": "head",
        "sliding_windows": _qwen_windows(config, settings["num_layers"]),
    }


def gpt2(config: ConfigReader) -> dict[str, Any]:
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
    hidden, heads = config.size(names["n_embd"], most=MAX_WIDTH), config.size(names["n_head"], most=MAX_HEADS)
    num_layers = config.size(names["n_layer"], most=MAX_LAYERS)
    return {
        "vocab_size": config.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": config.size_or_none("n_inner", most=MAX_WIDTH) or 4 * hidden,
        "num_layers": num_layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": head_dim_of(None, hidden, heads),
        "max_position_embeddings": config.size(names["n_positions"]),
        "norm": "layer",
        "norm_eps": config.number("layer_norm_epsilon", 1e-5),
        "activation": read_activation(config, "activation_function", "gelu_new"),
        "gated_mlp": False,
        "learned_positions": True,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": config.flag("tie_word_embeddings", True),
        "sliding_windows": read_one_window(config, num_layers, None),
    }


def olmo2(config: ConfigReader) -> dict[str, Any]:
    settings = read_llama_like(config, rms_norm_eps=1e-5)
    return {
        **settings,
        **read_attention_biases(config),
        "pre_norm": False,
        "post_norm": True,
        "qk_norm": "width",
        "sliding_windows": read_one_window(config, settings["num_layers"], None),
    }


def olmo3(config: ConfigReader) -> dict[str, Any]:
    settings = read_sizes(config, rms_norm_eps=1e-5)
    num_layers = settings["num_layers"]
    windows = _every_nth_full(config, num_layers, config.size_or_none("sliding_window", 4096), 4)
    settings |= read_attention_biases(config) | {"sliding_windows": windows}
    ropes = _ropes_by_window(config, settings, full=500_000.0, sliding=500_000.0)
    return {**settings, "pre_norm": False, "post_norm": True, "qk_norm": "width", "ropes": ropes}


def smollm3(config: ConfigReader) -> dict[str, Any]:
    settings = read_llama_like(config, {"theta": 2_000_000.0}, num_key_value_heads=4, tie_word_embeddings=True)
    num_layers = settings["num_layers"]
    interval, rotated = config.size("no_rope_layer_interval", 4), config.value("no_rope_layers")
    if rotated is None:
        rotated = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if not isinstance(rotated, list) or len(rotated) < num_layers or any(x not in (0, 1) for x in rotated):
        raise ValueError(f"no_rope_layers={rotated!r}: must be a list of num_hidden_layers={num_layers} of 0 and 1")
    window = config.size_or_none("sliding_window")
    if not config.flag("use_sliding_window", False):
        window = None
    kinds = config.value("layer_types")
    windows = read_windows(config, num_layers, window)
    if kinds is None:  # transformers: a window for the layers without RoPE
        windows = tuple(None if has_rope else window for has_rope in rotated[:num_layers])
    return {
        **settings,
        **read_attention_biases(config),
        "mlp_bias": config.flag("mlp_bias", False),
        "ropes": tuple(rope if has_rope else None for rope, has_rope in zip(settings["ropes"], rotated, strict=False)),
        "sliding_windows": windows,
    }


def granite(config: ConfigReader) -> dict[str, Any]:
    settings = read_llama_like(config)
    return {
        **settings,
        **read_attention_biases(config),
        "mlp_bias": config.flag("mlp_bias", False),
        "embedding_multiplier": config.number("embedding_multiplier", 1.0),
        "residual_multiplier": config.number("residual_multiplier", 1.0),
        "attention_scale": config.number("attention_multiplier", 1.0),
        "logits_scaling": config.number("logits_scaling", 1.0),
        "sliding_windows": read_one_window(config, settings["num_layers"], None),
    }


def phi3(config: ConfigReader) -> dict[str, Any]:
    aliases = {"su": "longrope", "yarn": "longrope"}  # of older configs
    rope = {"partial": True, "aliases": aliases, "original": 4096}
    settings = read_llama_like(config, rope, rms_norm_eps=1e-5)
    window = config.size_or_none("sliding_window")
    return {**settings, "sliding_windows": read_one_window(config, settings["num_layers"], window)}


def _every_nth_full(config: ConfigReader, num_layers: int, window: int | None, n: int) -> Windows:
    """The windows that ``layer_types`` names; without it, every n-th layer attends to all earlier tokens."""
    windows = read_windows(config, num_layers, window)
    if config.value("layer_types") is None:
        windows = tuple(None if (layer + 1) % n == 0 else window for layer in range(num_layers))
    return windows


def _gemma_2_and_3(config: ConfigReader, pattern: int, default_softcap: float | None) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common; every ``pattern``-th layer attends to all earlier tokens."""
    config.only(use_bidirectional_attention=False)
    settings = read_sizes(
        config,
        "hidden_activation",
        hidden_activation="gelu_pytorch_tanh",
        head_dim=256,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    num_layers, window = settings["num_layers"], config.size_or_none("sliding_window", 4096)
    windows = _every_nth_full(config, num_layers, window, pattern)
    return {
        **settings,
        **read_attention_biases(config),
        "post_norm": True,
        "norm_offset": 1.0,
        "embedding_multiplier": settings["hidden_size"] ** 0.5,
        "attention_scale": config.number("query_pre_attn_scalar", 256) ** -0.5,
        "logits_softcap": config.number_or_none("final_logit_softcapping", default_softcap),
        "sliding_windows": windows,
    }


def gemma(config: ConfigReader) -> dict[str, Any]:
    config.only(use_bidirectional_attention=False)
    settings = read_llama_like(
        config, head_dim=256, num_key_value_heads=16, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True
    )
    # The first checkpoints have "gelu" and mean its tanh form, which transformers uses for them, too.
    activation = "gelu_tanh" if settings["activation"] == "gelu" else settings["activation"]
    return {
        **settings,
        **read_attention_biases(config),
        "activation": activation,
        "norm_offset": 1.0,
        "embedding_multiplier": settings["hidden_size"] ** 0.5,
        "sliding_windows": read_one_window(config, settings["num_layers"], None),
    }


def gemma2(config: ConfigReader) -> dict[str, Any]:
    settings = _gemma_2_and_3(config, pattern=2, default_softcap=30.0)
    softcap = config.number_or_none("attn_logit_softcapping", 50.0)
    return settings | read_one_rope(config, settings) | {"softcap": softcap}


def gemma3_text(config: ConfigReader) -> dict[str, Any]:
    config.only(attn_logit_softcapping=None)  # transformers does not compute it
    config.value("_sliding_window_pattern")  # written by transformers, which reads only the name without the underscore
    settings = _gemma_2_and_3(config, pattern=config.size("sliding_window_pattern", 6), default_softcap=None)
    sliding = config.number_or_none("rope_local_base_freq", 10_000.0)
    ropes = _ropes_by_window(config, settings, full=1_000_000.0, sliding=sliding)
    return {**settings, "qk_norm": "head", "ropes": ropes}


def _ropes_by_window(config: ConfigReader, settings: dict[str, Any], *, full: float, sliding: Any) -> Ropes:
    """One RoPE for the layers with a window and one for the others; ``full``, ``sliding``: their default thetas."""
    sizes = settings["head_dim"], settings["max_position_embeddings"]
    of_full, of_sliding = read_ropes_by_layer_type(config, *sizes, full=full, sliding=sliding)
    return tuple(of_full if window is None else of_sliding for window in settings["sliding_windows"])
