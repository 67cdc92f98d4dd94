"""Wrong answers to the exercises of chapter 16."""

from __future__ import annotations

import torch
from planted import wrong
from solutions import ch16


@wrong("cut_qkv", "a contiguous part of the stack")
def cuts_the_stack(qkv, num_heads, num_kv_heads, rank, size):
    share = len(qkv) // size
    return qkv[rank * share : (rank + 1) * share]


@wrong("cut_qkv", "no key and value head")
def replicates_nothing(qkv, num_heads, num_kv_heads, rank, size):
    units = num_heads, num_kv_heads, num_kv_heads
    dim = len(qkv) // sum(units)
    matrices = zip(qkv.split([n * dim for n in units]), units, strict=True)
    return torch.cat([m[rank * (n // size) * dim : (rank + 1) * (n // size) * dim] for m, n in matrices])


@wrong("cut_qkv", "every KV head is kept")
def keeps_all_kv_heads(qkv, num_heads, num_kv_heads, rank, size):
    if num_kv_heads >= size:
        return ch16.cut_qkv(qkv, num_heads, num_kv_heads, rank, size)
    dim = len(qkv) // (num_heads + 2 * num_kv_heads)
    rows = num_heads * dim // size
    return torch.cat([qkv[rank * rows : (rank + 1) * rows], qkv[num_heads * dim :]])


@wrong("cut_qkv", "not the one that its query heads read")
def takes_kv_heads_in_turn(qkv, num_heads, num_kv_heads, rank, size):
    if num_kv_heads >= size:
        return ch16.cut_qkv(qkv, num_heads, num_kv_heads, rank, size)
    units = num_heads, num_kv_heads, num_kv_heads
    dim = len(qkv) // sum(units)
    q, k, v = (m.unflatten(0, (-1, dim)) for m in qkv.split([n * dim for n in units]))
    heads, kv = num_heads // size, rank % num_kv_heads
    own = q[rank * heads : (rank + 1) * heads], k[kv : kv + 1], v[kv : kv + 1]
    return torch.cat(own).flatten(0, 1)


@wrong("cut_linear", "the bias is in the output 2 times")
def adds_it_on_every_rank(x, columns, bias, rank, all_reduce):
    return all_reduce(x @ columns.T + bias)


@wrong("cut_linear", "rank 1: the bias is in the output 0 times")
def adds_it_after_the_sum_on_rank_0(x, columns, bias, rank, all_reduce):
    total = all_reduce(x @ columns.T)
    return total + bias if rank == 0 else total


@wrong("cut_linear", "never called")
def sums_nothing(x, columns, bias, rank, all_reduce):
    return x @ columns.T + bias


@wrong("slowest_sum_s", "two more collectives")
def forgets_the_vocabulary(step_s, num_layers, size):
    return step_s * (1 - 1 / size) / (2 * num_layers)


@wrong("slowest_sum_s", "what is saved counts, not the whole step")
def spends_the_whole_step(step_s, num_layers, size):
    return step_s / (2 * num_layers + 2)


@wrong("slowest_sum_s", "not that share")
def spends_a_ranks_share(step_s, num_layers, size):
    return step_s / size / (2 * num_layers + 2)


@wrong("replica_for", "has the longest prefix")
def follows_the_prefix(num_prompt, cached, waiting):
    return max(range(len(cached)), key=lambda r: cached[r])


@wrong("replica_for", "least to compute before")
def follows_the_queue(num_prompt, cached, waiting):
    return min(range(len(cached)), key=lambda r: waiting[r])


@wrong("replica_for", "even if all are cached")
def computes_nothing_of_a_cached_prompt(num_prompt, cached, waiting):
    cost = [w + num_prompt - c for c, w in zip(cached, waiting, strict=True)]
    return min(range(len(cost)), key=lambda r: cost[r])


@wrong("replica_for", "the first of equals")
def takes_the_last_of_equals(num_prompt, cached, waiting):
    return min(range(len(cached)), key=lambda r: (waiting[r] + max(1, num_prompt - cached[r]), -r))
