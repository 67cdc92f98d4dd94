"""Wrong answers to the exercises of chapter 04."""

from __future__ import annotations

import torch
from my_engine.cache import ContiguousCache
from planted import wrong


@wrong("rows_computed", "the last token is never fed back")
def feeds_the_last_token_back(requests):
    return sum(p + i for p, n in requests for i in range(n)), sum(p + n for p, n in requests)


@wrong("rows_computed", "the first sees the prompt alone")
def counts_from_after_the_step(requests):
    return sum(p + i + 1 for p, n in requests for i in range(n)), sum(p + n - 1 for p, n in requests)


@wrong("rows_computed", "cannot be added up first")
def adds_the_requests_up(requests):
    p, n = sum(p for p, _ in requests), sum(n for _, n in requests)
    return sum(p + i for i in range(n)), p + n - 1


@wrong("attend_chunk", "lies at the top left")
def lets_torch_lay_the_triangle(q, keys, values):
    heads = (x[None] for x in (q, keys, values))
    return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)[0]


@wrong("attend_chunk", "there is no mask")
def masks_nothing(q, keys, values):
    return torch.nn.functional.scaled_dot_product_attention(q[None], keys[None], values[None])[0]


@wrong("attend_chunk", "a token does not see itself")
def leaves_the_diagonal_out(q, keys, values):
    seen = torch.ones(len(q), len(keys)).bool().tril(diagonal=len(keys) - len(q) - 1)
    return (q @ keys.T / q.shape[1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(dim=-1) @ values


@wrong("attend_chunk", "not divided by the root of D")
def forgets_the_scale(q, keys, values):
    seen = torch.ones(len(q), len(keys)).bool().tril(diagonal=len(keys) - len(q))
    return (q @ keys.T).masked_fill(~seen, -torch.inf).softmax(dim=-1) @ values


def _mask(lengths):
    columns = torch.arange(max(lengths))
    pads = max(lengths) - torch.tensor(lengths)
    return columns, pads, (columns <= columns[:, None]) & (columns >= pads[:, None, None])


@wrong("left_padding", "positions count columns")
def counts_columns(lengths):
    columns, _, seen = _mask(lengths)
    return columns.repeat(len(lengths), 1), seen | torch.eye(max(lengths)).bool()


@wrong("left_padding", "negative")
def leaves_padding_negative(lengths):
    columns, pads, seen = _mask(lengths)
    return columns - pads[:, None], seen | torch.eye(max(lengths)).bool()


@wrong("left_padding", "softmax over nothing is NaN")
def hides_padding_from_itself(lengths):
    columns, pads, seen = _mask(lengths)
    return (columns - pads[:, None]).clamp(min=0), seen


@wrong("left_padding", "a real query sees padding")
def masks_the_future_only(lengths):
    columns, pads, _ = _mask(lengths)
    return (columns - pads[:, None]).clamp(min=0), (columns <= columns[:, None]).repeat(len(lengths), 1, 1)


def _in_chunks(decoder, token_ids, max_tokens, chunk, *, starts=True, gives_every_step=False):
    token_ids, prompt_len, done = list(token_ids), len(token_ids), 0
    cache = ContiguousCache(decoder, prompt_len + max_tokens)
    while len(token_ids) < prompt_len + max_tokens:
        end = min(len(token_ids), done + chunk)
        cache.start = done if starts else 0
        hidden = decoder(token_ids[done:end], range(done, end), cache)
        done = end
        if gives_every_step or end == len(token_ids):
            token_ids.append(decoder.logits(hidden[-1]).argmax().item())
    return token_ids[prompt_len:]


@wrong("generate_in_chunks", r"a step brings \d+ tokens")
def brings_the_whole_prompt(decoder, token_ids, max_tokens, chunk):
    return _in_chunks(decoder, token_ids, max_tokens, len(token_ids))


@wrong("generate_in_chunks", "is `cache.start` set every time")
def forgets_where_the_step_starts(decoder, token_ids, max_tokens, chunk):
    return _in_chunks(decoder, token_ids, max_tokens, chunk, starts=False)


@wrong("generate_in_chunks", "does only a step that reaches the text's end")
def draws_from_every_chunk(decoder, token_ids, max_tokens, chunk):
    return _in_chunks(decoder, token_ids, max_tokens, chunk, gives_every_step=True)


@wrong("generate_in_chunks", "positions come twice")
def counts_each_chunk_from_zero(decoder, token_ids, max_tokens, chunk):
    cache = ContiguousCache(decoder, 99)
    for start in range(0, len(token_ids), chunk):
        piece = token_ids[start : start + chunk]
        decoder(piece, range(len(piece)), cache)
    return [0] * max_tokens
