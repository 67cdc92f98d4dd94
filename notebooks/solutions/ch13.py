"""Solutions to the exercises of chapter 13, speculation."""

from __future__ import annotations

import torch


def take(drafts, draws, stop, room):
    """Draws count as long as every draft before them was one, the text has not ended, and there is room."""
    said = []
    for place, token in enumerate(draws):
        said.append(token)
        if token == stop or len(said) == room or drafts[place : place + 1] != [token]:
            break
    return said


def lookup_latest(token_ids, most, size):
    """From the end backwards; the ending itself, which nothing follows, is not looked at."""
    ending = token_ids[-size:]
    for at in range(len(token_ids) - size - 1, -1, -1):
        if token_ids[at : at + size] == ending:
            return token_ids[at + size :][:most]
    return []


def keep_or_redraw(p, q, draft, u, v):
    """What is left of p where q has had its share need not add up to 1: v is stretched over its sum."""
    if u * q[draft] < p[draft]:
        return int(draft)
    ends = (p - q).clamp_min(0).cumsum(dim=-1)
    return int(torch.searchsorted(ends, v * ends[-1:], right=True)[0])


def best_k(alpha, cost, most):
    """``max`` gives the first of equals. The sum of powers needs no special case for alpha = 1."""

    def speed_up(k):
        return sum(alpha**n for n in range(k + 1)) / (1 + k * cost)

    return max(range(most + 1), key=speed_up)
