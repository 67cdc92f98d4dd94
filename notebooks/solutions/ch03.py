"""Solutions of chapter 03, the decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def neighbours_to_halves(weight, num_heads):
    """Row 2 i + j of a head, number j of pair i, goes to row j * D / 2 + i."""
    pairs = weight.view(num_heads, -1, 2, weight.shape[1])  # [heads, D / 2, 2, hidden]
    return pairs.transpose(1, 2).reshape(weight.shape)


def swiglu_width(hidden_size, multiple_of):
    """In integers: 8 h / 3 over the multiple, rounded up once."""
    return -(-8 * hidden_size // (3 * multiple_of)) * multiple_of


def mean_vectors(hidden, lengths):
    """Padding is multiplied by 0. The mean's divisor may be left out, since the length is made 1 afterwards."""
    own = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]  # [B, T]
    return F.normalize((hidden * own[..., None]).sum(dim=1), dim=-1)


def decoder_layer(x, w, positions, head_dim):
    """Two additions to the stream. The numbers of heads are those of the projections' rows."""
    norm = rms_norm(x, w["input_layernorm.weight"])
    q, k, v = (
        (norm @ w[f"self_attn.{name}_proj.weight"].T).unflatten(1, (-1, head_dim)).transpose(0, 1) for name in "qkv"
    )  # [H or H_kv, T, D]
    q = rotary(rms_norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rotary(rms_norm(k, w["self_attn.k_norm.weight"]), positions)
    k, v = (part.repeat_interleave(len(q) // len(k), dim=0) for part in (k, v))
    scores = q @ k.transpose(1, 2) / head_dim**0.5
    weights = scores.masked_fill(positions > positions[:, None], -torch.inf).softmax(dim=-1)
    x = x + (weights @ v).transpose(0, 1).flatten(1) @ w["self_attn.o_proj.weight"].T
    norm = rms_norm(x, w["post_attention_layernorm.weight"])
    gate, up, down = (w[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return x + (F.silu(norm @ gate.T) * (norm @ up.T)) @ down.T


def rms_norm(x, weight, eps=1e-6):
    """[..., dim] -> [..., dim], as the chapter builds it."""
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def rotary(x, positions, theta=10_000.0):
    """[..., T, D] -> [..., T, D], as the chapter builds it."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** -(torch.arange(half, device=x.device) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)
