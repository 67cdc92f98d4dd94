"""Solutions of chapter 02, attention."""

from __future__ import annotations

import torch


def packed_mask(lengths):
    """Same text, and not later: the place in the row serves, since texts stand one after the other."""
    text = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))  # [T]
    place = torch.arange(len(text))
    return (text == text[:, None]) & (place <= place[:, None])


def grouped_attention(q, k, v):
    """The queries of a group, of all its heads, are the rows of one product with their shared head."""
    (num_heads, num_queries, dim), (num_kv_heads, num_keys, _) = q.shape, k.shape
    group = num_heads // num_kv_heads
    rows = q.reshape(num_kv_heads, group * num_queries, dim)
    scores = (rows @ k.transpose(1, 2) / dim**0.5).view(num_kv_heads, group, num_queries, num_keys)
    key = torch.arange(num_keys, device=q.device)
    seen = key <= key[num_keys - num_queries :, None]  # [N, M]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return (weights.view(num_kv_heads, group * num_queries, num_keys) @ v).view(q.shape)


def neighbours_to_halves(weight, num_heads):
    """Row 2 i + j of a head, number j of pair i, goes to row j * D / 2 + i."""
    pairs = weight.view(num_heads, -1, 2, weight.shape[1])  # [heads, D / 2, 2, hidden]
    return pairs.transpose(1, 2).reshape(weight.shape)


def swiglu_width(hidden_size, multiple_of):
    """In integers: 8 h / 3 over the multiple, rounded up once."""
    return -(-8 * hidden_size // (3 * multiple_of)) * multiple_of
