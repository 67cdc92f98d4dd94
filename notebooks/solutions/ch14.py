"""Solutions to the exercises of chapter 14, many models."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def kv_bytes(config, num_tokens):
    """Keys and values of each KV head; of MLA the latent and the rotated key, of which values are made, too."""
    if "kv_lora_rank" in config:
        numbers = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    else:
        head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
        numbers = 2 * config["num_key_value_heads"] * head_dim
    return 2 * config["num_hidden_layers"] * numbers * num_tokens


def activation_gib(config, num_tokens):
    """A row a token, as wide as the stream, as the dense MLP, and as the stream once for each expert chosen."""
    hidden = config["hidden_size"]
    widths = hidden, config["intermediate_size"], config["num_experts_per_tok"] * hidden
    return tuple(2 * num_tokens * width / 2**30 for width in widths)


def product_us(rows, width, bytes_per_s, operations_per_s):
    """Rows, weights and results moved once, two operations for each multiply-add: the longer of both."""
    moving = 2 * (2 * rows * width + width**2) / bytes_per_s
    computing = 2 * rows * width**2 / operations_per_s
    return 1e6 * max(moving, computing), "memory" if moving > computing else "compute"


def moe_mlp(decoder, x, layer):
    """The router reads the normed rows; each expert that is hit computes its rows at once."""
    x = decoder.norm(x, f"layers.{layer}.post_attention_layernorm")
    probs = decoder.linear(x, f"layers.{layer}.mlp.gate").softmax(-1)
    scores, chosen = probs.topk(decoder.config.num_experts_per_tok)
    if decoder.config.norm_topk_prob:
        scores = scores / scores.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        token, rank = torch.where(chosen == expert)
        name = f"layers.{layer}.mlp.experts.{expert}"
        gate, up = (decoder.linear(x[token], f"{name}.{part}_proj") for part in ("gate", "up"))
        out[token] += scores[token, rank, None] * decoder.linear(F.silu(gate) * up, f"{name}.down_proj")
    return out
