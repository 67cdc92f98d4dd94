"""Solutions to the exercises of chapter 04, the KV cache."""

from __future__ import annotations

import torch
from my_engine.cache import ContiguousCache


def rows_computed(requests):
    """Naive: a prompt of p and the i tokens so far, for each of n. Cached: all but the last output token, once."""
    return sum(p + i for p, n in requests for i in range(n)), sum(p + n - 1 for p, n in requests)


def attend_chunk(q, keys, values):
    """Query t of T stands at place S - T + t, so the triangle is laid at the bottom right."""
    (num_queries, dim), num_keys = q.shape, keys.shape[0]
    seen = torch.ones(num_queries, num_keys).bool().tril(diagonal=num_keys - num_queries)
    weights = (q @ keys.T / dim**0.5).masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return weights @ values


def left_padding(lengths):
    """Columns less padding; causal, from the first real column on, and the diagonal for padding itself."""
    width = max(lengths)
    columns, pads = torch.arange(width), width - torch.tensor(lengths)
    positions = (columns - pads[:, None]).clamp(min=0)
    seen = (columns <= columns[:, None]) & (columns >= pads[:, None, None])
    return positions, seen | torch.eye(width).bool()


def generate_in_chunks(decoder, token_ids, max_tokens, chunk):
    """A step ends ``chunk`` tokens further on, or with the text; only then is there a row to choose a token from."""
    token_ids, prompt_len = list(token_ids), len(token_ids)
    cache = ContiguousCache(decoder, prompt_len + max_tokens)
    while len(token_ids) < prompt_len + max_tokens:
        end = min(len(token_ids), cache.start + chunk)
        hidden = decoder(token_ids[cache.start : end], range(cache.start, end), cache)
        cache.start = end
        if end == len(token_ids):
            token_ids.append(decoder.logits(hidden[-1]).argmax().item())
    return token_ids[prompt_len:]
