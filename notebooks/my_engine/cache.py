# CHAPTER 03
"""Caches: ``attend`` takes q [T, H, D], k and v [T, H_kv, D] of a step's tokens -> [T, H, D]."""

import torch

from .attention import attention


class NoCache:
    """Nothing is kept: every step holds one whole sequence."""

    def attend(self, layer, q, k, v):
        positions = torch.arange(len(q), device=q.device)
        return attention(q[None], k[None], v[None], positions[None])[0]


# NEW 04
class ContiguousCache:
    """The keys and values of one sequence, in memory reserved for its longest life."""

    def __init__(self, decoder, max_len):
        layers, heads, dim = decoder.kv_shape
        self.keys, self.values = decoder.embedding.new_zeros(2, layers, max_len, heads, dim)
        self.start = 0  # position of the step's first token; set before each step

    def attend(self, layer, q, k, v):
        keys, values, end = self.keys[layer], self.values[layer], self.start + len(k)
        keys[self.start : end], values[self.start : end] = k, v
        positions = torch.arange(self.start, end, device=q.device)
        return attention(q[None], keys[None, :end], values[None, :end], positions[None])[0]


# END 04
