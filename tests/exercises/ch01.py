"""Wrong answers to the exercises of chapter 01."""

from __future__ import annotations

import torch
from my_engine.sampler import sample
from planted import wrong


@wrong("next_tokens", "last column, which is padding")
def reads_the_padding(logits, lengths):
    return logits[:, -1].argmax(dim=-1)


@wrong("next_tokens", "one column late")
def reads_one_late(logits, lengths):
    return logits[torch.arange(len(lengths)), lengths].argmax(dim=-1)


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


@wrong("perplexity", r"they predict token t \+ 1")
def compares_each_row_with_its_own_token(logits, token_ids):
    return torch.nn.functional.cross_entropy(logits, torch.tensor(token_ids)).exp()


@wrong("perplexity", "exponential is still to be taken")
def forgets_the_exponential(logits, token_ids):
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(token_ids[1:]))


@wrong("perplexity", "added up")
def sums(logits, token_ids):
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(token_ids[1:]), reduction="sum").exp()


@wrong("sample_top_n_sigma", "logits that were given have changed")
def cuts_in_place(logits, params, position, n):
    logits[logits < logits.max() - n * logits.std()] = -torch.inf
    return sample(logits, params, position)


@wrong("sample_top_n_sigma", "logit 0, which is a score like any other")
def cuts_to_zero(logits, params, position, n):
    return sample(logits.where(logits >= logits.max() - n * logits.std(), 0.0), params, position)


@wrong("sample_top_n_sigma", "nothing is cut")
def leaves_the_rule_out(logits, params, position, n):
    return sample(logits, params, position)


@wrong("sample_top_n_sigma", "deviations below the largest, and is to be cut")
def measures_from_the_mean(logits, params, position, n):
    return sample(logits.masked_fill(logits < logits.mean() - n * logits.std(), -torch.inf), params, position)


@wrong("sample_top_n_sigma", "draws another once the rest is -inf")
def draws_with_its_own_noise(logits, params, position, n):
    cut = logits.masked_fill(logits < logits.max() - n * logits.std(), -torch.inf)
    generator = torch.Generator().manual_seed(position)
    return torch.multinomial((cut / params.temperature).softmax(0), 1, generator=generator).item()


@wrong("sample_top_n_sigma", "temperature 0 the most probable token")
def is_never_greedy(logits, params, position, n):
    sampled = type(params)(temperature=params.temperature or 2.0, seed=params.seed)
    return sample(logits.masked_fill(logits < logits.max() - n * logits.std(), -torch.inf), sampled, position)
