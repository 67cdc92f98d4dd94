# CHAPTER 02
"""Causal attention with grouped heads (GQA): H query heads share H_kv heads of keys and values."""

import torch


def attention(q, k, v, positions):
    """q [B, T, H, D], k and v [B, S, H_kv, D] -> [B, T, H, D]. Position p sees keys 0 to p."""
    weights = masked_scores(q, k, positions).softmax(-1)
    return ungrouped(weights @ v.transpose(1, 2)[:, :, None])


def masked_scores(q, k, positions):
    """Scaled dot products, -inf where a key comes after the query: [B, H_kv, H / H_kv, T, S]."""
    q = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)  # [B, H_kv, H / H_kv, T, D]
    scores = q @ k.permute(0, 2, 3, 1)[:, :, None] * q.shape[-1] ** -0.5
    is_later = torch.arange(k.shape[1], device=k.device) > positions[:, :, None]  # [B, T, S]
    return scores.masked_fill(is_later[:, None, None], -torch.inf)


def ungrouped(out):  # [B, H_kv, H / H_kv, T, D] -> [B, T, H, D]
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


# NEW 07
def flash_attention(q, k, v, positions, tile=64):
    """The same by online softmax: keys come tile by tile, and no score outlives its tile."""
    largest, total, out = -torch.inf, 0.0, 0.0  # of the tiles so far
    for first in range(0, k.shape[1], tile):
        keys, values = k[:, first : first + tile], v[:, first : first + tile]
        scores = masked_scores(q, keys, positions - first)  # [..., T, tile]
        previous, largest = largest, scores.amax(-1, keepdim=True).clamp(min=largest)
        rescale, weights = (previous - largest).exp(), (scores - largest).exp()
        total = total * rescale + weights.sum(-1, keepdim=True)
        out = out * rescale + weights @ values.transpose(1, 2)[:, :, None]
    return ungrouped(out / total)  # no total is 0: every query sees key 0


# END 07
