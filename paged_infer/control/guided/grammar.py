"""What a constrained sequence needs from a grammar, and the grammars that are compiled here.

    matcher.mask()       the tokens that may come next           before each sample
    matcher.accept(t)    the token that was sampled              after it
    matcher.rollback(n)  undo the last n tokens                  rejected drafts, tokens after a stop string

Libraries have the same interface (``sampling.grammar_libraries``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence as ReadOnlyList
from typing import Protocol

from paged_infer.control.guided.characters import utf8
from paged_infer.control.guided.json_keywords import UnsupportedError
from paged_infer.control.guided.json_schema import json_network
from paged_infer.control.guided.machine import GrammarError as GrammarError
from paged_infer.control.guided.machine import Machine, State
from paged_infer.control.guided.network import Network
from paged_infer.control.guided.regex import regex_dfa
from paged_infer.control.guided.vocabulary import Vocabulary

MAX_FORCED_BYTES = 256


class Matcher(Protocol):
    """The position of one sequence in its grammar. Each method may raise a GrammarError, and then changes nothing."""

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing but an end-of-sequence token can follow."""

    def constrains(self, num_ahead: int) -> bool:
        """Whether the mask of the next token, or of one of the ``num_ahead`` after it, may forbid anything."""

    def mask(self) -> bytes | None:
        """The tokens that may come next, one bit each; see ``control.guided.vocabulary``. None: all of them.

        Raises:
            GrammarError: no token may come next.
        """

    def accept(self, token_id: int) -> bool:
        """Advance by the token. Returns False, and does not advance, if it is not allowed."""

    def rollback(self, num_tokens: int) -> None:
        """Undo the last ``num_tokens`` accepted tokens."""

    def forced(self) -> list[int]:
        """The tokens of the text that must come next (jump-forward), up to the first choice. Does not advance."""


class Grammar(Protocol):
    """Compiled once, shared by all sequences that follow it."""

    def matcher(self) -> Matcher:
        """The matcher of a new sequence, at the beginning of the grammar."""


class NativeGrammar:
    """A grammar that is compiled here.

    Args:
        kind: "json" (a schema as JSON text), "regex", or "choice" (a JSON list of strings).
        text: the grammar.
        vocabulary: the tokens of the model.

    Raises:
        UnsupportedError: a JSON schema that is not supported here, though a library might support it.
        ValueError: it is malformed, no text satisfies it, or it is too large; the message gives the reason.
    """

    def __init__(self, kind: str, text: str, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        try:
            self.machine = Machine(_network(kind, text))
        except GrammarError as error:
            raise UnsupportedError(str(error)) from None
        vocabulary.build()  # here, where grammars are compiled, rather than between two steps

    def matcher(self) -> NativeMatcher:
        return NativeMatcher(self)


def _network(kind: str, text: str) -> Network:
    if kind == "json":
        return json_network(json.loads(text))
    network = Network()
    start = network.rules[0][0]
    if kind == "choice":
        network.close(network.literals(start, [choice.encode() for choice in json.loads(text)]))
    else:
        network.close(network.splice(start, regex_dfa(text), utf8))
    return network


class NativeMatcher:
    """See ``Matcher``. It keeps the machine's state after each token, so that a rollback costs nothing."""

    def __init__(self, grammar: NativeGrammar) -> None:
        self._machine, self._vocabulary = grammar.machine, grammar.vocabulary
        self._states: list[State | None] = [grammar.machine.start]  # None: the end-of-sequence token was accepted

    @property
    def is_finished(self) -> bool:
        state = self._states[-1]
        return state is None or self._machine.is_final(state)

    def constrains(self, num_ahead: int) -> bool:
        return True

    def mask(self) -> bytes:
        state = self._states[-1]
        if state is None:
            return self._vocabulary.everything  # whatever is sampled here is dropped
        mask = self._vocabulary.mask(self._machine, state)
        if not any(mask):
            raise GrammarError("its grammar allows none of the vocabulary's tokens")
        return mask

    def accept(self, token_id: int) -> bool:
        state, vocabulary = self._states[-1], self._vocabulary
        if state is None:
            return False
        if token_id in vocabulary.eos_token_ids:
            if state.is_accepting:
                self._states.append(None)
            return state.is_accepting
        text = vocabulary.tokens[token_id] if 0 <= token_id < len(vocabulary.tokens) else None
        after = None if text is None else self._machine.step(state, text)
        if after is not None:
            self._states.append(after)
        return after is not None

    def rollback(self, num_tokens: int) -> None:
        if num_tokens >= len(self._states):
            raise ValueError(f"num_tokens={num_tokens}: only {len(self._states) - 1} were accepted")
        del self._states[len(self._states) - num_tokens :]

    def forced(self) -> list[int]:
        state, text = self._states[-1], bytearray()
        while state is not None and len(text) < MAX_FORCED_BYTES:
            byte = self._machine.forced_byte(state)
            if byte is None:
                break
            text.append(byte)
            state = self._machine.step(state, bytes([byte]))
        return self._vocabulary.split(bytes(text))


def num_allowed(matcher: Matcher, token_ids: ReadOnlyList[int]) -> int:
    """How many of the tokens, from the first on, the grammar allows in this order. Does not advance the matcher."""
    number = _advance(matcher, token_ids)
    matcher.rollback(number)
    return number


def mask_after(matcher: Matcher, token_ids: ReadOnlyList[int]) -> bytes | None:
    """The mask after these tokens, up to the first that is not allowed. Does not advance the matcher."""
    number = _advance(matcher, token_ids)
    try:
        return matcher.mask()
    finally:
        matcher.rollback(number)


def _advance(matcher: Matcher, token_ids: ReadOnlyList[int]) -> int:
    """Accept the tokens before the first that is not allowed, or at which the grammar fails. Returns how many."""
    for number, token_id in enumerate(token_ids):
        try:
            if not matcher.accept(token_id):
                return number
        except GrammarError:
            return number
    return len(token_ids)
