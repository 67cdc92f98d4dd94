"""Attention of one layer: the projections, rotary positions, and the call to the cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paged_infer.cache.spec import Cache, SlottedCache
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.op_sets import Ops
from paged_infer.model.config import ModelConfig
from paged_infer.model.linear import Linear

Rope = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Multi-head attention with H query heads over H_kv key and value heads (GQA, Ainslie 2023)."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.layer, self.ops, self.eps = layer, ops, config.norm_eps
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        qkv_rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, qkv_rows, bias=config.qkv_bias)  # rows: all q, all k, all v
        self.output = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.output_bias)
        # One weight per head, so that queries and keys are normalised in one pass though their weights differ.
        norm_shape = (config.num_heads + config.num_kv_heads, config.head_dim)
        self.qk_norm_weight = nn.Parameter(torch.empty(norm_shape)) if config.qk_norm else None

    def forward(self, x: Tensor, rope: Rope | None, cache: Cache, step: AttentionMetadata) -> Tensor:
        num_qk = self.num_heads + self.num_kv_heads
        qkv = self.qkv(x).view(x.shape[0], num_qk + self.num_kv_heads, self.head_dim)  # [T, H + 2 H_kv, D]
        qk, v = qkv[:, :num_qk], qkv[:, num_qk:]
        fuses = self.ops.fuses_store and rope is not None
        slotted = cache if fuses and isinstance(cache, SlottedCache) else None
        if rope is not None:
            qk = self.ops.qk_norm_rope(
                qkv,
                *rope,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                norm_weight=self.qk_norm_weight,
                eps=self.eps,
                **({} if slotted is None else slotted.slots(self.layer, step)),
            )
        q, k = qk[:, : self.num_heads], qk[:, self.num_heads :]
        out = (
            cache.attend(self.layer, q, k, v, step) if slotted is None else slotted.attend_stored(self.layer, q, step)
        )  # [T, H, D]
        return self.output(out.reshape(x.shape[0], -1))
