"""Families whose layers have experts: config.json to settings of ``ModelConfig``, with transformers' defaults."""

from __future__ import annotations

from typing import Any

from paged_infer.model.config_reader import ConfigReader
from paged_infer.model.families.common import (
    MAX_EXPERTS,
    MAX_WIDTH,
    read_attention_biases,
    read_llama_like,
    read_one_window,
    read_windows,
)
from paged_infer.model.moe_config import MoEConfig

_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def gpt_oss(config: ConfigReader) -> dict[str, Any]:
    rope = {"theta": 150_000.0, "default": _GPT_OSS_ROPE}
    settings = read_llama_like(config, rope, num_key_value_heads=8, head_dim=64, rms_norm_eps=1e-5)
    num_layers, bias = settings["num_layers"], config.flag("attention_bias", True)
    window = config.size_or_none("sliding_window", 128)
    windows = read_windows(config, num_layers, window)
    if config.value("layer_types") is None:
        windows = tuple(None if layer % 2 else window for layer in range(num_layers))
    moe = MoEConfig(
        layers=(True,) * num_layers,
        num_experts=_num_experts(config, 128, least=1),
        top_k=config.size("num_experts_per_tok", 4),
        intermediate_size=settings["intermediate_size"],
        scoring="softmax_of_top_k",
        router_bias=True,
        expert_bias=True,
        swiglu_limit=config.number("swiglu_limit", 7.0),
        swiglu_alpha=config.number("swiglu_alpha", 1.702),
    )
    return {
        **settings,
        "attention_sinks": True,
        "qkv_bias": bias,
        "output_bias": bias,
        "moe": moe,
        "sliding_windows": windows,
    }


def mixtral(config: ConfigReader) -> dict[str, Any]:
    defaults = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5}
    settings, window = read_llama_like(config, {"theta": 1e6}, **defaults), config.size_or_none("sliding_window")
    num_layers = settings["num_layers"]
    moe = MoEConfig(
        layers=(True,) * num_layers,
        num_experts=_num_experts(config, 8, least=1),
        top_k=config.size("num_experts_per_tok", 2),
        intermediate_size=settings["intermediate_size"],
        renormalise=True,
    )
    return {**settings, "moe": moe, "sliding_windows": read_one_window(config, num_layers, window)}


def qwen2_moe(config: ConfigReader) -> dict[str, Any]:
    settings, window = read_llama_like(config, num_key_value_heads=16), _window(config)
    num_layers, end = settings["num_layers"], config.size("max_window_layers", 28, least=0)
    windows = read_windows(config, num_layers, window)
    if config.value("layer_types") is None:
        windows = tuple(window if layer % 2 == 0 and layer < end else None for layer in range(num_layers))
    num_experts = config.size("num_experts", 60, least=0, most=MAX_EXPERTS)
    shared = config.size("shared_expert_intermediate_size", 5632, most=MAX_WIDTH)
    return {
        **settings,
        "qkv_bias": config.flag("qkv_bias", True),
        "moe": _qwen_moe(config, num_layers, num_experts, 4, 1408, shared_intermediate_size=shared, shared_gate=True),
        "sliding_windows": windows,
    }


def qwen3_moe(config: ConfigReader) -> dict[str, Any]:
    settings, num_experts = read_llama_like(config, num_key_value_heads=4), _num_experts(config, 128, least=0)
    return {
        **settings,
        **read_attention_biases(config),
        "qk_norm": "head",
        "moe": _qwen_moe(config, settings["num_layers"], num_experts, 8, 768),
        "sliding_windows": read_one_window(config, settings["num_layers"], _window(config)),
    }


def _window(config: ConfigReader) -> int | None:
    """Without ``use_sliding_window`` the size has no effect: transformers writes 0 or null then."""
    if config.flag("use_sliding_window", False):
        return config.size_or_none("sliding_window", 4096)
    config.value("sliding_window")
    return None


def _qwen_moe(
    config: ConfigReader, num_layers: int, num_experts: int, top_k: int, width: int, **settings: Any
) -> MoEConfig | None:
    """Experts in every ``decoder_sparse_step``-th layer, except in ``mlp_only_layers``; None if no layer has any."""
    step, dense = config.size("decoder_sparse_step", 1), config.value("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ValueError(f"mlp_only_layers={dense!r}: must be a list of layers")
    top_k = config.size("num_experts_per_tok", top_k)
    width = config.size("moe_intermediate_size", width, most=MAX_WIDTH)
    renormalise = config.flag("norm_topk_prob", False)
    layers = tuple((layer + 1) % step == 0 and layer not in dense for layer in range(num_layers))
    if not num_experts or not any(layers):
        return None
    return MoEConfig(
        layers=layers,
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=width,
        renormalise=renormalise,
        **settings,
    )


def _num_experts(config: ConfigReader, default: int, *, least: int) -> int:
    """Under either of its two names, which transformers reads as one."""
    names = [name for name in ("num_local_experts", "num_experts") if config.value(name) is not None]
    counts = {name: config.size(name, default, least=least, most=MAX_EXPERTS) for name in names or ["num_experts"]}
    if len({*counts.values()}) > 1:
        raise ValueError(
            f"num_local_experts={counts['num_local_experts']} contradicts num_experts={counts['num_experts']}"
        )
    return next(iter(counts.values()))
