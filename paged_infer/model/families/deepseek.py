"""DeepSeek-V2 and V3, with latent attention and experts: config.json to settings of ``ModelConfig``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from paged_infer.model.config_reader import ConfigReader
from paged_infer.model.families.common import (
    MAX_EXPERTS,
    MAX_WIDTH,
    read_attention_biases,
    read_one_rope,
    read_one_window,
    read_sizes,
)
from paged_infer.model.mla_config import MLAConfig
from paged_infer.model.moe_config import MoEConfig
from paged_infer.model.rope_config import RopeConfig, yarn_mscale


def deepseek_v2(config: ConfigReader) -> dict[str, Any]:
    # transformers does not normalise V2's scores, and supports these two values of topk_method.
    config.only(norm_topk_prob=False, scoring_func="softmax", mlp_bias=False)
    method, groups = config.value("topk_method", "greedy"), {}
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method={method!r}: must be greedy or group_limited_greedy")
    num_groups, top_groups = config.size_or_none("n_group"), config.size_or_none("topk_group")
    if method == "group_limited_greedy":
        groups = {"num_groups": num_groups or 1, "top_groups": top_groups or 1}
    settings = _read_common(config, interleaved=True)
    first, scaling = config.size("first_k_dense_replace", 0, least=0), config.number("routed_scaling_factor", 1.0)
    return settings | _read_experts(config, settings, first, num_shared=2, scaling=scaling, **groups)


def deepseek_v3(config: ConfigReader) -> dict[str, Any]:
    config.only(scoring_func="sigmoid", topk_method="noaux_tc")
    settings = _read_common(config, interleaved=config.flag("rope_interleave", True))
    first = config.size("first_k_dense_replace", 3, least=0)
    experts = _read_experts(
        config, settings, first, num_shared=1, scaling=config.number("routed_scaling_factor", 2.5),
        scoring="sigmoid", correction_bias=True, group_score="top2_sum",
        renormalise=config.flag("norm_topk_prob", True),
        num_groups=config.size("n_group", 8), top_groups=config.size("topk_group", 4),
    )  # fmt: skip
    return settings | experts


def _read_common(config: ConfigReader, *, interleaved: bool) -> dict[str, Any]:
    """Sizes, latent attention and RoPE, which rotates the last ``qk_rope_head_dim`` dimensions of each head."""
    config.only(pretraining_tp=1, moe_layer_freq=1, ep_size=1)
    for key in ("qk_head_dim", "aux_loss_alpha", "seq_aux", "router_aux_loss_coef", "output_router_logits"):
        config.value(key)  # derived from other keys, or for training
    for key in ("num_mtp_layers", "num_nextn_predict_layers"):
        config.value(key)  # layers that draft tokens, which transformers ignores, too
    mla = MLAConfig(
        q_lora_rank=config.size_or_none("q_lora_rank", 1536, most=MAX_WIDTH),
        kv_lora_rank=config.size("kv_lora_rank", 512, most=MAX_WIDTH),
        qk_nope_head_dim=config.size("qk_nope_head_dim", 128, most=MAX_WIDTH),
        qk_rope_head_dim=config.size("qk_rope_head_dim", 64, most=MAX_WIDTH),
        v_head_dim=config.size("v_head_dim", 128, most=MAX_WIDTH),
    )
    settings = read_sizes(config, head_dim=mla.qk_rope_head_dim) | {"head_dim": mla.qk_rope_head_dim}
    if settings["num_kv_heads"] != settings["num_heads"]:
        raise ValueError(
            f"num_key_value_heads={settings['num_kv_heads']} is not supported; only "
            f"num_attention_heads={settings['num_heads']} is"
        )
    settings |= read_one_rope(config, settings) | read_attention_biases(config)
    ropes: tuple[RopeConfig, ...] = settings["ropes"]
    settings["ropes"] = tuple(replace(rope, interleaved=interleaved) for rope in ropes)
    if (yarn := ropes[0].yarn) is not None and yarn.mscale_all_dim:
        growth = yarn_mscale(yarn.factor, yarn.mscale_all_dim)
        settings["attention_scale"] = mla.qk_head_dim**-0.5 * growth * growth
    return settings | {"mla": mla, "sliding_windows": read_one_window(config, settings["num_layers"], None)}


def _read_experts(
    config: ConfigReader, settings: dict[str, Any], first: int, *, num_shared: int, **routing: Any
) -> dict[str, Any]:
    """The experts of the layers from ``first`` on."""
    num_experts = config.size("n_routed_experts", most=MAX_EXPERTS)
    width = config.size("moe_intermediate_size", most=MAX_WIDTH)
    config.only(num_experts=num_experts, num_local_experts=num_experts)
    shared = config.size("n_shared_experts", num_shared, most=MAX_EXPERTS)
    moe = MoEConfig(
        layers=tuple(layer >= first for layer in range(settings["num_layers"])),
        num_experts=num_experts,
        top_k=config.size("num_experts_per_tok"),
        intermediate_size=width,
        shared_intermediate_size=width * shared,
        float32_router=True,
        **routing,
    )
    return {"moe": moe if any(moe.layers) else None}
