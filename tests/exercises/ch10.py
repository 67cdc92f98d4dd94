"""Wrong answers to the exercises of chapter 10."""

from __future__ import annotations

from collections import deque

from my_engine.planner import Scheduler
from planted import wrong

from paged_infer.control.policies import Policy, PrefillFirst


@wrong("kept_waiting", "of its own batch, not of all requests")
def waits_for_the_longest_of_all(outputs, seats):
    return [max(outputs) - tokens for tokens in outputs]


@wrong("kept_waiting", "the last batch counts, full or not")
def drops_the_last_batch(outputs, seats):
    num_full = len(outputs) // seats
    batches = [outputs[i * seats : (i + 1) * seats] for i in range(num_full)]
    return [max(batch) - tokens for batch in batches for tokens in batch]


@wrong("kept_waiting", "how long each batch lasts")
def counts_its_own_steps_too(outputs, seats):
    return [max(outputs[i // seats * seats : (i // seats + 1) * seats]) for i in range(len(outputs))]


@wrong("kept_waiting", "request 3 is kept for 8 steps and not 0")
def lets_rows_leave_one_by_one(outputs, seats):
    return [4, 0, 3] + [0] * (len(outputs) - 3)


def with_budget(budget, num_running, num_prompt, per_step_us, per_token_us, chunk, beside):
    num_full, rest = divmod(num_prompt, chunk)
    return budget, num_full * (per_step_us + per_token_us * budget) + per_step_us + per_token_us * (rest + beside)


@wrong("promise", "a step of 769 tokens takes 116,970 us")
def forgets_what_a_step_costs_anyway(gap_us, num_running, num_prompt, per_step_us, per_token_us):
    budget = gap_us // per_token_us
    return with_budget(budget, num_running, num_prompt, per_step_us, per_token_us, budget - num_running, num_running)


@wrong("promise", "the decodes take 8 tokens of each step")
def gives_the_prompt_the_whole_step(gap_us, num_running, num_prompt, per_step_us, per_token_us):
    budget = (gap_us - per_step_us) // per_token_us
    return with_budget(budget, num_running, num_prompt, per_step_us, per_token_us, budget, num_running)


@wrong("promise", "the budget counts the decodes, too")
def gives_the_chunk_for_the_budget(gap_us, num_running, num_prompt, per_step_us, per_token_us):
    chunk = (gap_us - per_step_us) // per_token_us - num_running
    return chunk, 249_120


@wrong("promise", "so its step is not a full one")
def counts_full_steps(gap_us, num_running, num_prompt, per_step_us, per_token_us):
    budget = (gap_us - per_step_us) // per_token_us
    return budget, -(-num_prompt // (budget - num_running)) * (per_step_us + per_token_us * budget)


@wrong("promise", "takes ten full steps of 50,000 us, and yours gives 520,000")
def adds_a_last_step_that_has_nothing(gap_us, num_running, num_prompt, per_step_us, per_token_us):
    budget = (gap_us - per_step_us) // per_token_us
    return with_budget(budget, num_running, num_prompt, per_step_us, per_token_us, budget - num_running, num_running)


@wrong("StaticScheduler", "is admitted in step 3 while others run")
class AdmitsAtOnce(Scheduler):
    def schedule(self):
        return super().schedule()


class DefersAdmission(Scheduler):
    """A right one, of which the wrong ones change how the two queues are put together."""

    def schedule(self):
        waiting = []
        if self.running:
            waiting, self.waiting = self.waiting, deque()
        plan = super().schedule()
        self.waiting = self.joined(self.waiting, waiting)
        return plan

    def joined(self, preempted, waiting):
        return deque([*preempted, *waiting])


@wrong("StaticScheduler", "it belongs to the next batch, before request 2")
class PutsThePreemptedLast(DefersAdmission):
    def joined(self, preempted, waiting):
        return deque([*waiting, *preempted])


@wrong("StaticScheduler", "request 2 is in no queue any more")
class LosesTheQueue(DefersAdmission):
    def joined(self, preempted, waiting):
        return preempted


@wrong("StaticScheduler", "schedule gives None")
class ForgetsToReturn(DefersAdmission):
    def schedule(self):
        super().schedule()


@wrong("Alternate", "both compute prompts")
class PromptsFirstAlways(PrefillFirst):
    def plan(self, step):
        super().plan(step)


@wrong("Alternate", r"computes 1 prompt\(s\) and 2 decode\(s\)")
class Mixes(Policy):
    chunks_prompts = False

    def plan(self, step):
        step.schedule_running()
        step.admit_waiting()


@wrong("Alternate", "compute no prompt, although a sequence waits")
class WaitsForTheBatch(Policy):
    chunks_prompts = False

    def plan(self, step):
        if step.running:
            step.schedule_running()
        else:
            step.admit_waiting()


@wrong("Alternate", "keep chunks_prompts = False")
class Cuts(Policy):
    def plan(self, step):
        step.admit_waiting()


@wrong("Alternate", "does any step call `resume_swapped`")
class NeverResumes(Policy):
    chunks_prompts = False

    def __init__(self):
        self.had_prompts = False

    def plan(self, step):
        if not (self.had_prompts and step.running):
            step.admit_waiting()
        self.had_prompts = bool(step.scheduled)
        if not step.scheduled:
            step.schedule_running()
