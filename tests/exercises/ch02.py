"""Wrong answers to the exercises of chapter 02."""

from __future__ import annotations

import torch
from planted import wrong


@wrong("packed_mask", "sees the texts before its own")
def forgets_where_texts_end(lengths):
    place = torch.arange(sum(lengths))
    return place <= place[:, None]


@wrong("packed_mask", "the mask is not causal")
def looks_ahead(lengths):
    return torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()


@wrong("packed_mask", "rows are keys here")
def exchanges_rows_and_columns(lengths):
    return torch.block_diag(*(torch.ones(n, n).triu() for n in lengths)).bool()


@wrong("packed_mask", "True and False are exchanged")
def masks_what_is_seen(lengths):
    return ~torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()


@wrong("packed_mask", r"query 0 sees keys \[\] instead of \[0\]")
def does_not_see_itself(lengths):
    return torch.block_diag(*(torch.ones(n, n).tril(-1) for n in lengths)).bool()


def attend(q, k, v, diagonal=None, scale=None):
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    num_queries, num_keys = scores.shape[1:]
    hidden = torch.ones(num_queries, num_keys).triu(num_keys - num_queries + 1 if diagonal is None else diagonal)
    return scores.masked_fill(hidden.bool(), -torch.inf).softmax(dim=-1) @ v


@wrong("grouped_attention", "copied for each query head have 1,920")
def copies(q, k, v):
    return attend(q, k.repeat_interleave(3, 0), v.repeat_interleave(3, 0))


@wrong("grouped_attention", "copied for each query head have 1,920")
def copies_by_broadcasting(q, k, v):
    seen = torch.ones(3, 5).tril(2).bool()
    scores = q.view(2, 3, 3, 64) @ k[:, None].transpose(2, 3) / 8
    return (scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ v[:, None]).view(6, 3, 64)


@wrong("grouped_attention", "dealt out in turn")
def deals_heads_out(q, k, v):
    return attend(q, k.repeat(3, 1, 1), v.repeat(3, 1, 1))


@wrong("grouped_attention", "not divided by the root of D")
def leaves_out_the_scale(q, k, v):
    return attend(q, k.repeat_interleave(3, 0), v.repeat_interleave(3, 0), scale=1.0)


@wrong("grouped_attention", "upper left corner")
def aligns_to_the_beginning(q, k, v):
    return attend(q, k.repeat_interleave(3, 0), v.repeat_interleave(3, 0), diagonal=1)


@wrong("grouped_attention", "the mask is missing")
def masks_nothing(q, k, v):
    return attend(q, k.repeat_interleave(3, 0), v.repeat_interleave(3, 0), diagonal=5)


@wrong("neighbours_to_halves", "as they were")
def changes_nothing(weight, num_heads):
    return weight


@wrong("neighbours_to_halves", "from one head to another")
def forgets_the_heads(weight, num_heads):
    return torch.cat((weight[0::2], weight[1::2]))


@wrong("neighbours_to_halves", "the way back")
def goes_the_other_way(weight, num_heads):
    return weight.view(num_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@wrong("neighbours_to_halves", r"has shape \(12, 2\), and \(12, 4\) is asked for")
def reorders_columns_and_loses_some(weight, num_heads):
    return weight[:, 0::2]


@wrong("swiglu_width", "rounded down")
def rounds_down(hidden_size, multiple_of):
    return 8 * hidden_size // 3 // multiple_of * multiple_of


@wrong("swiglu_width", "the width of a plain MLP")
def keeps_the_plain_width(hidden_size, multiple_of):
    return -(-4 * hidden_size // multiple_of) * multiple_of


@wrong("swiglu_width", "no multiple of 256")
def forgets_to_round(hidden_size, multiple_of):
    return 8 * hidden_size // 3


@wrong("swiglu_width", "gives a float")
def divides(hidden_size, multiple_of):
    return 8 * hidden_size / 3
