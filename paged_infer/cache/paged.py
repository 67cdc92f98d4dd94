"""PagedCache: keys and values in blocks of a fixed size, anywhere in one pool (PagedAttention, Kwon 2023, section 4).

    block table of a sequence   [ 7, 2, 5 ]          logical block i -> physical block
    pool   block 2 [ t4 t5 t6 t7 ]   block 5 [ t8 t9 .. .. ]   block 7 [ t0 t1 t2 t3 ]      block_size = 4
    slot of token 9 = 5 * block_size + 1

Blocks are assigned elsewhere (``control.blocks.manager``); this class only stores and reads.
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from functools import partial
from pathlib import Path
from typing import Unpack, cast

import torch
from torch import Tensor

from paged_infer.cache.lazy_zeros import untouched_zeros
from paged_infer.cache.spec import LatentForms, LayerSpec, kv_bytes_per_token
from paged_infer.control.step import BlockTransfers
from paged_infer.kernels.attention.metadata import AttentionMetadata, AttentionOptions, ScoreOptions
from paged_infer.kernels.attention.mla import LATENT_SCALES, LatentPlan, latents_at, plan_latent
from paged_infer.kernels.attention.paged_attention import read_slots
from paged_infer.kernels.attention_backends import AttentionBackend, latent_backend, names_layer
from paged_infer.kernels.device import to_device
from paged_infer.kernels.fused.copy_blocks import copy_blocks_reference
from paged_infer.kernels.kv_quant import as_bytes
from paged_infer.kernels.op_sets import TORCH_OPS, Ops

Pairs = ReadOnlyList[tuple[int, int]]
ALIGNMENT = 64  # bytes, of each layer in shared swap space


class PagedCache:
    """The pool of physical blocks, a pair of tensors for each layer: [num_blocks + 1, block_size, H_kv, D].

    A layer with ``v_in_k`` (MLA) has keys alone, and its ``values`` are a view of them. A quantised layer has two more
    tensors, the scales [num_blocks + 1, block_size, H_kv] float16, of keys and values or of a latent's two parts. They
    are copied and swapped with the codes, so sharing or moving a block needs no special case.
    Keys and values are read as they are stored, those of the same step too: how a prompt is cut into chunks does not
    change what its tokens see.
    The last block is never assigned or written: it stays zero, and reads past the end of a sequence can be directed
    to it. On a CPU, a block takes memory from its first write on. ``num_swap_blocks`` more blocks of swap space are in
    the CPU's memory.
    """

    def __init__(
        self,
        spec: ReadOnlyList[LayerSpec],
        num_blocks: int,
        block_size: int,
        backend: AttentionBackend,
        device: torch.device | str = "cpu",
        ops: Ops = TORCH_OPS,
        *,
        num_swap_blocks: int = 0,
    ) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.backend = backend
        self._names_layer = names_layer(backend)
        self.ops = ops
        shape = (num_blocks + 1, block_size)
        self.keys = [untouched_zeros(*shape, s.num_kv_heads, s.k_dim, dtype=s.dtype, device=device) for s in spec]
        self.values = [
            k[..., : s.v_dim]
            if s.v_in_k
            else untouched_zeros(*shape, s.num_kv_heads, s.v_dim, dtype=s.dtype, device=device)
            for k, s in zip(self.keys, spec, strict=True)
        ]
        self.scales = [
            {
                name: untouched_zeros(*shape, s.num_kv_heads, dtype=torch.float16, device=device)
                for name in (() if not s.has_scales else LATENT_SCALES if s.v_in_k else ("k_scale", "v_scale"))
            }
            for s in spec
        ]
        stored = [*self.keys, *(v for v, s in zip(self.values, spec, strict=True) if not s.v_in_k)]
        self._pools = [*map(as_bytes, stored), *(scale for own in self.scales for scale in own.values())]
        self._latent = latent_backend(backend) if any(s.v_in_k for s in spec) else None
        # The GPU's copy engine reads and writes pinned memory directly.
        pinned = torch.device(device).type == "cuda" and num_swap_blocks > 0
        self._swap = [
            torch.empty(num_swap_blocks, *blocks.shape[1:], dtype=blocks.dtype, pin_memory=pinned)
            for blocks in self._pools
        ]

    def move_blocks(self, transfers: BlockTransfers) -> None:
        """Carry out a step's block transfers, in every layer."""
        self.swap_out(transfers.swap_outs)
        self.swap_in(transfers.swap_ins)
        self.copy_blocks(transfers.copies)

    def copy_blocks(self, pairs: Pairs) -> None:
        """Copy each (source, destination). All sources are read before any destination is written."""
        if not pairs:
            return
        read, written = map(set, zip(*pairs, strict=True))
        # The kernel copies all pairs at once, but a block that was freed as a source may be the destination of another.
        copy = self.ops.copy_blocks if read.isdisjoint(written) else copy_blocks_reference
        sources, destinations = to_device(torch.tensor(pairs).T.contiguous(), self.keys[0].device)
        copy(self._pools, sources, destinations)

    def swap_out(self, pairs: Pairs, space: ReadOnlyList[Tensor] | None = None) -> None:
        """Copy each (block, swap block) from the pool to swap space. The host waits, and writes to swap space.

        ``space``: another one than this cache's own; see ``shared_swap_space``.
        """
        if pairs:
            blocks, swap_blocks = torch.tensor(pairs).T.contiguous()
            blocks = to_device(blocks, self.keys[0].device)
            for pool, swap in zip(self._pools, self._swap if space is None else space, strict=True):
                swap[swap_blocks] = pool[blocks].cpu()

    def swap_in(self, pairs: Pairs, space: ReadOnlyList[Tensor] | None = None) -> None:
        """Copy each (swap block, block) from swap space, or another ``space``, to the pool."""
        if pairs:
            swap_blocks, blocks = torch.tensor(pairs).T.contiguous()
            blocks = to_device(blocks, self.keys[0].device)
            for pool, swap in zip(self._pools, self._swap if space is None else space, strict=True):
                pool[blocks] = to_device(swap[swap_blocks], pool.device)

    def shared_swap_space(self, path: Path, num_blocks: int) -> list[Tensor]:
        """Swap space in a file that other processes map too, if their caches are like this one.

        The first to call it makes the file as large as it must be. Once all have, it can be deleted.
        """
        sizes = [num_blocks * pool[0].nbytes for pool in self._pools]
        aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=sum(aligned))
        parts = torch.tensor([], dtype=torch.uint8).set_(storage).split(aligned)  # type: ignore[arg-type]
        return [
            part[:size].view(pool.dtype).view(num_blocks, *pool.shape[1:])
            for part, size, pool in zip(parts, sizes, self._pools, strict=True)
        ]

    def read(self, layer: int, block_table: ReadOnlyList[int], num_tokens: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys [num_tokens, H_kv, D] and values of a sequence's first tokens; float32 if quantised.

        With ``v_in_k``: the latents [num_tokens, 1, r + p], and their first r elements.
        """
        table, device = torch.tensor(block_table), self.keys[layer].device
        token = torch.arange(num_tokens)
        slots = to_device(table[token // self.block_size] * self.block_size + token % self.block_size, device)
        spec, scales = self.spec[layer], self.scales[layer]
        if spec.v_in_k:
            latents = self._latents(layer, slots, torch.float32)[:, None]
            return latents, latents[..., : spec.v_dim]
        keys = read_slots(self.keys[layer], scales.get("k_scale"), slots)
        return keys, read_slots(self.values[layer], scales.get("v_scale"), slots)

    @property
    def bytes_per_block(self) -> int:
        return self.block_size * kv_bytes_per_token(self.spec)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: AttentionMetadata, **scores: Unpack[ScoreOptions]
    ) -> Tensor:
        """Store k and v at their slots, then attend through the block tables: [T, H, D]."""
        self.ops.store_kv(k, v, self.keys[layer], self.values[layer], step.slot_mapping, **self.scales[layer])
        return self.attend_stored(layer, q, step, **scores)

    def slots(self, layer: int, step: AttentionMetadata) -> dict[str, Tensor] | None:
        """Where ``attend`` would store, if it stores what it gets."""
        if self.scales[layer]:
            return None
        return {"k_cache": self.keys[layer], "v_cache": self.values[layer], "slot_mapping": step.slot_mapping}

    def attend_stored(self, layer: int, q: Tensor, step: AttentionMetadata, **scores: Unpack[ScoreOptions]) -> Tensor:
        """Attend through the block tables to what is stored already: [T, H, D]."""
        options: AttentionOptions = {**scores, **cast(AttentionOptions, self.scales[layer])}
        backend = partial(self.backend, layer=layer) if self._names_layer else self.backend  # type: ignore[call-arg]
        return backend(q, self.keys[layer], self.values[layer], step, window=self.spec[layer].window, **options)

    def attend_latent(
        self, layer: int, q: Tensor, latent: Tensor, step: AttentionMetadata, forms: LatentForms
    ) -> Tensor:
        """Store latent [T, 1, r + p]; q [T, H, n + p] -> [T, H, v]. The form is chosen for each sequence."""
        keys, backend = self.keys[layer], self._latent
        assert backend is not None, "the layer's spec has no v_in_k"
        scales = self.scales[layer]
        if scales:
            self.ops.store_latents(latent[:, 0], keys, step.slot_mapping, v_dim=forms.v_dim, **scales)
        else:
            self.ops.store_kv(latent, None, keys, None, step.slot_mapping)
        plan: LatentPlan | None = step.plan.get("latent")
        if plan is None:
            plan = step.plan["latent"] = plan_latent(step, self.block_size, forms.expands)
        absorbed = None
        if plan.rows is not None:
            queries = forms.absorb(q if plan.tokens is None else q[plan.tokens])
            rows, v_dim, scale = plan.rows, forms.v_dim, forms.scale
            absorbed = forms.leave(backend.decode(queries, keys, rows, v_dim=v_dim, scale=scale, **scales))
            if plan.tokens is None:
                return absorbed
        parts = [
            forms.attend_expanded(q[None, tokens], self._latents(layer, slots, q.dtype)[None], backend.dense)[0]
            for tokens, slots in plan.chunks
        ]
        out = q.new_empty(*q.shape[:2], (parts[0] if absorbed is None else absorbed).shape[-1])
        if plan.tokens is not None and absorbed is not None:
            out[plan.tokens] = absorbed
        for (tokens, _), part in zip(plan.chunks, parts, strict=True):
            out[tokens] = part
        return out

    def _latents(self, layer: int, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """What is stored at slots [M], as ``dtype``: [M, r + p]."""
        scales = [self.scales[layer].get(name) for name in LATENT_SCALES]
        return latents_at(self.keys[layer], slots, self.spec[layer].v_dim, dtype, *scales)
