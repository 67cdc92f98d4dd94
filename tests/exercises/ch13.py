"""Wrong answers to the exercises of chapter 13."""

from __future__ import annotations

import torch
from planted import wrong
from solutions.ch13 import speculative_step


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


@wrong("keep_or_recover", "it is not accepted")
def accepts_as_if_q_were_small(p, draft, u, v):
    return draft if u < p[draft] / 0.15 else _from(p, v)


@wrong("keep_or_recover", "this draws from p")
def redraws_from_p(p, draft, u, v):
    return draft if u < p[draft] else _from(p, v)


@wrong("keep_or_recover", "Is it divided by its sum")
def does_not_normalise(p, draft, u, v):
    left = torch.where(torch.arange(4) == draft, 0, p)
    return draft if u < p[draft] else _from(left, v)


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


@wrong("speculative_step", "1 \\+ 4 are enough")
def drafts_nothing(engine, propose, most):
    engine.step()


@wrong("speculative_step", "rejected drafts were published")
def publishes_drafts(engine, propose, most):
    def with_publication(token_ids, number):
        drafts = propose(token_ids, number)
        (sequence,) = (s for s in engine.scheduler.running if s.token_ids is token_ids)
        token_ids += drafts  # as `allocate` would, with the drafts in the text
        if manager.num_blocks_for(len(token_ids)) <= len(sequence.block_table):
            manager.publish(sequence, sequence.num_computed_tokens, len(token_ids))
        del token_ids[len(token_ids) - len(drafts) :]
        return drafts

    manager = engine.scheduler.manager
    speculative_step(engine, with_publication, most)


@wrong("speculative_step", "are not the tokens of Engine.step|more tokens than")
def believes_every_draft(engine, propose, most):
    for sequence in engine.scheduler.running:
        room = sequence.params.max_tokens - len(sequence.output_token_ids) - 1
        if not sequence.num_uncomputed_tokens > 1 and room > 0:
            sequence.token_ids += propose(sequence.token_ids, min(most, room))
    engine.step()
