"""Solutions of chapter 20, from here to vLLM.

The playground of the gates:

- 9 blocks: two preemptions. Requests 2 and 1 give back their blocks while request 0 grows. In step 15 it is done,
  and both are computed again.
- One seat: a request that runs alone has no other to preempt, and the rest of the pool is free, so order and blocks
  never close. The budget closes in step 0, where the long prompt is cut, and later the seat alone.
- A budget of 4: the four requests take 23 steps and not 15. Until step 5 the long prompt has every step to itself, so
  the three that arrive after it pay, above all with their first token.
"""

from __future__ import annotations

from paged_infer.control.policies import Policy


def v1_tokens(left, budget, threshold):
    """Each takes what it can; nothing is kept for those that follow."""
    given = []
    for tokens in left:
        if 0 < threshold < tokens:
            tokens = threshold
        given.append(min(tokens, budget))
        budget -= given[-1]
    return given


def closed_gate(preempted, budget, num_running, max_num_seqs, num_tokens, num_hits, num_free, block_size):
    """In the order in which V1's schedule() looks; blocks are counted for all tokens."""
    if preempted:
        return "order"
    if budget == 0:
        return "budget"
    if num_running >= max_num_seqs:
        return "seats"
    if -(-num_tokens // block_size) - num_hits > num_free:
        return "blocks"
    return None


def delta(held, tables):
    """A table that begins with what the worker has is continued; any other replaces it."""
    message = {}
    for sequence_id, table in tables.items():
        kept = held.get(sequence_id)
        if kept is not None and table[: len(kept)] == kept:
            message[sequence_id] = (False, table[len(kept) :])
        else:
            message[sequence_id] = (True, table)
    return message


class capstone(Policy):
    """Short prompts first, but none is overtaken for more than PATIENCE seconds: then age decides."""

    PATIENCE = 40.0

    def plan(self, step):
        step.schedule_running()
        step.resume_swapped()

        def key(sequence):
            is_old = step.now - sequence.arrival_time_s > self.PATIENCE
            return (not is_old, sequence.queue_number if is_old else sequence.num_tokens)

        queue = sorted(step.waiting, key=key)
        step.waiting.clear()
        step.waiting.extend(queue)
        step.admit_waiting()
