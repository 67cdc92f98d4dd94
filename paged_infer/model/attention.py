"""Attention of one layer: the projections, rotary positions, and the call to the cache."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from paged_infer.cache.spec import Cache, SlottedCache
from paged_infer.kernels.attention.metadata import AttentionMetadata, ScoreOptions
from paged_infer.kernels.op_sets import Ops
from paged_infer.model.config import ModelConfig
from paged_infer.model.linear import Linear
from paged_infer.model.parallel import ALONE, Collective

Rope = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Multi-head attention with H query heads over H_kv key and value heads (GQA, Ainslie 2023).

    Args:
        config: the sizes of a rank's own heads.
        parallel: the ranks over which the norm of a whole width (OLMo-2) is taken.
    """

    def __init__(self, config: ModelConfig, layer: int, ops: Ops, parallel: Collective = ALONE) -> None:
        super().__init__()
        self.layer, self.ops, self.eps, self.norm_offset = layer, ops, config.norm_eps, config.norm_offset
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        qkv_rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, qkv_rows, bias=config.qkv_bias)  # rows: all q, all k, all v
        self.output = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.output_bias)
        # One weight per head, so that queries and keys are normalised in one pass though their weights differ.
        norm_shape = (config.num_heads + config.num_kv_heads, config.head_dim)
        self.qk_norm_weight = nn.Parameter(torch.empty(norm_shape)) if config.qk_norm else None
        self.normalises_heads = config.qk_norm == "head"
        self.parallel = parallel
        self.sinks = nn.Parameter(torch.empty(config.num_heads)) if config.attention_sinks else None
        self.scores = score_options(config)

    def forward(self, x: Tensor, rope: Rope | None, cache: Cache, step: AttentionMetadata) -> Tensor:
        num_qk = self.num_heads + self.num_kv_heads
        qkv = self.qkv(x).view(x.shape[0], num_qk + self.num_kv_heads, self.head_dim)  # [T, H + 2 H_kv, D]
        if self.qk_norm_weight is not None and not self.normalises_heads:
            self._normalise_width(qkv, self.qk_norm_weight)
        qk, v = qkv[:, :num_qk], qkv[:, num_qk:]
        fuses = self.ops.fuses_store and rope is not None
        slots = cache.slots(self.layer, step) if fuses and isinstance(cache, SlottedCache) else None
        if rope is not None:
            qk = self.ops.qk_norm_rope(
                qkv,
                *rope,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                norm_weight=self.qk_norm_weight if self.normalises_heads else None,
                eps=self.eps,
                norm_offset=self.norm_offset,
                **(slots or {}),
            )
        q, k = qk[:, : self.num_heads], qk[:, self.num_heads :]
        scores = self.scores if self.sinks is None else self.scores | {"sinks": self.sinks}
        out = (
            cache.attend(self.layer, q, k, v, step, **scores)
            if slots is None
            else cast(SlottedCache, cache).attend_stored(self.layer, q, step, **scores)
        )  # [T, H, D]
        return self.output(out.reshape(x.shape[0], -1))

    def _normalise_width(self, qkv: Tensor, weight: Tensor) -> None:
        """RMSNorm of all query heads at once, and of all key heads, in place (OLMo-2)."""
        if self.parallel.size > 1:
            return self._normalise_width_of_ranks(qkv, weight)
        for heads in (slice(self.num_heads), slice(self.num_heads, self.num_heads + self.num_kv_heads)):
            wide = qkv[:, heads].view(len(qkv), -1)  # [T, H D]
            normed, _ = self.ops.add_rms_norm(wide, None, weight[heads].flatten(), self.eps, self.norm_offset)
            wide.copy_(normed)

    def _normalise_width_of_ranks(self, qkv: Tensor, weight: Tensor) -> None:
        """The same of all ranks' heads, which takes one more sum a layer, of two numbers a token.

        A key head that several ranks have counts as often as any other, so the mean of means is that of the whole.
        """
        parts = qkv[:, : self.num_heads], qkv[:, self.num_heads : self.num_heads + self.num_kv_heads]
        means = torch.stack([part.float().square().mean((1, 2)) for part in parts], 1)  # [T, 2]
        factors = (self.parallel.all_reduce(means) / self.parallel.size + self.eps).rsqrt()
        weights = weight.split([self.num_heads, self.num_kv_heads])
        for part, factor, own in zip(parts, factors.unbind(1), weights, strict=True):
            part.copy_((part.float() * factor[:, None, None]).to(part.dtype) * (own + self.norm_offset))


def score_options(config: ModelConfig) -> ScoreOptions:
    """What a model asks of the attention kernels besides the sizes; empty for most. Each layer has its own sinks."""
    options: ScoreOptions = {}
    if config.mla is not None:  # its kernels have a contract of their own
        return options
    if config.attention_scale not in (None, config.head_dim**-0.5):
        options["scale"] = config.attention_scale
    if config.softcap is not None:
        options["softcap"] = config.softcap
    if config.attention_sinks:
        options["sinks"] = None
    return options
