"""PagedCache: keys and values in blocks of a fixed size, anywhere in one pool (PagedAttention, Kwon 2023, section 4).

    block table of a sequence   [ 7, 2, 5 ]          logical block i -> physical block
    pool   block 2 [ t4 t5 t6 t7 ]   block 5 [ t8 t9 .. .. ]   block 7 [ t0 t1 t2 t3 ]      block_size = 4
    slot of token 9 = 5 * block_size + 1

Who owns which block is decided elsewhere (``control.block_manager``); this class only stores and reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paged_infer.cache.spec import LayerSpec, StepMeta, kv_bytes_per_token
from paged_infer.kernels.registry import AttentionBackend
from paged_infer.kernels.store_kv import store_kv


class PagedCache:
    """The pool of physical blocks, one pair of tensors a layer: [num_blocks + 1, block_size, H_kv, D].

    The last block belongs to nobody and is never written: it stays zero, and reading past a sequence's end can be
    pointed at it.
    """

    def __init__(
        self,
        spec: Sequence[LayerSpec],
        num_blocks: int,
        block_size: int,
        backend: AttentionBackend,
        device: torch.device | str = "cpu",
    ) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.backend = backend
        shape = (num_blocks + 1, block_size)
        self.keys = [torch.zeros(*shape, s.num_kv_heads, s.k_dim, dtype=s.dtype, device=device) for s in spec]
        self.values = [
            torch.zeros(*shape, s.num_kv_heads, s.v_dim, dtype=s.dtype, device=device) for s in spec
        ]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in every layer. All sources are read before any is written."""
        if pairs:
            sources, destinations = torch.tensor(pairs, device=self.keys[0].device).unbind(1)
            for blocks in (*self.keys, *self.values):
                blocks[destinations] = blocks[sources]

    @property
    def bytes_per_block(self) -> int:
        return self.block_size * kv_bytes_per_token(self.spec)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: StepMeta) -> Tensor:
        """Store k and v at their slots, then attend through the block tables: [T, H, D]."""
        keys, values = self.keys[layer], self.values[layer]
        store_kv(k, v, keys, values, step.slot_mapping)
        return self.backend(q, keys, values, step, window=self.spec[layer].window)
