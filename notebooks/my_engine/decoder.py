# CHAPTER 03
"""A Qwen3-shaped decoder from its checkpoint. Tokens attend to others only through the cache."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer


class Decoder:
    """The weights, by their names in the checkpoint, and the forward pass."""

    def __init__(self, folder, device="cpu", dtype=torch.float32):
        folder = Path(folder)
        self.config = c = SimpleNamespace(**json.loads((folder / "config.json").read_text()))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tensors = load_file(folder / "model.safetensors").items()
        self.weights = {name.removeprefix("model."): t.to(device, dtype) for name, t in tensors}
        self.embedding = self.weights["embed_tokens.weight"]  # [V, hidden]
        self.head = self.weights.get("lm_head.weight", self.embedding)  # the storyteller's is tied
        pairs = torch.arange(0, c.head_dim, 2, device=device) / c.head_dim
        self.frequencies = c.rope_parameters["rope_theta"] ** -pairs  # [D / 2]
        self.kv_shape = c.num_hidden_layers, c.num_key_value_heads, c.head_dim  # NEW 04

    def __call__(self, token_ids, positions, cache):
        """token_ids and positions, both [T] -> hidden states [T, hidden]."""
        device = self.embedding.device
        x = self.embedding[torch.as_tensor(token_ids, device=device)]
        angles = torch.as_tensor(positions, device=device)[:, None, None] * self.frequencies
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)  # [T, 1, D / 2]
        for layer in range(self.config.num_hidden_layers):
            x = x + self.self_attention(x, layer, rope, cache)
            x = x + self.mlp(x, layer)
        return self.norm(x, "norm")

    def logits(self, hidden):  # [R, hidden] -> [R, V]
        return hidden @ self.head.T

    def self_attention(self, x, layer, rope, cache):
        name, heads = f"layers.{layer}.self_attn", (-1, self.config.head_dim)
        x = self.norm(x, f"layers.{layer}.input_layernorm")
        q, k, v = (self.linear(x, f"{name}.{p}_proj").unflatten(1, heads) for p in "qkv")
        q = rotate(self.norm(q, f"{name}.q_norm"), *rope)  # [T, H, D]
        k = rotate(self.norm(k, f"{name}.k_norm"), *rope)  # [T, H_kv, D], as v
        return self.linear(cache.attend(layer, q, k, v).flatten(1), f"{name}.o_proj")

    def mlp(self, x, layer):  # SwiGLU
        x = self.norm(x, f"layers.{layer}.post_attention_layernorm")
        gate, up = (self.linear(x, f"layers.{layer}.mlp.{p}_proj") for p in ("gate", "up"))
        return self.linear(F.silu(gate) * up, f"layers.{layer}.mlp.down_proj")

    def norm(self, x, name):  # RMSNorm over the last dimension, in float32
        mean_square = x.float().square().mean(-1, keepdim=True)
        scaled = x.float() * torch.rsqrt(mean_square + self.config.rms_norm_eps)
        return scaled.to(x.dtype) * self.weights[f"{name}.weight"]

    def linear(self, x, name):
        return F.linear(x, self.weights[f"{name}.weight"])


def rotate(x, cos, sin):
    """RoPE: each pair (x_i, x_{i + D/2}) of x [T, H, D] is turned by its angle."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
