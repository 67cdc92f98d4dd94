"""Solutions of chapter 01, tokens to text."""

from __future__ import annotations

import torch
from my_engine.sampler import sample


def next_tokens(logits, lengths):
    """Row b's last token stands in column ``lengths[b] - 1``; what comes after it is padding."""
    rows = torch.arange(len(lengths), device=logits.device)
    return logits[rows, lengths - 1].argmax(dim=-1)  # [B, V] -> [B]


def keep_top_p_rows(probs, top_p):
    """Sort, keep while less than top_p lies before, and scatter the mask back to the order of the tokens."""
    ordered, ids = probs.sort(dim=1, descending=True)
    before = ordered.cumsum(dim=1) - ordered  # [R, V], 0 for the first: it always stays
    keep = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    return torch.zeros_like(keep).scatter(1, ids, keep)


def perplexity(logits, token_ids):
    """``logits[t]`` predict token t + 1, so the last row has no target."""
    targets = torch.tensor(token_ids[1:], device=logits.device)
    return torch.nn.functional.cross_entropy(logits[:-1], targets).exp().item()  # of a mean, in nats


def sample_top_n_sigma(logits, params, position, n):
    """What is cut gets -inf, on a copy; the noise of the others does not move."""
    bar = logits.max() - n * logits.std()
    return sample(logits.masked_fill(logits < bar, -torch.inf), params, position)
