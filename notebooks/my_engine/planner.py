# CHAPTER 08
"""Continuous batching: each step is planned anew."""

from collections import deque
from dataclasses import dataclass, field

from .paged import BlockManager


@dataclass
class Scheduler:
    """First come, first served (vLLM V1: Scheduler)."""

    manager: BlockManager
    max_num_seqs: int = 64  # NEW 10: sequences that run at once
    max_num_batched_tokens: int = 512  # NEW 10: tokens of a step
    max_model_len: int = 1024  # NEW 10: prompt and output
    waiting: deque = field(default_factory=deque)
    running: list = field(default_factory=list)  # they hold blocks; the oldest first
    num_preemptions: int = 0  # NEW 10

    def add(self, sequences):
        # NEW 10: gates 1 and 2, which no waiting opens
        for sequence in sequences:
            longest = sequence.num_prompt_tokens + sequence.params.max_tokens
            if not sequence.num_prompt_tokens or longest > self.max_model_len:
                raise ValueError(f"{longest} tokens: need a prompt, at most {self.max_model_len}")
            if self.manager.num_blocks_for(longest - 1) > self.manager.num_blocks:
                raise ValueError(f"{longest} tokens: too many for {self.manager.num_blocks} blocks")
        # END 10
        self.waiting.extend(sequences)

    def schedule(self):
        """[(sequence, num_new), ...]: a prompt and a decode differ in num_new alone."""
        scheduled = []
        budget, num_before = self.max_num_batched_tokens, self.num_preemptions  # NEW 10
        for sequence in self.running:
            num_new = sequence.num_uncomputed_tokens
            num_new = min(num_new, budget)  # NEW 10: only the last may need more than one
            has_room = self.manager.allocate(sequence, num_new)
            # NEW 10: the youngest give up their blocks, at worst the sequence itself
            while not has_room and self.preempt() is not sequence:
                has_room = self.manager.allocate(sequence, num_new)
            # END 10
            if has_room:
                budget -= num_new  # NEW 10
                scheduled.append((sequence, num_new))
        while self.waiting:
            # NEW 10: gates 3 and 4. Blocks that preemption has freed are for running sequences.
            places = min(self.max_num_seqs, self.max_num_batched_tokens) - len(self.running)
            if not budget or places <= 0 or self.num_preemptions > num_before:
                break
            # END 10
            sequence = self.waiting[0]
            if not self.manager.share(sequence):  # NEW 09
                break  # NEW 09: its parent is still computing the prompt
            num_new = sequence.num_uncomputed_tokens
            num_new = min(num_new, budget)  # NEW 10: chunked prefill
            if not self.manager.allocate(sequence, num_new):
                self.manager.free(sequence)  # NEW 09: what it shared
                break
            budget -= num_new  # NEW 10
            self.running.append(self.waiting.popleft())
            scheduled.append((sequence, num_new))
        return scheduled

    def finish(self, sequence):
        self.running.remove(sequence)
        self.manager.free(sequence)

    # NEW 10
    def preempt(self):
        """Requeue the youngest. It keeps its tokens; their keys are computed again later."""
        victim = self.running.pop()
        self.manager.free(victim)
        self.waiting.appendleft(victim)
        self.num_preemptions += 1
        return victim

    # END 10
