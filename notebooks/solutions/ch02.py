"""Solutions of chapter 02, attention."""

from __future__ import annotations

import torch


def window_mask(num_queries, num_keys, window):
    """Not later than the query, and fewer than ``window`` positions before it."""
    key = torch.arange(num_keys)
    query = torch.arange(num_keys - num_queries, num_keys)[:, None]
    return (key <= query) & (key > query - window)


def packed_mask(lengths):
    """Same text, and not later: the place in the row serves, since texts stand one after the other."""
    text = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))  # [T]
    place = torch.arange(len(text))
    return (text == text[:, None]) & (place <= place[:, None])


def kv_bytes(config, bytes_of_a_number):
    """A key and a value, in each layer, for each head of keys and values."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    return 2 * config["num_hidden_layers"] * kv_heads * head_dim * bytes_of_a_number


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
