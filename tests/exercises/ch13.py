"""Wrong answers to the exercises of chapter 13."""

from __future__ import annotations

import torch
from planted import wrong


@wrong("take", "does not count")
def keeps_whatever_matches(drafts, draws, stop, room):
    said = [draw for place, draw in enumerate(draws) if place == len(drafts) or draw == drafts[place]]
    return said[:room]


@wrong("take", "the draw after the last accepted draft")
def forgets_its_own_draw(drafts, draws, stop, room):
    said = []
    for draft, draw in zip(drafts, draws, strict=False):
        if draft != draw:
            break
        said.append(draw)
    return said[:room]


@wrong("take", "nothing follows it")
def talks_on_behind_the_stop(drafts, draws, stop, room):
    said = []
    for place, token in enumerate(draws):
        said.append(token)
        if drafts[place : place + 1] != [token]:
            break
    return said[:room]


@wrong("lookup_latest", "followed the first")
def takes_the_first(token_ids, most, size):
    for at in range(len(token_ids) - size):
        if token_ids[at : at + size] == token_ids[-size:]:
            return token_ids[at + size :][:most]
    return []


@wrong("lookup_latest", "only the ending itself is followed by nothing")
def finds_the_ending(token_ids, most, size):
    for at in range(len(token_ids) - size, -1, -1):
        if token_ids[at : at + size] == token_ids[-size:]:
            return token_ids[at + size :][:most]
    return []


@wrong("lookup_latest", "it may overlap")
def looks_before_the_ending_only(token_ids, most, size):
    for at in range(len(token_ids) - 2 * size, -1, -1):
        if token_ids[at : at + size] == token_ids[-size:]:
            return token_ids[at + size :][:most]
    return []


def _from(weights, v):
    return int((weights.cumsum(dim=-1) <= v).sum())


@wrong("keep_or_redraw", "Is the ratio q / p")
def turns_the_ratio_over(p, q, draft, u, v):
    left = (p - q).clamp_min(0)
    return draft if u < q[draft] / p[draft] else _from(left / left.sum(), v)


@wrong("keep_or_redraw", "redraws from p")
def redraws_from_p(p, q, draft, u, v):
    return draft if u < p[draft] / q[draft] else _from(p, v)


@wrong("keep_or_redraw", "Is it normalised")
def does_not_normalise(p, q, draft, u, v):
    ends = (p - q).clamp_min(0).cumsum(dim=-1)
    return draft if u < p[draft] / q[draft] else int(torch.searchsorted(ends[:2], torch.tensor([v]))[0])


def _tokens(alpha, k):
    return sum(alpha**n for n in range(k + 1))


@wrong("best_k", "no drafts is better")
def always_drafts(alpha, cost, most):
    return max(range(1, most + 1), key=lambda k: _tokens(alpha, k) / (1 + k * cost))


@wrong("best_k", "as many as allowed|without drafts|was forgotten")
def forgets_the_cost(alpha, cost, most):
    return max(range(most + 1), key=lambda k: _tokens(alpha, k))


@wrong("best_k", "divides by 0")
def divides_by_zero(alpha, cost, most):
    return max(range(most + 1), key=lambda k: (1 - alpha ** (k + 1)) / (1 - alpha) / (1 + k * cost))
