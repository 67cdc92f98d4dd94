"""Wrong answers to the exercises of chapter 02."""

from __future__ import annotations

import torch
from planted import wrong


def in_window(num_queries, num_keys, window, first=None):
    first = num_keys - num_queries if first is None else first
    key, query = torch.arange(num_keys), torch.arange(first, first + num_queries)[:, None]
    return key <= query, key > query - window


@wrong("window_mask", r"window_mask\(4, 4, 2\): a query sees later tokens")
def looks_ahead_of_the_window(num_queries, num_keys, window):
    return in_window(num_queries, num_keys, window)[1]


@wrong("window_mask", "the window is missing")
def forgets_the_window(num_queries, num_keys, window):
    return in_window(num_queries, num_keys, window)[0]


@wrong("window_mask", "one key too many")
def counts_itself_as_well(num_queries, num_keys, window):
    causal, recent = in_window(num_queries, num_keys, window + 1)
    return causal & recent


@wrong("window_mask", r"window_mask\(2, 6, 3\): the diagonal begins in the upper left corner")
def begins_in_the_upper_left_corner(num_queries, num_keys, window):
    causal, recent = in_window(num_queries, num_keys, window, first=0)
    return causal & recent


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


@wrong("kv_bytes", "has no 'head_dim'")
def expects_every_key(config, size):
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * size


@wrong("kv_bytes", "the query heads are counted")
def counts_query_heads(config, size):
    dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return 2 * config["num_hidden_layers"] * config["num_attention_heads"] * dim * size


@wrong("kv_bytes", "Qwen3-32B in 16 bits gives .*: head_dim is given in the config")
def divides_always(config, size):
    kv_heads = config.get("num_key_value_heads", config["num_attention_heads"])
    dim = config["hidden_size"] // config["num_attention_heads"]
    return 2 * config["num_hidden_layers"] * kv_heads * dim * size


@wrong("kv_bytes", "a token leaves both")
def counts_keys_alone(config, size):
    kv_heads = config.get("num_key_value_heads", config["num_attention_heads"])
    dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return config["num_hidden_layers"] * kv_heads * dim * size


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
