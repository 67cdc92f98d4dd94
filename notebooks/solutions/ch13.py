"""Solutions to the exercises of chapter 13, speculation."""

from __future__ import annotations

import torch
from my_engine.paged import pack


def lookup_latest(token_ids, most, size):
    """From the end backwards; the ending itself, which nothing follows, is not looked at."""
    ending = token_ids[-size:]
    for at in range(len(token_ids) - size - 1, -1, -1):
        if token_ids[at : at + size] == ending:
            return token_ids[at + size :][:most]
    return []


def keep_or_recover(p, draft, u, v):
    """What is left of p does not add up to 1: v is stretched over its sum."""
    if u < p[draft]:
        return int(draft)
    left = p.clone()
    left[draft] = 0
    ends = left.cumsum(dim=-1)
    return int(torch.searchsorted(ends, v * ends[-1:], right=True)[0])


def best_k(alpha, cost, most):
    """``max`` gives the first of equals. The sum of powers needs no special case for alpha = 1."""

    def speed_up(k):
        return sum(alpha**n for n in range(k + 1)) / (1 + k * cost)

    return max(range(most + 1), key=speed_up)


def speculative_step(engine, propose, most):
    """Drafts stand in ``token_ids`` while the step is packed, and no longer."""
    manager, cache, rows = engine.scheduler.manager, engine.cache, []
    for sequence, num_new in engine.scheduler.schedule():
        drafts = []
        if num_new == sequence.num_uncomputed_tokens == 1:
            room = sequence.params.max_tokens - len(sequence.output_token_ids) - 1
            drafts = propose(sequence.token_ids, min(most, room)) if room > 0 else []
        end, table = sequence.num_computed_tokens + num_new, sequence.block_table
        while manager.num_blocks_for(end + len(drafts)) > len(table):
            if not manager.free_blocks:  # fewer drafts, and the blocks that are there
                drafts = drafts[: len(table) * manager.block_size - end]
                break
            table.append(manager.take())
        rows.append((sequence, num_new, drafts))
    if not rows:
        raise RuntimeError("nothing to do")
    rows.sort(key=lambda row: row[1] + len(row[2]) > 1)  # decodes first
    cache.copy_blocks(manager.copies)
    for sequence, _, drafts in rows:
        sequence.token_ids += drafts
    scheduled = [(sequence, num_new + len(drafts)) for sequence, num_new, drafts in rows]
    cache.step = step = pack(scheduled, cache.block_size, cache.keys.device)
    for sequence, _, drafts in rows:
        del sequence.token_ids[len(sequence.token_ids) - len(drafts) :]
    hidden = engine.decoder(step.token_ids, step.positions, cache)
    for (sequence, num_new, drafts), end in zip(rows, step.ends, strict=True):
        sequence.num_computed_tokens += num_new
        if sequence.num_uncomputed_tokens:
            continue
        start = sequence.num_computed_tokens
        for place, logits in enumerate(engine.decoder.logits(hidden[end - 1 - len(drafts) : end])):
            sequence.append_sample(logits)
            if sequence.finish_reason or sequence.token_ids[-1:] != drafts[place : place + 1]:
                break
        sequence.num_computed_tokens = len(sequence.token_ids) - 1  # the last token's keys are not there
        manager.publish(sequence, start, sequence.num_computed_tokens)
        if sequence.finish_reason:
            engine.scheduler.finish(sequence)


# The playground. `requests` from 1 to 64: the best k falls, since each draft is a row for every sequence, and in the
# end no k pays. `acceptance` 0.3: even drafts without limit give less than 1.43 tokens a step, so with the passes of a
# CPU only very cheap ones pay. `cost` 0: what limits k is the price of rows; for 1 request the curve is flat around its
# best k, for 32 every draft that is not accepted hurts.
