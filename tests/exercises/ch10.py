"""Wrong answers to the exercises of chapter 10."""

from __future__ import annotations

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


@wrong("promise", "who decodes takes 8 tokens of each step")
def gives_the_prompt_the_whole_step(gap_us, num_running, num_prompt, per_step_us, per_token_us):
    budget = (gap_us - per_step_us) // per_token_us
    return with_budget(budget, num_running, num_prompt, per_step_us, per_token_us, budget, num_running)


@wrong("promise", "the budget counts who decodes too")
def gives_the_chunk_for_the_budget(gap_us, num_running, num_prompt, per_step_us, per_token_us):
    chunk = (gap_us - per_step_us) // per_token_us - num_running
    return chunk, 249_120


@wrong("promise", "so its step is not a full one")
def counts_full_steps(gap_us, num_running, num_prompt, per_step_us, per_token_us):
    budget = (gap_us - per_step_us) // per_token_us
    return budget, -(-num_prompt // (budget - num_running)) * (per_step_us + per_token_us * budget)


@wrong("promise", "takes ten full steps of 50,000 us, and this says 520,000")
def adds_a_last_step_that_has_nothing(gap_us, num_running, num_prompt, per_step_us, per_token_us):
    budget = (gap_us - per_step_us) // per_token_us
    return with_budget(budget, num_running, num_prompt, per_step_us, per_token_us, budget - num_running, num_running)


@wrong("preempt", "the oldest is preempted")
def takes_from_the_oldest(held, needed, free):
    running, gone = list(range(len(held))), []
    for sequence in range(len(held)):
        while sequence in running and needed[sequence] > free:
            gone.append(running.pop(0))
            free += held[gone[-1]]
        free -= needed[sequence] if sequence in running else 0
    return gone


@wrong("preempt", "one block is not enough")
def takes_from_one_only(held, needed, free):
    running, gone = list(range(len(held))), []
    for sequence in range(len(held)):
        if sequence in running and needed[sequence] > free:
            gone.append(running.pop())
            free += held[gone[-1]]
        free -= needed[sequence] if sequence in running and needed[sequence] <= free else 0
    return gone


@wrong("preempt", "goes itself")
def spares_whoever_asks(held, needed, free):
    running, gone = list(range(len(held))), []
    for sequence in range(len(held)):
        while sequence in running and needed[sequence] > free and running[-1] != sequence:
            gone.append(running.pop())
            free += held[gone[-1]]
        free -= needed[sequence] if sequence in running else 0
    return gone


@wrong("preempt", "served no more, and needs nothing")
def serves_the_dead(held, needed, free):
    running, gone = list(range(len(held))), []
    for sequence in range(len(held)):
        while running and needed[sequence] > free:
            gone.append(running.pop())
            free += held[gone[-1]]
        free -= needed[sequence]
    return gone


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


@wrong("Alternate", "compute no prompt, although somebody waits")
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
