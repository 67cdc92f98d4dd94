"""Wrong answers to the exercises of chapter 04."""

from __future__ import annotations

import torch
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


@wrong("reserved_bytes", "a key and a value")
def forgets_the_values(num_layers, num_kv_heads, head_dim, itemsize, prompt_lens, max_tokens):
    per_token = num_layers * num_kv_heads * head_dim * itemsize
    return len(prompt_lens) * (max(prompt_lens) + max_tokens) * per_token, sum(prompt_lens) * per_token


@wrong("reserved_bytes", "room for its own prompt")
def reserves_row_by_row(num_layers, num_kv_heads, head_dim, itemsize, prompt_lens, max_tokens):
    per_token = 2 * num_layers * num_kv_heads * head_dim * itemsize
    return sum(p + max_tokens for p in prompt_lens) * per_token, sum(prompt_lens) * per_token


@wrong("reserved_bytes", "padding is counted")
def takes_padding_for_tokens(num_layers, num_kv_heads, head_dim, itemsize, prompt_lens, max_tokens):
    per_token = 2 * num_layers * num_kv_heads * head_dim * itemsize
    rows, width = len(prompt_lens), max(prompt_lens)
    return rows * (width + max_tokens) * per_token, rows * width * per_token
