"""Speculation as it is planned and settled: any drafts, right or wrong, and the tokens and blocks as without them."""

from __future__ import annotations

import random

import pytest
from effort import EFFORT
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import EOS, FakeMemory, Source, make_scheduler, update

from paged_infer.control.blocks.pool import BlockPool
from paged_infer.control.request import Request
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.sequence import PLACEHOLDER, Sequence
from paged_infer.control.speculation import NgramProposer, SpeculativeConfig, num_accepted, rows_after
from paged_infer.control.step import SamplingRow, ScheduledStep
from paged_infer.control.trace import Replay, Trace
from paged_infer.params import SamplingParams


def draw(token_ids: list[int], sequence: Sequence) -> int:
    """What a sequence says after these tokens: a function of them and of nothing else, as logits and noise are."""
    rng = random.Random(f"{token_ids} {sequence.sample_index}")
    return EOS if rng.random() < 0.1 else rng.randint(2, 4)


class Rival:
    """Drafts that are sometimes right, sometimes wrong, sometimes cut short, sometimes none."""

    def __init__(self, seed: int, everybody: list[Sequence], skill: float) -> None:
        self._rng, self._everybody, self._skill = random.Random(seed), everybody, skill

    def propose(self, token_ids: list[int], most: int) -> list[int]:
        sequence = next(s for s in self._everybody if s.token_ids is token_ids)
        drafts: list[int] = []
        for _ in range(self._rng.randint(0, min(most, 5))):
            is_right = self._rng.random() < self._skill
            drafts.append(draw([*token_ids, *drafts], sequence) if is_right else self._rng.randint(1, 4))
        return drafts


class Device:
    """Stores what a step computes, drafts too, draws after each draft, and says which hold."""

    def __init__(self, everybody: list[Sequence], block_size: int) -> None:
        self.sequences = {s.sequence_id: s for s in everybody}
        self.memory = FakeMemory(block_size)

    def run(self, step: ScheduledStep, fails_after: int | None = None) -> tuple[dict[int, int], dict[int, list[int]]]:
        guessed = {s.sequence_id: [*s.drafts] for s in step.sequences if s.num_drafts}
        views = {i: _Guessing(s, guessed.get(i, [])) for i, s in self.sequences.items()}
        self.memory.execute(step, views, fails_after)
        drawn, accepted = {}, {}
        for sequence_id in step.sampling:
            sequence, drafts = self.sequences[sequence_id], guessed.get(sequence_id, [])
            known = sequence.token_ids
            draws = [draw([*known, *drafts[:n]], sequence) for n in range(len(drafts) + 1)]
            held = num_accepted(drafts, draws)
            drawn[sequence_id], accepted[sequence_id] = draws[held], draws[:held]
        return drawn, accepted


class _Guessing:
    """A sequence as it would be if its drafts were its tokens."""

    def __init__(self, sequence: Sequence, drafts: list[int]) -> None:
        self.token_ids, self.cache_root = [*sequence.token_ids, *drafts], sequence.cache_root


def serve(
    scheduler: Scheduler,
    shapes: list[tuple[int, int, int]],
    *,
    rival: tuple[int, float] | None = None,
    fails: frozenset[int] = frozenset(),
    aborts: dict[int, int] | None = None,
) -> list[Request]:
    source = Source()
    requests = [source.request(p, story=i % 2, n=n, max_tokens=m) for i, (p, n, m) in enumerate(shapes)]
    everybody = [s for request in requests for s in request.sequences]
    if rival is not None:
        scheduler.proposer = Rival(rival[0], everybody, rival[1])
    for request in requests:
        scheduler.add(request.sequences)
    device = Device(everybody, scheduler.manager.block_size)
    replay = Replay(BlockPool(scheduler.manager.pool.num_blocks))
    for number in range(3000):
        if not scheduler.has_work:
            break
        step = scheduler.schedule(float(number))
        assert step.num_tokens <= scheduler.max_num_batched_tokens
        scheduler.check_integrity()
        traced = scheduler.trace.steps[-1] if scheduler.trace is not None else None
        if traced is not None:
            for event in traced.events:
                replay.apply(event)
            held = {s.sequence_id: scheduler.manager.table(s.sequence_id) for s in everybody}
            assert all(table == replay.tables.get(i, ()) for i, table in held.items())
            stored = {s.sequence_id: s.num_computed_tokens for s in scheduler.running}
            assert all(replay.computed[i] == num_tokens for i, num_tokens in stored.items())
        if number in fails:
            device.run(step, fails_after=number % 4)
            scheduler.roll_back()
        else:
            drawn, accepted = device.run(step)
            update(scheduler, step, drawn, float(number), accepted=accepted)
        if traced is not None:
            replay.finish(traced)
        if number in (aborts or {}) and aborts[number] < len(everybody):
            scheduler.finish(everybody[aborts[number]], "abort")
        scheduler.check_integrity()
        if not fails:  # drafts leave nothing behind; a step that fails does, until it is tried again
            manager, running = scheduler.manager, scheduler.running
            held = {s.sequence_id: len(manager.table(s.sequence_id)) for s in running}
            assert held == {s.sequence_id: manager.blocks_for(s.num_computed_tokens) for s in running}
    assert not scheduler.has_work, "somebody starves"
    assert scheduler.manager.pool.num_used == 0 and scheduler.manager.swap.num_used == 0
    return requests


@settings(max_examples=80 * EFFORT)
@given(
    block_size=st.integers(1, 4),
    slack=st.integers(0, 6),
    budget=st.sampled_from([1, 3, 7, 40]),
    num_swap_blocks=st.sampled_from([0, 3, 40]),
    caching=st.booleans(),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 12)), min_size=1, max_size=6),
    rival=st.tuples(st.integers(0, 1000), st.sampled_from([0.0, 0.5, 0.9, 1.0])),
    fails=st.frozensets(st.integers(0, 40), max_size=4),
    aborts=st.dictionaries(st.integers(0, 40), st.integers(0, 9), max_size=2),
)
def test_no_draft_changes_what_is_said(
    block_size, slack, budget, num_swap_blocks, caching, shapes, rival, fails, aborts
) -> None:
    """``shapes``: (prompt, n, max_tokens). The pool is as small as the door lets it be, and a step may fail."""
    longest = max(n * -(-(prompt + most - 1) // block_size) for prompt, n, most in shapes) + slack
    scheduler = make_scheduler(
        longest,
        block_size,
        4,
        budget,
        min(num_swap_blocks, longest),
        enable_prefix_caching=caching,
        trace=Trace(longest),
    )
    drafted = serve(scheduler, shapes, rival=rival, fails=fails, aborts=aborts)
    alone = serve(make_scheduler(10_000, 4, 20, 10_000), shapes)
    for one, other in zip(
        (s for r in drafted for s in r.sequences), (s for r in alone for s in r.sequences), strict=True
    ):
        if one.finish_reason == "abort":
            assert one.output_token_ids == other.output_token_ids[: one.num_output_tokens]
        else:
            assert (one.output_token_ids, one.finish_reason) == (other.output_token_ids, other.finish_reason)


class Fixed:
    """Always the same drafts."""

    def __init__(self, *drafts: int) -> None:
        self.drafts = drafts

    def propose(self, token_ids: list[int], most: int) -> list[int]:
        return list(self.drafts[:most])


def decode(scheduler: Scheduler, num_prompt: int = 3, **params) -> Sequence:
    """One whose prompt is computed, and whose first token, 5, is known."""
    (sequence,) = Source().request(num_prompt, **params).sequences
    scheduler.add([sequence])
    step = scheduler.schedule()
    assert step.sequences[0].num_drafts == 0
    update(scheduler, step, {0: 5})
    return sequence


def test_a_step_computes_the_last_token_and_its_drafts_and_takes_those_that_hold_and_one_more() -> None:
    scheduler = make_scheduler(proposer=Fixed(6, 7, 8))
    sequence = decode(scheduler)
    step = scheduler.schedule()
    (item,) = step.sequences
    assert (item.token_ids, item.num_known_tokens, item.drafts) == ([5, 6, 7, 8], 1, [6, 7, 8])
    assert not step.allows_async_scheduling
    grown = update(scheduler, step, {0: 9}, accepted={0: [6, 7]})
    assert grown == [sequence] * 3 and sequence.output_token_ids == [5, 6, 7, 9]
    assert sequence.num_computed_tokens == 3 + 3
    stats = scheduler.stats
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (1, 3, 2)


def test_a_token_that_ends_the_sequence_drops_the_accepted_ones_behind_it() -> None:
    scheduler = make_scheduler(proposer=Fixed(6, EOS, 8))
    sequence = decode(scheduler)
    grown = update(scheduler, scheduler.schedule(), {0: 9}, accepted={0: [6, EOS, 8]})
    assert grown == [sequence] * 2
    assert (sequence.output_token_ids, sequence.finish_reason) == ([5, 6, EOS], "stop")


def test_nobody_drafts_beyond_its_last_token() -> None:
    scheduler = make_scheduler(proposer=Fixed(6, 7, 8))
    decode(scheduler, max_tokens=3)  # one is known; a draft and the draw behind it are the other two
    assert scheduler.schedule().sequences[0].drafts == [6]
    last = make_scheduler(proposer=Fixed(6, 7, 8))
    decode(last, max_tokens=2)
    assert last.schedule().sequences[0].num_drafts == 0


def test_blocks_that_nobody_else_wants_are_lent_to_drafts_and_given_back() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=1, proposer=Fixed(6, 7, 8), watermark=0.0)
    sequence = decode(scheduler, max_tokens=4)
    step = scheduler.schedule()
    assert step.sequences[0].num_drafts == 2 and scheduler.manager.pool.num_free == 0
    update(scheduler, step, {0: 9}, accepted={0: []})
    assert len(scheduler.manager.table(0)) == 4 == sequence.num_computed_tokens


def test_nobody_is_kept_out_or_preempted_for_a_draft() -> None:
    scheduler, source = (make_scheduler(num_blocks=8, block_size=1, proposer=Fixed(6, 7, 8), watermark=0.0), Source())
    first, second = (source.request(3, max_tokens=5).sequences[0] for _ in range(2))
    scheduler.add([first])
    update(scheduler, scheduler.schedule(), {0: 5})
    scheduler.add([second])
    step = scheduler.schedule()  # 4 blocks for the one, 3 for the other: 1 is left
    assert {s.sequence_id: (s.num_known_tokens, s.num_drafts) for s in step.sequences} == {0: (1, 1), 1: (3, 0)}
    update(scheduler, step, {0: 9, 1: 5}, accepted={0: []})
    step = scheduler.schedule()  # 5 and 4 are wanted, and 8 are there: as without drafts
    assert scheduler.stats.preemptions == 1 and len(step.sequences) == 1


def test_drafts_take_only_the_budget_that_is_left() -> None:
    scheduler, source = make_scheduler(budget=7, proposer=Fixed(6, 7, 8)), Source()
    first, second = (source.request(n, max_tokens=20).sequences[0] for n in (3, 9))
    scheduler.add([first])
    update(scheduler, scheduler.schedule(), {0: 5})
    scheduler.add([second])
    step = scheduler.schedule()
    assert {s.sequence_id: s.num_tokens for s in step.sequences} == {0: 1, 1: 6}
    update(scheduler, step, {0: 5})
    step = scheduler.schedule()
    assert {s.sequence_id: (s.num_known_tokens, s.num_drafts) for s in step.sequences} == {0: (1, 3), 1: (3, 0)}


def test_blocks_that_accepted_drafts_fill_are_findable_and_those_of_rejected_ones_are_not() -> None:
    scheduler = make_scheduler(block_size=4, proposer=Fixed(6, 7, 8, 9, 10))
    decode(scheduler, max_tokens=20)
    step = scheduler.schedule()  # 5 completes the first block; the drafts would complete the second
    assert scheduler.manager.pool.num_hashed == 1
    update(scheduler, step, {0: 11}, accepted={0: [6, 7, 8]})
    assert scheduler.manager.pool.num_hashed == 1
    step = scheduler.schedule()  # 11 completes the second
    update(scheduler, step, {0: 12}, accepted={0: [6, 7, 8, 9]})
    assert scheduler.manager.pool.num_hashed == 3 and scheduler.manager.num_uncommitted == 0


def test_beams_do_not_speculate() -> None:
    scheduler, source = make_scheduler(proposer=Fixed(6, 7)), Source()
    request = source.request(3, beams=2)
    scheduler.add(request.sequences, request.beam_params)
    for _ in range(2):
        step = scheduler.schedule()
        assert all(item.num_drafts == 0 for item in step.sequences)
        candidates = {i: [(w, -float(w)) for w in range(2, 8)] for i in step.beam_rows}
        update(scheduler, step, {}, candidates=candidates)


def ngram(**options: int) -> NgramProposer:
    return NgramProposer(SpeculativeConfig(method="ngram", **{"num_speculative_tokens": 3, **options}))


def test_the_longest_ending_that_stood_before_is_followed_from_where_it_stood_first() -> None:
    proposer = ngram(prompt_lookup_max=3, prompt_lookup_min=1)
    #             1 2 3 stood at 3 and at 8; 2 3 alone already at 0
    assert proposer.propose([2, 3, 9, 1, 2, 3, 4, 5, 1, 2, 3, 6, 1, 2, 3], 9) == [4, 5, 1]
    assert proposer.propose([2, 3, 9, 7, 2, 3], 9) == [9, 7, 2]
    assert proposer.propose([2, 3, 9, 7, 2, 3], 2) == [9, 7]
    assert proposer.propose([8, 3, 9, 7, 2, 3], 9) == [9, 7, 2]
    assert ngram(prompt_lookup_max=3, prompt_lookup_min=2).propose([8, 3, 9, 7, 2, 3], 9) == []


def test_an_ending_may_overlap_where_it_stood_and_the_drafts_end_with_the_text() -> None:
    assert ngram(prompt_lookup_max=2).propose([4, 4, 4], 9) == [4]
    assert ngram(prompt_lookup_max=2, prompt_lookup_min=1).propose([7], 9) == []


def test_tokens_are_found_whole() -> None:
    """256 ** 4 is 1 in another byte: the search is one of bytes."""
    assert ngram(prompt_lookup_max=1).propose([256**4, 256, 5, 1], 9) == []
    assert ngram(prompt_lookup_max=1).propose([256, 1, 5, 1], 9) == [5, 1]


def test_a_draft_is_drawn_after_as_if_it_had_been_said() -> None:
    row = SamplingRow(SamplingParams(presence_penalty=1.0), 3, 1, 10, 4, (1,), (8, 9), [5, 6, 7, 5])
    rows = rows_after(row, [2, 3])
    assert rows[0] is row and [r.position for r in rows] == [10, 11, 12]
    assert [r.num_output_tokens for r in rows] == [4, 5, 6]
    assert [r.output_token_ids for r in rows] == [[5, 6, 7, 5], [5, 6, 7, 5, 2], [5, 6, 7, 5, 2, 3]]
    assert all((r.seed, r.sample_index, r.prompt_token_ids) == (3, 1, (8, 9)) for r in rows)


def test_drafts_hold_up_to_the_first_that_was_not_drawn() -> None:
    assert num_accepted([1, 2, 3], [1, 2, 4, 9]) == 2
    assert num_accepted([1, 2, 3], [1, 2, 3, 9]) == 3
    assert num_accepted([1, 2, 3], [4, 2, 3, 9]) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "ngram", "num_speculative_tokens": 4, "eagle": 1}, "unknown eagle; known: method, num_spec"),
        ({"method": "ngram"}, "num_speculative_tokens missing"),
        ({}, "method and num_speculative_tokens missing"),
        ("ngram", "speculative_config='ngram': must be a dict"),
        ({"method": "eagle", "num_speculative_tokens": 4}, "method='eagle': must be one of ngram, draft_model"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens=0: must be an integer >= 1"),
        ({"method": "ngram", "num_speculative_tokens": True}, "num_speculative_tokens=True"),
        ({"method": "ngram", "num_speculative_tokens": 4, "model": "x"}, "model='x': ngram uses no draft model"),
        (
            {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 0},
            "prompt_lookup_min=0: must be an integer >= 1",
        ),
        (
            {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 3},
            "prompt_lookup_min=3: exceeds prompt_lookup_max=2",
        ),
        ({"method": "draft_model", "num_speculative_tokens": 4}, "model=None: draft_model needs a folder"),
        (
            {"method": "draft_model", "model": "x", "num_speculative_tokens": 4, "prompt_lookup_max": 4},
            "prompt_lookup_max=4: used by ngram only",
        ),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(options, said) -> None:
    with pytest.raises(ValueError) as error:
        SpeculativeConfig.from_options(options)
    assert said in str(error.value)


def test_the_lookup_defaults_are_vllms() -> None:
    def lookup(**options: int) -> tuple[int | None, int | None]:
        config = SpeculativeConfig(method="ngram", num_speculative_tokens=1, **options)
        return config.prompt_lookup_min, config.prompt_lookup_max

    assert lookup() == (5, 5)
    assert lookup(prompt_lookup_max=3) == (3, 3)
    assert lookup(prompt_lookup_min=2) == (2, 2)
    assert lookup(prompt_lookup_min=2, prompt_lookup_max=4) == (2, 4)


def test_a_draft_models_places_are_planned_and_left_open() -> None:
    from paged_infer.control.speculation import make_proposer

    proposer = make_proposer(SpeculativeConfig(method="draft_model", model="x", num_speculative_tokens=3))
    assert proposer is not None and proposer.propose([1, 2], 9) == [PLACEHOLDER] * 3
    assert proposer.propose([1, 2], 2) == [PLACEHOLDER] * 2 and make_proposer(None) is None
