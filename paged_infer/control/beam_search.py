"""Beam search: which beams go on, which are answers, and when it is over. The definitions are transformers'.

    beams (2)         every way to go on, best first        who ends is an answer, if it is among the first 2
    A  -1.0           A b -1.2   B a -1.9   A <eos> -2.0    A b and B a go on
    B  -1.5    or:    A b -1.2   A <eos> -1.3   A c -1.6    A b and A c go on, A <eos> is an answer, B is dropped

A beam is a sequence of the request. The best way to go on from it keeps its place and its blocks; another one takes
the place of a beam from which nothing goes on, sharing the parent's blocks (``go_on``). So there are always as
many sequences as beams, and when the search is over they become its answers.

An answer's score is its sum of logprobs over its length to the power ``length_penalty`` (Wu et al. 2016, section 7, in
the form of transformers' ``GenerationMixin._beam_search``).
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from typing import TYPE_CHECKING, NamedTuple

from paged_infer.control.step import Candidates
from paged_infer.params import BeamSearchParams

if TYPE_CHECKING:
    from paged_infer.control.blocks.manager import BlockManager
    from paged_infer.control.request import Sequence
    from paged_infer.control.scheduler import Scheduler


class Branch(NamedTuple):
    """One way to go on: a beam and one more token."""

    parent: Sequence
    token_id: int
    cumulative_logprob: float


class Answer(NamedTuple):
    """A beam that has ended. ``token_ids``: prompt, then output."""

    token_ids: list[int]
    cumulative_logprob: float
    score: float
    finish_reason: str
    stop_reason: int | None


class BeamSearch:
    """The search of one request. ``beams``: its sequences, all of which live until it is over or aborted."""

    def __init__(self, params: BeamSearchParams, beams: ReadOnlyList[Sequence]) -> None:
        self.params = params
        self.beams = beams
        self.answers: list[Answer] = []  # best first, ``beam_width`` at most
        self._candidates: dict[int, Candidates] = {}  # by sequence id, of those that have computed all they know

    def offer(self, beam: Sequence, candidates: Candidates) -> None:
        """Take how ``beam`` may go on.

        At the prompt's end the first one speaks for all: the others are its equals, and would only say the same again.
        """
        self._candidates[beam.sequence_id] = candidates

    @property
    def is_complete(self) -> bool:
        """Whether no beam is left to wait for. Where the budget is short, or after a preemption, beams come to their
        last token in different steps."""
        return bool(self._candidates) and not any(one.num_uncomputed_tokens for one in self.beams)

    def advance(self) -> list[Branch]:
        """Choose the new beams, best first, and keep the answers; no beam if the search is over."""
        parents = [beam for beam in self.beams if beam.sequence_id in self._candidates]
        branches = [
            Branch(parent, token_id, parent.cumulative_logprob + logprob)
            for parent in parents
            for token_id, logprob in self._candidates[parent.sequence_id]
        ]
        branches.sort(key=lambda branch: -branch.cumulative_logprob)
        self._candidates.clear()
        width = len(self.beams)
        alive: list[Branch] = []
        for place, branch in enumerate(branches[: num_candidates(width, parents[0].end_token_ids)]):
            ending = branch.parent.check_stop(branch.token_id)
            if ending is None:
                alive.append(branch)
            elif place < width:
                self._keep(branch, *ending)
        return [] if not alive or self._is_over(alive[0]) else alive[:width]

    def _keep(self, branch: Branch, reason: str, stop_reason: int | None) -> None:
        parent, token_id, logprob = branch
        score = logprob / (parent.num_output_tokens + 1) ** self.params.length_penalty
        answer = Answer([*parent.token_ids, token_id], logprob, score, reason, stop_reason)
        self.answers = sorted([*self.answers, answer], key=lambda a: -a.score)[: len(self.beams)]

    def _is_over(self, best: Branch) -> bool:
        """Whether there are enough answers, and by ``early_stopping`` no better one is to be hoped for."""
        if len(self.answers) < len(self.beams):
            return False
        if self.params.early_stopping is True or len(self.beams) == 1:  # transformers' one beam is greedy decoding
            return True
        parent, length_penalty = best.parent, self.params.length_penalty
        if self.params.early_stopping == "never" and length_penalty > 0:
            length = parent.max_total_tokens - parent.num_prompt_tokens
        else:
            length = parent.num_output_tokens + 1
        return best.cumulative_logprob / length**length_penalty <= self.answers[-1].score


def num_candidates(beam_width: int, end_token_ids: ReadOnlyList[int]) -> int:
    """How many tokens to look at: enough that ``beam_width`` go on even where every beam may end in every way."""
    return max(2, 1 + len(end_token_ids)) * beam_width


def seat(beams: ReadOnlyList[Sequence], branches: ReadOnlyList[Branch]) -> list[tuple[Sequence, Branch]]:
    """Give each branch a sequence: its parent's own to a parent's best, that of a childless beam to each other."""
    first: dict[int, Branch] = {}
    others = []
    for branch in branches:  # best first
        if first.setdefault(branch.parent.sequence_id, branch) is not branch:
            others.append(branch)
    childless = [beam for beam in beams if beam.sequence_id not in first]
    moved = zip(childless, others, strict=True)
    return [*moved, *((branch.parent, branch) for branch in first.values())]


def go_on(search: BeamSearch, scheduler: Scheduler) -> ReadOnlyList[Sequence]:
    """One more token for every beam, or the search's end."""
    branches = search.advance()
    for sequence, branch in seat(search.beams, branches) if branches else ():
        if branch.parent is not sequence:
            fork(branch.parent, sequence, scheduler.manager)
        sequence.token_ids.append(branch.token_id)
        sequence.cumulative_logprob = branch.cumulative_logprob
    for sequence, answer in zip(search.beams, search.answers, strict=True) if not branches else ():
        scheduler.finish(sequence, answer.finish_reason, answer.stop_reason)
        sequence.become(answer)
    return search.beams


def fork(parent: Sequence, child: Sequence, manager: BlockManager) -> None:
    """Let ``child`` go on as its sibling ``parent`` would, both running: what it knew and held is dropped."""
    manager.fork(parent.sequence_id, child.sequence_id, parent.num_computed_tokens)
    child.fork_from(parent, parent.num_computed_tokens, manager.block_size)
    child.token_ids = list(parent.token_ids)
