"""MLAConfig: the widths of Multi-head Latent Attention, which caches one latent of a token for all heads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MLAConfig:
    """Widths in elements, under the names of config.json (DeepSeek-V2, 2024, section 2.1).

    Attributes:
        q_lora_rank: of the latent that queries are made from; None: they are made from the hidden state.
        kv_lora_rank: r, of the latent that keys and values are made from, which is cached.
        qk_nope_head_dim: n, the part of a query and key head without positions.
        qk_rope_head_dim: p, the rotated part; the key's is shared by all heads and cached after the latent.
        v_head_dim: v, of a value head.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def cached_dim(self) -> int:
        """Elements that a token takes in the cache of one layer: r + p, 576 in DeepSeek's models."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def expands(self, num_queries: int, length: int) -> bool:
        """Whether expanding a sequence's latents into keys and values takes fewer multiplications than absorbing.

        The forms differ in these multiplications of a head. Absorbed, each of the ``num_queries`` last tokens takes
        2 r + p with each key, and r (n + v) to enter and leave the latent space. Expanded, it takes n + p + v with each
        key, and each of the ``length`` tokens takes r (n + v). A single query is always absorbed: it would expand the
        whole cache.

        >>> v3 = MLAConfig(
        ...     q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ... )
        >>> [v3.expands(1, 4096), v3.expands(100, 4096), v3.expands(512, 4096), v3.expands(100, 100)]
        [False, False, True, True]
        """
        wide = self.qk_nope_head_dim + self.v_head_dim
        saved = num_queries * length * (2 * self.kv_lora_rank - wide)
        return num_queries > 1 and saved > (length - num_queries) * self.kv_lora_rank * wide

    def num_parameters(self, hidden_size: int, num_heads: int, *, has_bias: bool) -> int:
        """Of one layer's attention."""
        rank, query_rows = self.q_lora_rank, num_heads * self.qk_head_dim
        queries = hidden_size * query_rows
        if rank is not None:
            queries = hidden_size * rank + rank + rank * query_rows + has_bias * rank
        latents = hidden_size * self.cached_dim + self.kv_lora_rank + has_bias * self.cached_dim
        expansion = self.kv_lora_rank * num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        return queries + latents + expansion + hidden_size * num_heads * self.v_head_dim + has_bias * hidden_size
