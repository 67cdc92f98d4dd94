"""Wrong answers to the exercises of chapter 20."""

from __future__ import annotations

from checks.ch20 import EvictionOrder
from planted import wrong

from paged_infer.control.policies import Policy, PrefillFirst
from paged_infer.kernels import paged_attention_reference


@wrong("v1_tokens", "V1 reserves nothing for those that follow")
def leaves_one_for_each(left, budget, threshold):
    given = []
    for place, tokens in enumerate(left):
        given.append(min(tokens, threshold or tokens, max(1, budget - (len(left) - 1 - place))))
        budget -= given[-1]
    return given


@wrong("v1_tokens", "the threshold cuts the long prompt")
def forgets_the_threshold(left, budget, threshold):
    given = []
    for tokens in left:
        given.append(min(tokens, budget))
        budget -= given[-1]
    return given


@wrong("v1_tokens", r"\[1, 1, 1\] are given")
def takes_a_threshold_of_zero_at_its_word(left, budget, threshold):
    return [min(tokens, threshold, budget) for tokens in left]


@wrong("closed_gate", "not for the first chunk of it")
def counts_the_blocks_of_a_chunk(preempted, budget, num_running, seats, num_tokens, num_hits, num_free, block_size):
    if preempted:
        return "order"
    if not budget:
        return "budget"
    if num_running >= seats:
        return "seats"
    return "blocks" if -(-min(num_tokens, budget) // block_size) - num_hits > num_free else None


@wrong("closed_gate", "a part of an eleventh")
def rounds_blocks_down(preempted, budget, num_running, seats, num_tokens, num_hits, num_free, block_size):
    return "blocks" if num_tokens // block_size - num_hits > num_free else None


@wrong("closed_gate", "the preemption is looked at first")
def looks_at_the_budget_first(preempted, budget, num_running, seats, num_tokens, num_hits, num_free, block_size):
    if not budget:
        return "budget"
    if preempted:
        return "order"
    if num_running >= seats:
        return "seats"
    return "blocks" if -(-num_tokens // block_size) - num_hits > num_free else None


@wrong("delta", "an unchanged table needs no blocks")
def sends_all_tables(held, tables):
    return {i: (True, table) for i, table in tables.items()}


@wrong("delta", "its table is replaced")
def always_continues(held, tables):
    return {i: (i not in held, table[len(held.get(i, ())) :]) for i, table in tables.items()}


@wrong("delta", "8 is not in it")
def sends_what_is_not_in_the_step(held, tables):
    return {i: (i not in held, tables.get(i, held.get(i))[len(held.get(i, ())) :]) for i in {*held, *tables}}


@wrong("capstone", "is overtaken by one that came more than 100 steps later")
class SmallestFirst(Policy):
    def plan(self, step):
        step.schedule_running()
        step.resume_swapped()
        queue = sorted(step.waiting, key=lambda sequence: sequence.num_tokens)
        step.waiting.clear()
        step.waiting.extend(queue)
        step.admit_waiting()


@wrong("capstone", r"a request that decodes waits \d+ steps")
class PromptsFirst(PrefillFirst):
    def plan(self, step):
        super().plan(step)


@wrong("capstone", "the blocks are not in order")
class KeepsTheHash(EvictionOrder):
    def take(self):
        if self._blank:
            return super().take()
        block, _ = self._cached.popitem()
        self._counts[block] = 1
        self.num_references += 1
        return block


@wrong("capstone", "window=7: off by up to")
def ignores_the_window(q, k_cache, v_cache, step, *, window):
    tables, lens, starts = step.block_tables, step.seq_lens, step.query_start_loc
    return paged_attention_reference(
        q, k_cache, v_cache, block_tables=tables, seq_lens=lens, query_start_loc=starts, window=None
    )


@wrong("capstone", "derived from Policy or EvictionOrder")
class SomethingElse:
    def plan(self, step):
        return step
