"""Which keys a query sees. N queries are the last N of M tokens, so the causal diagonal is aligned to the end."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query sees a key: [N, M]. A window counts the query's own token."""
    key = torch.arange(num_keys, device=device)
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
