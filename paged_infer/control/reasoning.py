"""Where a model's reasoning ends, found in its tokens, and which tokens may come before and after that.

                   prompt                     output
    qwen3          ... <think>                t t t t </think> content      the chat template opened it
                   ...                        <think> t t </think> content  the model opens it,
                                              content                       or does not reason
                   ... <think> </think>       content                       it was turned off
    deepseek_r1    ...                        t t t t </think> content      with or without <think>

Only the last turn of a prompt counts: the tokens after the last end-of-sequence token.

The markers are looked for in the tokens' bytes. So they are found however the model spells them: as one token, as
several, or with the end of ``</think>`` in a token that continues after it (``>\\n``).

A ``ReasoningMatcher`` is a ``Matcher`` (``control.guided.grammar``), and a sequence keeps it like one of a grammar. So
drafts, rollbacks, tokens after a stop string, preemption and several samples of a request need no further code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as ReadOnlyList
from enum import Enum
from typing import NamedTuple

from paged_infer.control.guided.grammar import GrammarError, Matcher
from paged_infer.control.guided.vocabulary import Vocabulary


class Part(Enum):
    OPENING = "opening"  # the output so far is empty, or the beginning of the start marker
    REASONING = "reasoning"
    CONTENT = "content"


class ReasoningFormat(NamedTuple):
    """The markers, and where an answer begins if the last turn of the prompt has none."""

    start: bytes
    end: bytes
    first: Part


REASONING_PARSERS = {
    "qwen3": ReasoningFormat(b"<think>", b"</think>", Part.OPENING),
    "deepseek_r1": ReasoningFormat(b"<think>", b"</think>", Part.REASONING),
}


class _State(NamedTuple):
    """The state after one token of the output.

    Attributes:
        num_matched: how many of the last bytes begin a marker: the start marker in an opening, the end in reasoning.
        num_thoughts: reasoning tokens, without those of the start marker.
        num_before: output tokens before the content, once that has begun.
        has_content: whether the content has a token of text.
        taker: the grammar's matcher that accepted the token.
    """

    part: Part
    num_matched: int = 0
    num_thoughts: int = 0
    num_before: int = 0
    has_content: bool = False
    taker: Matcher | None = None


class ReasoningParser:
    """The markers in one vocabulary.

    Args:
        name: one of ``REASONING_PARSERS``.
        vocabulary: the tokens of the model.
        special_tokens: text and id of the tokens that have no bytes in ``vocabulary``. A marker may be one of them.

    Raises:
        ValueError: no tokens of the vocabulary spell the end marker.
    """

    def __init__(self, name: str, vocabulary: Vocabulary, special_tokens: Mapping[str, int]) -> None:
        self.start, self.end, self.first = REASONING_PARSERS[name]
        self.vocabulary = vocabulary
        rest = 8 * vocabulary.num_mask_bytes - len(vocabulary.tokens)  # the model may have more than the tokenizer
        self.texts = [text or b"" for text in vocabulary.tokens] + [b""] * rest
        self.ids = {text: ids[0] for text, ids in vocabulary.ids.items()}
        for marker in (self.start, self.end):
            token_id = special_tokens.get(marker.decode())
            if token_id is not None:
                self.texts[token_id], self.ids[marker] = marker, token_id
        if not self.rest_of_end(0):
            raise ValueError(f"reasoning_parser={name!r}: no tokens of this tokenizer spell {self.end.decode()}")
        self._masks: dict[int, bytes | None] = {}  # see ``within``
        self._openings: dict[int, int] = {}

    def first_part(self, prompt_token_ids: ReadOnlyList[int]) -> Part:
        """Where an answer to the prompt begins."""
        ends = (end for end in self.vocabulary.eos_token_ids if end in prompt_token_ids)
        num_since = min((prompt_token_ids[::-1].index(end) for end in ends), default=len(prompt_token_ids))
        turn = b"".join(map(self.texts.__getitem__, prompt_token_ids[len(prompt_token_ids) - num_since :]))
        opened, closed = turn.rfind(self.start), turn.rfind(self.end)
        if opened == closed:  # neither is there
            return self.first
        return Part.REASONING if opened > closed else Part.CONTENT

    def rest_of_end(self, num_matched: int) -> list[int]:
        """Tokens that spell the end marker after its first bytes; the whole marker if none spell the rest."""
        for text in (self.end[num_matched:], self.end):
            if token_ids := self._spelled(text):
                return token_ids
        return []

    def _spelled(self, text: bytes) -> list[int] | None:
        """Tokens that spell the text; None if none do."""
        token_ids = [self.ids[text]] if text in self.ids else self.vocabulary.split(text)
        return token_ids if b"".join(self.texts[i] for i in token_ids) == text else None

    def only(self, token_id: int) -> bytes:
        """The mask that allows one token."""
        return (1 << token_id).to_bytes(self.vocabulary.num_mask_bytes, "little")

    def within(self, num_matched: int) -> bytes | None:
        """The mask during reasoning if a grammar follows: no token that continues after the end marker, or ends it."""
        if num_matched not in self._masks:
            begun, over = self.end[:num_matched], self.vocabulary.eos
            for token_id, text in enumerate(self.texts):
                if self.end in (begun + text)[:-1]:
                    over |= 1 << token_id
            num_bytes = self.vocabulary.num_mask_bytes
            everything = (1 << 8 * num_bytes) - 1
            self._masks[num_matched] = (everything & ~over).to_bytes(num_bytes, "little") if over else None
        return self._masks[num_matched]

    def openers(self, num_matched: int) -> int:
        """The tokens that continue the start marker after its first bytes, if tokens can spell the rest: the bits of a
        mask."""
        if num_matched not in self._openings:
            rest = self.start[num_matched:]
            found = (self.ids.get(rest[:n]) for n in range(1, len(rest) + 1) if self._spelled(rest[n:]) is not None)
            self._openings[num_matched] = sum(1 << token_id for token_id in found if token_id is not None)
        return self._openings[num_matched]


class ReasoningMatcher:
    """Whether one sequence is in its reasoning or after it, where its grammar applies, if it has one.

    Args:
        parser: the engine's.
        first: where the sequence's output begins.
        grammar: returns a matcher at the beginning of the grammar.
        budget: the most tokens of reasoning; then the end marker is forced. None: no limit.
    """

    def __init__(
        self, parser: ReasoningParser, first: Part, grammar: Callable[[], Matcher] | None, budget: int | None
    ) -> None:
        self._parser, self._budget = parser, budget
        # One for content without reasoning, one for content after reasoning: an opening may become either.
        self._direct = None if grammar is None or first is Part.REASONING else grammar()
        self._behind = None if grammar is None or first is Part.CONTENT else grammar()
        self._has_grammar = grammar is not None
        self._states = [_State(first)]

    # -- for metrics ------------------------------------------------------------------------------------------------

    @property
    def num_reasoning_tokens(self) -> int:
        """Output tokens that belong to the reasoning, markers included."""
        state = self._states[-1]
        return {Part.OPENING: 0, Part.REASONING: len(self._states) - 1, Part.CONTENT: state.num_before}[state.part]

    @property
    def has_ended(self) -> bool:
        """Whether the output has had reasoning, and it has ended."""
        return self._states[-1].num_before > 0

    @property
    def has_content(self) -> bool:
        """Whether the output has a token of text outside the reasoning."""
        return self._states[-1].has_content

    # -- Matcher ----------------------------------------------------------------------------------------------------

    @property
    def is_finished(self) -> bool:
        inner = self._inner(self._states[-1])
        return inner is not None and inner.is_finished

    def constrains(self, num_ahead: int) -> bool:
        state = self._states[-1]
        if self._has_grammar or state.part is Part.CONTENT:
            return self._has_grammar
        return self._budget is not None and state.num_thoughts + num_ahead >= self._budget

    def mask(self) -> bytes | None:
        state = self._states[-1]
        if state.part is Part.CONTENT:
            inner = self._inner(state)
            return None if inner is None else inner.mask()
        if self._is_spent(state):
            return self._parser.only(self._parser.rest_of_end(state.num_matched)[0])
        if not self._has_grammar:
            return None
        if state.part is Part.REASONING:
            return self._parser.within(state.num_matched)
        allowed = int.from_bytes(self._direct_mask(state), "little") | self._parser.openers(state.num_matched)
        if not allowed:
            raise GrammarError("its grammar allows none of the vocabulary's tokens")
        return allowed.to_bytes(self._parser.vocabulary.num_mask_bytes, "little")

    def accept(self, token_id: int) -> bool:
        after = self._after(self._states[-1], token_id)
        if after is not None:
            self._states.append(after)
        return after is not None

    def rollback(self, num_tokens: int) -> None:
        if num_tokens >= len(self._states):
            raise ValueError(f"num_tokens={num_tokens}: only {len(self._states) - 1} were accepted")
        for state in reversed(self._states[len(self._states) - num_tokens :]):
            if state.taker is not None:
                state.taker.rollback(1)
        del self._states[len(self._states) - num_tokens :]

    def forced(self) -> list[int]:
        state = self._states[-1]
        if self._is_spent(state):
            return self._parser.rest_of_end(state.num_matched)
        inner = self._inner(state)
        return [] if inner is None else inner.forced()

    # -- one token --------------------------------------------------------------------------------------------------

    def _inner(self, state: _State) -> Matcher | None:
        """The grammar's matcher that applies in the state."""
        if state.part is not Part.CONTENT:
            return None
        return self._behind if state.num_before else self._direct

    def _is_spent(self, state: _State) -> bool:
        return self._budget is not None and state.part is Part.REASONING and state.num_thoughts >= self._budget

    def _is_direct(self, state: _State) -> bool:
        """Whether the output is an opening whose tokens the grammar has accepted, too."""
        return self._direct is not None and (len(self._states) == 1 or state.taker is not None)

    def _direct_mask(self, state: _State) -> bytes:
        if self._direct is None or not self._is_direct(state):
            return b""
        try:
            return self._direct.mask() or b""
        except GrammarError:
            return b""

    def _after(self, state: _State, token_id: int) -> _State | None:
        text = self._parser.texts[token_id]
        if state.part is Part.OPENING:
            return self._after_opening(state, token_id, self._parser.start[: state.num_matched] + text)
        if state.part is Part.REASONING:
            return self._after_reasoning(state, token_id, self._parser.end[: state.num_matched] + text)
        inner = self._inner(state)
        if inner is not None and not inner.accept(token_id):
            return None
        return state._replace(has_content=state.has_content or bool(text), taker=inner)

    def _after_opening(self, state: _State, token_id: int, text: bytes) -> _State | None:
        start = self._parser.start
        if text == start or (text.startswith(start) and not self._has_grammar):
            return self._reasoning(text[len(start) :])
        direct = self._direct if self._is_direct(state) else None
        taker = direct if direct is not None and direct.accept(token_id) else None
        if start.startswith(text) and len(text) > state.num_matched:
            return _State(Part.OPENING, len(text), taker=taker)
        if self._has_grammar and taker is None:
            return None
        return _State(Part.CONTENT, has_content=bool(text), taker=taker)

    def _after_reasoning(self, state: _State, token_id: int, text: bytes) -> _State | None:
        if self._is_spent(state) and token_id != self._parser.rest_of_end(state.num_matched)[0]:
            return None
        if self._has_grammar and token_id in self._parser.vocabulary.eos_token_ids:
            return None  # the output would end without what was asked for
        after = self._reasoning(text, state.num_thoughts + 1)
        is_over = after.part is Part.CONTENT and not text.endswith(self._parser.end)
        return None if is_over and self._has_grammar else after

    def _reasoning(self, text: bytes, num_thoughts: int = 0) -> _State:
        """The state after ``text`` in the reasoning."""
        end = self._parser.end
        if end[:1] not in text:  # nearly always
            return _State(Part.REASONING, 0, num_thoughts)
        if end in text:
            return _State(Part.CONTENT, num_before=len(self._states), has_content=end in text[:-1])
        num_matched = next(n for n in range(len(end) - 1, -1, -1) if text.endswith(end[:n]))
        return _State(Part.REASONING, num_matched, num_thoughts)
