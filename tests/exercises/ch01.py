"""Wrong answers to the exercises of chapter 01."""

from __future__ import annotations

import torch
from planted import wrong


@wrong("next_tokens", "last column, which in rows 0 and 2 is padding")
def reads_the_padding(logits, lengths):
    return logits[:, -1].argmax(dim=-1)


@wrong("next_tokens", "one column late")
def reads_one_late(logits, lengths):
    last = lengths.clamp(max=logits.shape[1] - 1)
    return logits[torch.arange(len(lengths)), last].argmax(dim=-1)


@wrong("next_tokens", r"has shape \(3, 7\), and \(3,\) is asked for")
def argmax_over_the_texts(logits, lengths):
    return logits.argmax(dim=1)


@wrong("next_tokens", "None: is the `return` missing")
def forgets_to_return(logits, lengths):
    logits[:, -1].argmax(dim=-1)


@wrong("keep_top_p_rows", "loses the token that crosses top_p")
def drops_the_boundary(probs, top_p):
    ordered, ids = probs.sort(dim=1, descending=True)
    keep = ordered.cumsum(dim=1) < top_p[:, None]
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter(1, ids, keep)


@wrong("keep_top_p_rows", "row 1 keeps nothing")
def drops_even_the_first(probs, top_p):
    ordered, ids = probs.sort(dim=1, descending=True)
    return torch.zeros_like(probs).bool().scatter(1, ids, ordered.cumsum(dim=1) <= top_p[:, None])


@wrong("keep_top_p_rows", "in sorted order")
def stays_sorted(probs, top_p):
    ordered = probs.sort(dim=1, descending=True).values
    return (ordered.cumsum(dim=1) - ordered < top_p[:, None]) | (top_p[:, None] >= 1)


@wrong("keep_top_p_rows", "row 1, with top_p 0.35, keeps tokens")
def takes_the_first_limit_for_all(probs, top_p):
    ordered, ids = probs.sort(dim=1, descending=True)
    keep = ordered.cumsum(dim=1) - ordered < top_p[0]
    return torch.zeros_like(keep).scatter(1, ids, keep)


@wrong("perplexity", r"they foretell token t \+ 1")
def holds_each_row_against_its_own_token(logits, token_ids):
    return torch.nn.functional.cross_entropy(logits, torch.tensor(token_ids)).exp()


@wrong("perplexity", "exponential is still to be taken")
def forgets_the_exponential(logits, token_ids):
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(token_ids[1:]))


@wrong("perplexity", "added up")
def sums(logits, token_ids):
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(token_ids[1:]), reduction="sum").exp()


@wrong("draw", "weight is 0")
def gives_the_left_end_away(weights, u):
    ends = weights.cumsum(dim=0)
    return torch.searchsorted(ends, u * ends[-1]).item()


@wrong("draw", "these add up to 4")
def takes_weights_for_probabilities(weights, u):
    return torch.searchsorted(weights.cumsum(dim=0), u, right=True).item()
