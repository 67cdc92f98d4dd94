"""Solutions of chapter 10, continuous batching."""

from __future__ import annotations

from collections import deque

from my_engine.planner import Scheduler

from paged_infer.control.policies import Policy


def kept_waiting(outputs, seats):
    """Each batch lasts as long as its own longest row."""
    batches = [outputs[first : first + seats] for first in range(0, len(outputs), seats)]
    return [max(batch) - tokens for batch in batches for tokens in batch]


def promise(gap_us, num_running, num_prompt, per_step_us, per_token_us):
    """Each decode takes a token of the budget; the prompt gets the rest, and its last step is seldom full."""
    budget = (gap_us - per_step_us) // per_token_us
    num_full, rest = divmod(num_prompt, budget - num_running)
    ttft_us = num_full * (per_step_us + per_token_us * budget)
    if rest:
        ttft_us += per_step_us + per_token_us * (rest + num_running)
    return budget, ttft_us


class StaticScheduler(Scheduler):
    """While a batch runs, the queue looks empty; a preempted sequence goes to its head."""

    def schedule(self):
        if not self.running:
            return super().schedule()
        waiting, self.waiting = self.waiting, deque()
        scheduled = super().schedule()
        self.waiting.extend(waiting)
        return scheduled


class Alternate(Policy):
    """Remembers one thing: whether the last step was one of prompts."""

    chunks_prompts = False

    def __init__(self):
        self.had_prompts = False

    def plan(self, step):
        if not (self.had_prompts and step.running):
            step.admit_waiting()
        self.had_prompts = bool(step.scheduled)
        if not step.scheduled:
            step.schedule_running()
            step.resume_swapped()
