"""A step sent as the difference from earlier ones: equal when decoded, and small however long its sequences are."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from paged_infer.control.admission import add_sequences
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.guided.token_mask import TokenMask
from paged_infer.control.request import Request
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.speculation import SpeculativeConfig, make_proposer, rows_after
from paged_infer.control.step import SamplingRow, ScheduledSequence, ScheduledStep, StepResult
from paged_infer.execution.step_delta import StepDecoder, StepEncoder
from paged_infer.params import BeamSearchParams, SamplingParams

NGRAM = make_proposer(SpeculativeConfig(method="ngram", num_speculative_tokens=2, prompt_lookup_max=1))


def steps(
    requests: list[tuple[int, SamplingParams | BeamSearchParams]], num_blocks: int = 400, **options
) -> Iterator[ScheduledStep]:
    """The steps of requests with so many prompt tokens, whose samples repeat what came before."""
    mode = options.pop("mode", "recompute")
    manager = BlockManager(num_blocks, 4, num_swap_blocks=num_blocks if mode == "swap" else 0)
    scheduler = Scheduler(manager, 8, 64, preemption_mode=mode, **options)
    for number, (num_prompt, params) in enumerate(requests):
        beams = params if isinstance(params, BeamSearchParams) else None
        limits = params if beams is None else beams.limits
        prompt = [10 + (number * 7 + i) % 5 for i in range(num_prompt)]
        request = Request(str(number), None, prompt, limits, 0.0, None, beams)
        add_sequences(request, 8 * number, number, 4000, (1,))
        scheduler.add(request.sequences, beams)
    rng = random.Random(0)
    while scheduler.has_work:
        step = scheduler.schedule()
        yield step
        result = StepResult({i: rng.randrange(10, 15) for i in step.sampling})
        for s in step.sequences:
            if s.num_drafts:
                result.accepted[s.sequence_id] = list(s.drafts[: rng.randrange(s.num_drafts + 1)])
        rows = {s.sequence_id: s.sample for s in step.sequences if s.sequence_id in step.beam_rows}
        result.candidates = {i: [(20 + k, -1.0 - k - i / 100) for k in range(row.num_top)] for i, row in rows.items()}
        scheduler.advance(step)
        scheduler.settle(step, result)


def sent(step: ScheduledStep, encoder: StepEncoder) -> bytes:
    return pickle.dumps(encoder.encode(step), protocol=5)


EVERY_KIND = [
    (9, SamplingParams(max_tokens=30)),
    (30, SamplingParams(max_tokens=20, repetition_penalty=1.2, min_tokens=3)),
    (70, SamplingParams(max_tokens=12, n=3, seed=1)),
    (5, BeamSearchParams(beam_width=3, max_tokens=15)),
    (6, SamplingParams(max_tokens=9, prompt_logprobs=2)),
]


@pytest.mark.parametrize("capacity", [1, 100])
@pytest.mark.parametrize("case", ["roomy", "recompute", "swap", "drafts"])
def test_a_decoded_step_equals_the_one_that_was_encoded(case: str, capacity: int) -> None:
    options = {
        "roomy": {},
        "recompute": {"num_blocks": 34, "enable_prefix_caching": False},
        "swap": {"num_blocks": 34, "enable_prefix_caching": False, "mode": "swap"},
        "drafts": {"proposer": NGRAM},
    }[case]
    encoder, decoder = StepEncoder(capacity), StepDecoder(capacity)
    seen = set()
    for step in steps(EVERY_KIND, **options):
        copy = decoder.decode(pickle.loads(sent(step, encoder)))
        assert copy == step
        seen |= {name for name in ("swap_outs", "copies") if getattr(step.transfers, name)}
        seen |= {"drafts" for s in step.sequences if s.num_drafts} | {"forks" for s in step.sequences if s.forks}
    assert seen >= {"forks", "copies", {"swap": "swap_outs", "drafts": "drafts"}.get(case, "forks")}


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=1500), SamplingParams(max_tokens=1500, seed=1, top_k=3)])
def test_the_bytes_of_a_decode_do_not_grow_with_its_context(params: SamplingParams) -> None:
    encoder = StepEncoder(16)
    sizes = [len(sent(step, encoder)) for step in steps([(1000, params)] * 4, num_blocks=2600)]
    decodes = sizes[70:]
    assert len(decodes) > 1400 and max(decodes) < 4 * 40
    whole = [len(pickle.dumps(step, protocol=5)) for step in steps([(1000, params)] * 4, num_blocks=2600)]
    assert whole[-1] > 19 * max(decodes)


def test_the_bytes_of_a_decode_with_penalties_do_not_grow_either() -> None:
    encoder = StepEncoder(16)
    penalised = SamplingParams(max_tokens=600, presence_penalty=0.5)
    sizes = [len(sent(step, encoder)) for step in steps([(200, penalised)])]
    assert max(sizes[10:]) <= 60


def test_a_table_that_has_not_changed_is_the_same_object() -> None:
    encoder, decoder = StepEncoder(4), StepDecoder(4)
    copies = [decoder.decode(encoder.encode(step)) for step in steps([(6, SamplingParams(max_tokens=9))])]
    tables = [copy.sequences[0].block_table for copy in copies]
    assert len({id(table) for table in tables}) == len({tuple(table) for table in tables}) < len(tables)


class Cycle:
    """A matcher whose masks tell how many tokens it has accepted."""

    def __init__(self) -> None:
        self.count = 0

    def mask(self) -> bytes:
        return bytes([self.count + 1] * 4)

    def accept(self, token_id: int) -> bool:
        self.count += 1
        return True

    def rollback(self, num_tokens: int) -> None:
        self.count -= num_tokens


def test_masks_are_sent_with_those_after_each_draft() -> None:
    encoder, decoder = StepEncoder(4), StepDecoder(4)
    for position in (5, 6):  # the second time its constants are known
        row = SamplingRow(SamplingParams(), 0, 0, position, position - 3, mask=TokenMask(Cycle()))  # type: ignore[arg-type]
        fork = replace(row, sample_index=1)
        step = ScheduledStep(0, [ScheduledSequence(1, [7, 8, 9], 4, [0], row, [(2, fork)], num_drafts=2)])
        decoded = decoder.decode(pickle.loads(pickle.dumps(encoder.encode(step))))
        (sequence,) = decoded.sequences
        assert isinstance(sequence.sample, SamplingRow)
        rows = rows_after(sequence.sample, sequence.drafts)
        assert [one.mask.bits[0] for one in rows if one.mask is not None] == [1, 2, 3]
        assert decoded == step


def test_where_reasoning_forbids_nothing_no_mask_is_sent() -> None:
    class Reasoning(Cycle):
        def mask(self) -> bytes | None:  # type: ignore[override]
            return None if self.count < 2 else super().mask()

    row = SamplingRow(SamplingParams(), 0, 0, 5, 2, mask=TokenMask(Reasoning()))  # type: ignore[arg-type]
    step = ScheduledStep(0, [ScheduledSequence(1, [7, 8, 9], 4, [0], row, num_drafts=2)])
    decoded = StepDecoder(4).decode(pickle.loads(pickle.dumps(StepEncoder(4).encode(step))))
    (sequence,) = decoded.sequences
    assert isinstance(sequence.sample, SamplingRow) and decoded == step
    rows = rows_after(sequence.sample, sequence.drafts)
    assert [one.is_masked for one in rows] == [False, False, True]
