"""The decoder: token ids in, logits out. One model for every family and every rung of the ladder.

It knows nothing of requests, batches or memory: T tokens arrive packed, and ``cache.attend`` is the one place where a
token meets the tokens before it. Which cache it is, the decoder does not know.

    token_ids [T] -> embedding -> layer 0 .. L-1 -> norm -> hidden [T, hidden] -> logits [R, vocab] of chosen rows
                                    |
                                    +-- x + attention(norm(x)):  q, k, v -> cache.attend(layer, q, k, v, step)
                                    +-- x + mlp(norm(x))
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paged_infer.cache.spec import Cache, LayerSpec, StepMeta
from paged_infer.model.config import ModelConfig
from paged_infer.model.layers import MLP, RMSNorm, RotaryEmbedding, apply_rope, make_norm
from paged_infer.model.linear import Linear

Rope = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Multi-head attention with H query heads over H_kv key and value heads (GQA, Ainslie 2023)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        qkv_rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, qkv_rows, bias=config.qkv_bias)  # rows: all q, all k, all v
        self.output = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.output_bias)
        # One weight a head: queries and keys are normalised in one pass, though their weights differ.
        heads = config.num_heads + config.num_kv_heads
        self.qk_norm = RMSNorm((heads, config.head_dim), config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rope: Rope | None, cache: Cache, step: StepMeta) -> Tensor:
        num_qk = self.num_heads + self.num_kv_heads
        qkv = self.qkv(x).view(x.shape[0], num_qk + self.num_kv_heads, self.head_dim)  # [T, H + 2 H_kv, D]
        qk, v = qkv[:, :num_qk], qkv[:, num_qk:]
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        if rope is not None:
            qk = apply_rope(qk, *rope)
        q, k = qk[:, : self.num_heads], qk[:, self.num_heads :]
        out = cache.attend(self.layer, q, k, v, step)  # [T, H, D]
        return self.output(out.reshape(x.shape[0], -1))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rope: Rope | None, cache: Cache, step: StepMeta
    ) -> Tensor:  # [T, hidden] both
        x = x + self.attention(self.attention_norm(x), rope, cache, step)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """A decoder-only transformer. Build it with ``weights.load_decoder``, or directly for random weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size)
            if config.learned_positions
            else None
        )
        self.rotary = None if config.learned_positions else RotaryEmbedding(config)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.final_norm = make_norm(config)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, cache: Cache, step: StepMeta) -> Tensor:
        """token_ids [T], positions in ``step`` [T] -> hidden states after the last norm, [T, hidden]."""
        x = F.embedding(token_ids, self.embedding.weight)
        if self.position_embedding is not None:
            x = x + F.embedding(step.positions, self.position_embedding.weight)
        rope = None if self.rotary is None else self.rotary(step.positions, x.dtype)
        for layer in self.layers:
            x = layer(x, rope, cache, step)
        return self.final_norm(x)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:  # [R, hidden] -> [R, vocab]
        return self.head(hidden)

    def prepack(self) -> None:
        """Lay the matrices out for the device's kernels, once the weights are final."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.prepack()

    def kv_spec(self) -> list[LayerSpec]:
        """What one token leaves in the cache, layer by layer."""
        config = self.config
        return [
            LayerSpec(
                num_kv_heads=config.num_kv_heads,
                k_dim=config.head_dim,
                v_dim=config.head_dim,
                window=window,
                dtype=self.dtype,
            )
            for window in config.sliding_windows
        ]
