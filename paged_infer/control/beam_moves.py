"""Applies what a ``BeamSearch`` decides: which sequence each branch continues in, and how the search ends.

The best branch of a beam keeps its sequence and its blocks. Any other branch takes the sequence of a beam without
branches, and shares the blocks of its parent. So there are always as many sequences as beams, and when the search is
over they become its answers.
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList

from paged_infer.control.beam_search import Answer, BeamSearch, Branch
from paged_infer.control.queues import Queues
from paged_infer.control.sequence import Sequence


def step_beam_search(search: BeamSearch, queues: Queues) -> ReadOnlyList[Sequence]:
    """Append one token to every beam, or end the search. Returns the beams."""
    branches = search.advance()
    for sequence, branch in assign_branches(search.beams, branches) if branches else ():
        if branch.parent is not sequence:
            queues.fork(branch.parent, sequence, branch.parent.num_computed_tokens)
            sequence.token_ids = list(branch.parent.token_ids)
        sequence.token_ids.append(branch.token_id)
        sequence.cumulative_logprob = branch.cumulative_logprob
    for sequence, answer in zip(search.beams, search.answers, strict=True) if not branches else ():
        finalise(sequence, answer, queues)
    return search.beams


def assign_branches(beams: ReadOnlyList[Sequence], branches: ReadOnlyList[Branch]) -> list[tuple[Sequence, Branch]]:
    """A sequence for each branch. Those that change sequence come first, while their parents are still unchanged."""
    first: dict[int, Branch] = {}
    others = []
    for branch in branches:  # best first
        if first.setdefault(branch.parent.sequence_id, branch) is not branch:
            others.append(branch)
    childless = [beam for beam in beams if beam.sequence_id not in first]
    moved = zip(childless, others, strict=True)
    return [*moved, *((branch.parent, branch) for branch in first.values())]


def finalise(sequence: Sequence, answer: Answer, queues: Queues) -> None:
    """End a beam's sequence with an answer of the search."""
    queues.finish(sequence, answer.finish_reason, answer.stop_reason)
    sequence.token_ids = answer.token_ids
    sequence.cumulative_logprob, sequence.score = answer.cumulative_logprob, answer.score
