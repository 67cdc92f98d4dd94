"""What the tests of the control plane share: requests without a model, and steps that draw the same token."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial

from paged_infer.control.admission import add_sequences
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.request import Request
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.sequence import Sequence
from paged_infer.control.step import BlockTransfers, Candidates, ScheduledSequence, ScheduledStep, StepResult
from paged_infer.params import BeamSearchParams, SamplingParams

EOS = 1


def make_scheduler(
    num_blocks: int = 100,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 64,
    num_swap_blocks: int = 0,
    watermark: float = 0.02,
    **options,
) -> Scheduler:
    """Preempts by swapping where it is given room to."""
    manager = BlockManager(num_blocks, block_size, num_swap_blocks=num_swap_blocks, watermark=watermark)
    mode = "swap" if num_swap_blocks else "recompute"
    return Scheduler(manager, max_num_seqs, budget, preemption_mode=mode, **options)


class Source:
    """Makes requests with rising sequence ids, as the engine does."""

    def __init__(self, max_model_len: int = 10_000) -> None:
        self.max_model_len = max_model_len
        self.num_sequences = 0

    def request(
        self, num_prompt: int, story: int | None = None, salt: str | None = None, beams: int = 0, **params
    ) -> Request:
        """``story``: requests of the same one begin alike; without it a prompt is like no other."""
        params = {"max_tokens": 8, **params}
        search = BeamSearchParams(beams, **params) if beams else None
        params = SamplingParams(**params) if search is None else search.limits
        first = 1000 * (self.num_sequences + 1) if story is None else -1000 * (story + 1)
        prompt = [first + i for i in range(num_prompt)]
        request = Request(f"r{self.num_sequences}", None, prompt, params, 0.0, salt, search)
        add_sequences(request, self.num_sequences, 0, self.max_model_len, (EOS,))
        self.num_sequences += params.n
        return request

    def sequence(self, num_prompt: int, **params) -> Sequence:
        return self.request(num_prompt, **params).sequences[0]


def add(scheduler: Scheduler, source: Source, *num_prompts: int, **params) -> list[Sequence]:
    sequences = [source.sequence(n, **params) for n in num_prompts]
    scheduler.add(sequences)
    return sequences


def counts(step: ScheduledStep) -> dict[int, int]:
    return {item.sequence_id: item.num_tokens for item in step.sequences}


def update(scheduler: Scheduler, step: ScheduledStep, token_ids: dict[int, int], now: float = 0.0, **more):
    """``advance`` and ``settle`` in one. ``more``: other fields of the StepResult."""
    scheduler.advance(step)
    return scheduler.settle(step, StepResult(token_ids, **more), now)


def carry_out(scheduler: Scheduler, step: ScheduledStep, token: int = 7) -> list[Sequence]:
    return update(scheduler, step, dict.fromkeys(step.sampling, token))


def run(scheduler: Scheduler, num_steps: int = 1) -> ScheduledStep:
    for _ in range(num_steps):
        step = scheduler.schedule()
        carry_out(scheduler, step)
        scheduler.check_integrity()
    return step


def next_tokens(step: ScheduledStep, sequences: Mapping[int, Sequence]) -> dict[int, Candidates]:
    """What beams may go on with: a function of all that they hold, like logits; now and then they may end."""
    found = {}
    for item in step.sequences:
        if item.sequence_id in step.beam_rows:
            rng = random.Random(str(sequences[item.sequence_id].token_ids))
            words = [(EOS, -rng.random() * 3)] if rng.random() < 0.3 else []
            words += [(word, -rng.random() * 3) for word in range(2, 2 + item.sample.num_top)]
            words = [w for w in words if w[0] not in item.sample.banned_token_ids]
            found[item.sequence_id] = sorted(words, key=lambda word: -word[1])[: item.sample.num_top]
    return found


class FakeMemory:
    """Blocks as a dict of slots. What a token leaves in its slot is a hash of everything up to it, as with real keys.

    Reading one's whole context back after every step shows at once a block that was shared wrongly, overwritten,
    found by a stale hash, or used before anything was stored in it.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[tuple[int, int], int | None] = {}  # (block, offset) -> content
        self.swapped: dict[int, list[int | None]] = {}  # place -> contents

    def execute(self, step: ScheduledStep, sequences: Mapping[int, Sequence], fails_after: int | None = None):
        """Store and read. ``fails_after``: only so many of the step's acts happen, and nothing is read."""
        acts = [partial(self._transfer, step.transfers)]
        acts += [partial(self._store, item, sequences[item.sequence_id]) for item in step.sequences]
        for act in acts[:fails_after]:
            act()
        if fails_after is None:
            for item in step.sequences:
                self._read(item, sequences[item.sequence_id])

    def _contents(self, sequence: Sequence, end: int) -> list[int]:
        content = hash(sequence.cache_root)
        return [content := hash((content, token)) for token in sequence.token_ids[:end]]

    def _transfer(self, transfers: BlockTransfers) -> None:
        for block, place in transfers.swap_outs:
            self.swapped[place] = [self.slots.get((block, i)) for i in range(self.block_size)]
        arriving = [(self.swapped[place], block) for place, block in transfers.swap_ins]
        self._fill(arriving)
        self._fill([([self.slots.get((a, i)) for i in range(self.block_size)], b) for a, b in transfers.copies])

    def _fill(self, arriving: list[tuple[list[int | None], int]]) -> None:
        for contents, block in arriving:
            self.slots.update(((block, i), content) for i, content in enumerate(contents))

    def _store(self, item: ScheduledSequence, sequence: Sequence) -> None:
        end = item.num_computed_tokens + item.num_tokens
        contents = self._contents(sequence, end)
        for position in range(item.num_computed_tokens, end):
            self.slots[self._slot(item, position)] = contents[position]

    def _read(self, item: ScheduledSequence, sequence: Sequence) -> None:
        for position, content in enumerate(self._contents(sequence, item.num_computed_tokens + item.num_tokens)):
            assert self.slots[self._slot(item, position)] == content, (item.sequence_id, position)

    def _slot(self, item: ScheduledSequence, position: int) -> tuple[int, int]:
        return item.block_table[position // self.block_size], position % self.block_size
