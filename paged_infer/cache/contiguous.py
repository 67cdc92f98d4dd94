"""ContiguousCache: the cache of the cached and static baselines. Each sequence has one row of its maximum length.

row 0  [ . . p p p p o o _ _ _ _ ]      .  padding on the left, so that all rows end at the same column
row 1  [ p p p p p p o o _ _ _ _ ]      p  prompt    o  output so far    _  reserved, still empty
                        ^ next column
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from typing import Unpack

import torch
from torch import Tensor

from paged_infer.cache.spec import LatentForms, LayerSpec, kv_bytes_per_token
from paged_infer.kernels.attention.metadata import AttentionMetadata, ScoreOptions
from paged_infer.kernels.attention.paged_sdpa import masked_sdpa


class ContiguousCache:
    """Keys and values of ``len(pad_lens)`` sequences that start, grow and finish together.

    Args:
        spec: the cache entry of one token, for each layer.
        max_len: columns reserved for each row, padding included.
        pad_lens: columns of padding on the left of each row.

    ``keys`` and ``values`` hold one tensor per layer: [rows, H_kv, max_len, D]. With ``v_in_k``, values are views.
    """

    def __init__(
        self,
        spec: ReadOnlyList[LayerSpec],
        max_len: int,
        pad_lens: ReadOnlyList[int],
        device: torch.device | str = "cpu",
    ) -> None:
        batch = len(pad_lens)
        self.spec = spec
        self.max_len = max_len
        self.pad_lens = torch.tensor(pad_lens, device=device)
        # Heads before columns: attention then reads the keys of a head contiguously.
        heads = [(batch, s.num_kv_heads, max_len) for s in spec]
        self.keys = [torch.zeros(*h, s.k_dim, dtype=s.dtype, device=device) for h, s in zip(heads, spec, strict=True)]
        self.values = [
            k[..., : s.v_dim] if s.v_in_k else torch.zeros(*h, s.v_dim, dtype=s.dtype, device=device)
            for h, k, s in zip(heads, self.keys, spec, strict=True)
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes reserved, whether filled or not."""
        return len(self.pad_lens) * self.max_len * kv_bytes_per_token(self.spec)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: AttentionMetadata, **scores: Unpack[ScoreOptions]
    ) -> Tensor:
        """q [T, H, D], k and v [T, H_kv, D] with T = rows * columns of this step, row by row -> [T, H, D]."""
        batch, end = len(self.pad_lens), step.max_seq_len
        columns = q.shape[0] // batch
        start = end - columns
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, start:end] = k.view(batch, columns, *k.shape[1:]).transpose(1, 2)
        if not self.spec[layer].v_in_k:
            values[:, :, start:end] = v.view(batch, columns, *v.shape[1:]).transpose(1, 2)
        out = masked_sdpa(
            q.view(batch, columns, *q.shape[1:]).transpose(1, 2),  # [B, H, columns, D]
            keys[:, :, :end],
            values[:, :, :end],
            self._mask(start, end, self.spec[layer].window, step),
            **scores,
        )
        return out.transpose(1, 2).reshape(q.shape[0], q.shape[1], -1)

    def attend_latent(
        self, layer: int, q: Tensor, latent: Tensor, step: AttentionMetadata, forms: LatentForms
    ) -> Tensor:
        """q [T, H, n + p], latent [T, 1, r + p] -> [T, H, v]; the rows are equally long, so they have one form."""
        batch, end = len(self.pad_lens), step.max_seq_len
        columns = q.shape[0] // batch
        start = end - columns
        if not forms.expands(columns, end):
            values = latent[..., : forms.v_dim]
            return forms.leave(self.attend(layer, forms.absorb(q), latent, values, step, scale=forms.scale))
        latents, mask = self.keys[layer][:, 0], self._mask(start, end, None, step)
        latents[:, start:end] = latent.view(batch, columns, -1)

        def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            return masked_sdpa(q, k, v, mask, scale=scale)

        return forms.attend_expanded(q.unflatten(0, (batch, columns)), latents[:, :end], dense).flatten(0, 1)

    def _mask(self, start: int, end: int, window: int | None, step: AttentionMetadata) -> Tensor:
        """True where a query sees a column: [B, 1, end - start, end]. Layers with the same window share it."""
        if ("mask", window) not in step.plan:
            key = torch.arange(end, device=self.pad_lens.device)
            query = torch.arange(start, end, device=self.pad_lens.device)[:, None]
            seen = key <= query
            if window is not None:
                seen &= key > query - window
            seen = seen & (key >= self.pad_lens[:, None, None])
            # A padding query sees itself: softmax over an empty row would be NaN, and 0 * NaN spreads.
            step.plan["mask", window] = (seen | (key == query))[:, None]
        return step.plan["mask", window]
