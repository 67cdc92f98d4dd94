"""Encode a step as its difference from earlier ones, for a process that has received those.

A step lists, for each sequence, its whole block table and how to sample; with penalties, all of its tokens. A sequence
that decodes needs only its new token, its position, and, every ``block_size`` steps, a block:

    step      sequence 7: tokens [a9]  computed 84  table [3 1 8 5 9 2]  row (params, seed, position 85, ...)
    sent      (7, [a9], 84, (5, [2]), 85)           the first 5 blocks of the table are known, and so is the row

So the bytes of a decode do not grow with its context. (nano-vLLM sends a sequence's last token instead of all of them
for the same reason, in ``Sequence.__getstate__``.) Both sides remember the most recently scheduled sequences, up to the
same number, and forget the others in the same order. A sequence that was forgotten is sent whole.
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass
from typing import Any, NamedTuple

from paged_infer.control.step import BlockTransfers, SamplingRow, ScheduledSequence, ScheduledStep, TopKRow
from paged_infer.params import SamplingParams

Ints = ReadOnlyList[int]
Change = tuple[int, Ints]
"""A list as the number of its first elements that are known, and those after them."""
Delta = tuple[Any, ...]
"""A ScheduledStep as plain data: index, transfers, resume_at_s, and an entry for each sequence."""


class RowConstants(NamedTuple):
    """What all sampling rows of one sequence have in common."""

    params: SamplingParams
    seed: int
    sample_index: int
    num_prompt_tokens: int
    end_token_ids: tuple[int, ...]
    prompt_token_ids: Ints


@dataclass(slots=True)
class _Known:
    """What both sides remember of a sequence."""

    table: Ints = ()
    constants: RowConstants | None = None
    output_token_ids: Ints = ()


class _Memory:
    """The most recently scheduled sequences."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._known: dict[int, _Known] = {}  # the most recently scheduled one is last

    def of(self, sequence_id: int) -> _Known:
        known = self._known.pop(sequence_id, None) or _Known()
        self._known[sequence_id] = known
        return known

    def forget(self) -> None:
        """Forget sequences beyond the capacity; called between two steps, on both sides."""
        while len(self._known) > self._capacity:
            del self._known[next(iter(self._known))]


class StepEncoder(_Memory):
    """Encodes steps as deltas. Every delta must reach every decoder, in order.

    Args:
        capacity: how many sequences to remember.
    """

    def encode(self, step: ScheduledStep) -> Delta:
        """What the step adds to those before it."""
        entries = [self._entry(sequence) for sequence in step.sequences]
        self.forget()
        moves = step.transfers
        transfers = (moves.swap_outs, moves.swap_ins, moves.copies)
        return step.index, transfers if any(transfers) else None, step.resume_at_s, entries

    def _entry(self, sequence: ScheduledSequence) -> Delta:
        known = self.of(sequence.sequence_id)
        table, row = sequence.block_table, sequence.sample
        table_change = None if table is known.table else _change(known.table, table)
        known.table = table
        sample = self._row(known, row, sequence.drafts) if isinstance(row, SamplingRow) else row
        entry = (sequence.sequence_id, sequence.token_ids, sequence.num_computed_tokens, table_change, sample)
        if sequence.forks or sequence.num_drafts or sequence.next_prompt_token_ids != ():
            rest = (sequence.num_prompt_logprobs, sequence.next_prompt_token_ids, sequence.num_drafts)
            return *entry, sequence.forks, *rest
        return entry

    def _row(self, known: _Known, row: SamplingRow, drafts: Ints) -> int | tuple[Any, ...]:
        """The row's position, if only that is new; or position, new constants, change of the output tokens, and mask.

        Masks, of 1 bit for each token of the vocabulary, are sent whole.
        """
        num_prompt = row.position - row.num_output_tokens
        constants = RowConstants(
            row.params, row.seed, row.sample_index, num_prompt, row.end_token_ids, row.prompt_token_ids
        )
        is_new = known.constants != constants
        known.constants = constants
        mask = None if row.mask is None else row.mask.fixed(drafts)
        if not is_new and not row.output_token_ids and not known.output_token_ids and mask is None:
            return row.position
        change = _change(known.output_token_ids, row.output_token_ids)
        known.output_token_ids = row.output_token_ids
        sent = row.position, constants if is_new else None, change
        return sent if mask is None else (*sent, mask)


class StepDecoder(_Memory):
    """Decodes deltas to steps equal to those that were encoded. ``capacity``: the encoder's."""

    def decode(self, delta: Delta) -> ScheduledStep:
        """The step. A block table that has not changed is the same object as before."""
        index, transfers, resume_at_s, entries = delta
        sequences = [self._sequence(*entry) for entry in entries]
        self.forget()
        return ScheduledStep(index, sequences, BlockTransfers(*transfers or ([], [], [])), resume_at_s)

    def _sequence(
        self,
        sequence_id: int,
        token_ids: Ints,
        num_computed_tokens: int,
        table_change: Change | None,
        sample: int | tuple[Any, ...] | TopKRow | None,
        *rest: Any,
    ) -> ScheduledSequence:
        known = self.of(sequence_id)
        if table_change is not None:
            known.table = _changed(known.table, table_change)
        row = self._row(known, sample) if isinstance(sample, int | tuple) else sample
        return ScheduledSequence(sequence_id, token_ids, num_computed_tokens, known.table, row, *rest)

    def _row(self, known: _Known, sample: int | tuple[Any, ...]) -> SamplingRow:
        mask = None
        if isinstance(sample, int):
            position = sample
        else:
            position, constants, change, *masks = sample
            mask = masks[0] if masks else None
            known.constants = constants or known.constants
            known.output_token_ids = _changed(known.output_token_ids, change)
        of = known.constants
        assert of is not None, "a row without its constants: the deltas are not from one encoder"
        num_output = position - of.num_prompt_tokens
        return SamplingRow(
            of.params,
            of.seed,
            of.sample_index,
            position,
            num_output,
            of.end_token_ids,
            of.prompt_token_ids,
            known.output_token_ids,
            mask,
        )


def _change(known: Ints, now: Ints) -> Change:
    """The change from ``known`` to ``now``, which usually begins with ``known``.

    >>> _change((3, 1), (3, 1, 8)), _change((3, 1), (3, 2, 8))
    ((2, (8,)), (1, (2, 8)))
    """
    num_same = len(known)
    if now[:num_same] != known:
        pairs = zip(known, now, strict=False)
        num_same = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(known), len(now)))
    return num_same, now[num_same:]


def _changed(known: Ints, change: Change) -> Ints:
    num_same, rest = change
    return type(rest)((*known[:num_same], *rest))  # type: ignore[call-arg]
