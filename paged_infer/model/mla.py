"""Multi-head Latent Attention (DeepSeek-V2, 2024, section 2.1): the cache holds one latent of a token, not its heads.

    x [T, hidden] -> kv_a -> latent c [r], normalised, and the rotated key k_p [p]       cached: r + p elements
                  -> q_a, norm, q_b (or q alone) -> of each head q_n [n] and, rotated, q_p [p]

    expanded   head h has k = (W_UK c, k_p) and v = W_UV c          H keys and values of each token: for prompts
    absorbed   q_n . W_UK c = (W_UK^T q_n) . c                      all heads read c itself: for decodes
               sum of a_j W_UV c_j = W_UV (sum of a_j c_j)

W_UK [n, r] and W_UV [v, r] of a head are rows of ``kv_up``. The two forms differ in rounding alone. Which is used
depends on a sequence's own numbers of queries and tokens (``MLAConfig.expands``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paged_infer.cache.spec import Cache, DenseAttention, LatentCache
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.attention.mla import pad_heads
from paged_infer.kernels.cpu.linear import Product, heads_product
from paged_infer.kernels.op_sets import Ops
from paged_infer.model.attention import Rope
from paged_infer.model.config import ModelConfig
from paged_infer.model.layers import RMSNorm
from paged_infer.model.linear import DenseMethod, Linear

NORM_EPS = 1e-6  # of the latents' norms, whatever the config's rms_norm_eps is
_MAX_EXPANDED = 1 << 26  # elements of keys, and of values, expanded at once


class LatentAttention(nn.Module):
    """In place of ``Attention`` where ``config.mla`` is set. It is also the ``LatentForms`` that caches call."""

    w_uk: Product | None = None  # W_UK^T and W_UV of each head, once packed
    w_uv: Product | None = None

    def __init__(self, config: ModelConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        assert config.mla is not None
        self.layer, self.ops, self.mla, self.num_heads = layer, ops, config.mla, config.num_heads
        rank, mla = config.mla.q_lora_rank, config.mla
        self.v_dim = mla.kv_lora_rank
        self.scale = config.attention_scale or mla.qk_head_dim**-0.5
        query_rows = config.num_heads * mla.qk_head_dim
        self.q_a = None if rank is None else Linear(config.hidden_size, rank, bias=config.qkv_bias)
        self.q_a_norm = None if rank is None else RMSNorm(rank, NORM_EPS, ops)
        self.q_b = Linear(config.hidden_size if rank is None else rank, query_rows, bias=False)
        self.kv_a = Linear(config.hidden_size, mla.cached_dim, bias=config.qkv_bias)
        self.kv_a_norm = RMSNorm(mla.kv_lora_rank, NORM_EPS, ops)
        up_rows = config.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        self.kv_up = Linear(mla.kv_lora_rank, up_rows, bias=False)
        self.kv_up.stays_dense = True  # in every format of weights: the absorbed form multiplies by its parts
        self.output = Linear(config.num_heads * mla.v_head_dim, config.hidden_size, bias=config.output_bias)

    def prepack(self) -> None:
        """The weights are final: lay out the two matrices of each head for the device's kernels, if they are dense."""
        if isinstance(self.kv_up.method, DenseMethod):
            self.w_uk, self.w_uv = map(self.ops.pack_heads, self._up_matrices())

    def forward(self, x: Tensor, rope: Rope | None, cache: Cache, step: AttentionMetadata) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        q, latent = self.project(x, rope)
        if isinstance(cache, LatentCache):
            out = cache.attend_latent(self.layer, q, latent, step, self)
        else:  # a cache of keys and values alone: one key head, of absorbed queries
            values = latent[..., : self.v_dim]
            out = self.leave(cache.attend(self.layer, self.absorb(q), latent, values, step, scale=self.scale))
        return self.output(out.flatten(1))

    def project(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> queries [T, H, n + p] and what is cached, [T, 1, r + p], both rotated."""
        mla = self.mla
        queries = x
        if self.q_a is not None and self.q_a_norm is not None:
            queries = self.q_a_norm(self.q_a(x), None)[0]
        q = self.q_b(queries).view(len(x), self.num_heads, mla.qk_head_dim)
        c, k_p = self.kv_a(x).split([mla.kv_lora_rank, mla.qk_rope_head_dim], -1)
        c = self.kv_a_norm(c, None)[0]
        q_n, q_p = q.split([mla.qk_nope_head_dim, mla.qk_rope_head_dim], -1)
        if rope is not None:
            cos, sin = rope
            heads = torch.cat((q_p, k_p[:, None]), 1)  # [T, H + 1, p]
            heads = torch.addcmul(heads * cos, heads.roll(mla.qk_rope_head_dim // 2, dims=-1), sin)
            q_p, k_p = heads[:, :-1], heads[:, -1]
        return torch.cat((q_n, q_p), -1), torch.cat((c, k_p), -1)[:, None]

    def expands(self, num_queries: int, length: int) -> bool:
        return self.mla.expands(num_queries, length)

    def absorb(self, q: Tensor) -> Tensor:
        """q [T, H, n + p] -> [T, H, r + p]."""
        q_n, q_p = q.split([self.mla.qk_nope_head_dim, self.mla.qk_rope_head_dim], -1)
        w_uk = self.w_uk or heads_product(self._up_matrices()[0])
        return torch.cat((w_uk(q_n), q_p), -1)

    def leave(self, attended: Tensor) -> Tensor:
        """[T, H, r] -> [T, H, v]."""
        w_uv = self.w_uv or heads_product(self._up_matrices()[1])
        return w_uv(attended)

    def attend_expanded(self, q: Tensor, latents: Tensor, dense: DenseAttention) -> Tensor:
        """q [B, N, H, n + p], latents [B, M, r + p] -> [B, N, H, v]; a few heads at a time, so that they fit memory."""
        mla, w_up = self.mla, self._per_head()
        width = max(mla.qk_head_dim, mla.v_head_dim)
        c, k_p = latents.split([mla.kv_lora_rank, mla.qk_rope_head_dim], -1)
        together = max(1, _MAX_EXPANDED // max(1, latents[..., 0].numel() * width))
        parts = []
        for queries, weight in zip(q.split(together, 2), w_up.split(together), strict=True):
            expanded = F.linear(c, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2]).transpose(1, 2)
            k_n, v = expanded.split([mla.qk_nope_head_dim, mla.v_head_dim], -1)  # [B, h, M, n], [B, h, M, v]
            k = torch.cat((k_n, k_p[:, None].expand(-1, len(weight), -1, -1)), -1)
            queries, k, v = (pad_heads(x, width) for x in (queries.transpose(1, 2), k, v))
            parts.append(dense(queries, k, v, self.scale)[..., : mla.v_head_dim])
        return torch.cat(parts, 1).transpose(1, 2)

    def _up_matrices(self) -> tuple[Tensor, Tensor]:
        """W_UK^T [H, r, n] and W_UV [H, v, r]."""
        w_uk, w_uv = self._per_head().split([self.mla.qk_nope_head_dim, self.mla.v_head_dim], 1)
        return w_uk.mT, w_uv

    def _per_head(self) -> Tensor:
        """[H, n + v, r]"""
        return self.kv_up.method.dense(self.kv_up).view(self.num_heads, -1, self.mla.kv_lora_rank)
