"""Beam search: which beams continue, which become answers (finished hypotheses), and when it ends, as in transformers.

    beams (2)         all continuations, best first         one that ends is an answer, if among the first 2
    A  -1.0           A b -1.2   B a -1.9   A <eos> -2.0    A b and B a continue
    B  -1.5    or:    A b -1.2   A <eos> -1.3   A c -1.6    A b and A c continue, A <eos> is an answer, B is dropped

A beam is a sequence of the request. This module only decides; ``beam_moves`` applies its decisions.

An answer's score is its sum of logprobs over its length to the power ``length_penalty`` (Wu et al. 2016, section 7, in
the form of transformers' ``GenerationMixin._beam_search``).
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from typing import NamedTuple

from paged_infer.control.sequence import Sequence
from paged_infer.control.step import Candidates
from paged_infer.params import BeamSearchParams


class Branch(NamedTuple):
    """A continuation: a beam and one more token."""

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
        self.answers: list[Answer] = []  # best first, at most ``beam_width``
        self._candidates: dict[int, Candidates] = {}  # by sequence id, of beams that have computed all their tokens

    def add_candidates(self, beam: Sequence, candidates: Candidates) -> None:
        """Add the best next tokens of ``beam``.

        At the end of the prompt only the first beam has them: the others are still equal to it.
        """
        self._candidates[beam.sequence_id] = candidates

    @property
    def is_complete(self) -> bool:
        """Whether all beams have candidates. With a short budget or a preemption these come in different steps."""
        return bool(self._candidates) and not any(one.num_uncomputed_tokens for one in self.beams)

    def advance(self) -> list[Branch]:
        """Choose the new beams, best first, and keep the answers; no beams if the search is over."""
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
            ended = branch.parent.check_stop(branch.token_id)
            if ended is None:
                alive.append(branch)
            elif place < width:
                self._keep(branch, *ended)
        return [] if not alive or self._is_over(alive[0]) else alive[:width]

    def _keep(self, branch: Branch, reason: str, stop_reason: int | None) -> None:
        parent, token_id, logprob = branch
        score = logprob / (parent.num_output_tokens + 1) ** self.params.length_penalty
        answer = Answer([*parent.token_ids, token_id], logprob, score, reason, stop_reason)
        self.answers = sorted([*self.answers, answer], key=lambda a: -a.score)[: len(self.beams)]

    def _is_over(self, best: Branch) -> bool:
        """Whether there are enough answers, and by ``early_stopping`` none can be better."""
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
    """How many next tokens to rank, so that ``beam_width`` continue even if every beam can end with each end token."""
    return max(2, 1 + len(end_token_ids)) * beam_width
