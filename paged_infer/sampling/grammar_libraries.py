"""Grammars compiled by xgrammar or llguidance, with the interface of ``control.guided.grammar`` (extra ``[guided]``).

Both support all of EBNF and more of JSON schema than ``control.guided``, and make a mask of 150,000 tokens in some
microseconds. They are imported when a request first needs them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cached_property, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from paged_infer.control.guided.grammar import Grammar, GrammarError
from paged_infer.control.guided.vocabulary import Vocabulary

# Keywords that xgrammar ignores without an error, so that its output might not be valid.
_XGRAMMAR_IGNORES = (
    "multipleOf uniqueItems contains minContains maxContains not if then else oneOf dependentRequired dependentSchemas "
    "propertyNames patternProperties minProperties maxProperties unevaluatedItems"
).split()


F = TypeVar("F", bound=Callable[..., Any])


class Library(Protocol):
    """Compiles grammars for one vocabulary."""

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None: ...

    def compile(self, kind: str, text: str) -> Grammar:
        """``kind``: "json", "regex", "choice" or "grammar". Raises ValueError if the library refuses the text."""


class Xgrammar:
    """https://github.com/mlc-ai/xgrammar; its EBNF is GBNF, whose rules are written with ``::=``.

    Version 0.2.9 allows control characters in JSON strings of a limited length, which are no JSON: in documents, tokens
    with such a character are left out here. There it also allows the bytes of surrogates, which decode to U+FFFD.
    """

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        self.library, self.vocabulary, self.vocab_size = import_module("xgrammar"), vocabulary, vocab_size
        info = self.library.TokenizerInfo(
            [text or b"" for text in vocabulary.tokens],
            vocab_type=self.library.VocabType.RAW,
            vocab_size=vocab_size,
            stop_token_ids=sorted(vocabulary.eos_token_ids),
        )
        # Its own cache would keep every grammar; which ones are kept is decided where this is called.
        self.compiler = self.library.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    @cached_property
    def plain(self) -> NDArray[np.int32]:
        """The mask of all tokens without a control character."""
        vocabulary = self.vocabulary
        control = [i for text, ids in vocabulary.ids.items() if min(text) < 0x20 for i in ids]
        bits = (1 << 8 * vocabulary.num_mask_bytes) - 1 - sum(1 << i for i in control)
        return np.frombuffer(bits.to_bytes(vocabulary.num_mask_bytes, "little"), np.int32)

    def compile(self, kind: str, text: str) -> Grammar:
        try:
            return _satisfiable(_XgrammarGrammar(self, self._compiled(kind, text), is_json=kind == "json"), "xgrammar")
        except Exception as error:  # a library can raise anything
            raise ValueError(f"xgrammar: {_last_line(error)}") from None

    def _compiled(self, kind: str, text: str) -> Any:
        if kind == "json":
            schema = json.loads(text)
            if (reason := next(filter(None, map(_left_out, _subschemas(schema))), None)) is not None:
                raise ValueError(f"xgrammar: {reason}")
            return self.compiler.compile_json_schema(text, any_whitespace=False)  # which could go on forever
        if kind == "regex":
            return self.compiler.compile_regex(text)
        if kind == "choice":  # in EBNF, a literal is written as in JSON
            choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
            return self.compiler.compile_grammar(f"root ::= {choices}")
        return self.compiler.compile_grammar(text)


class Llguidance:
    """https://github.com/guidance-ai/llguidance; its EBNF is Lark, whose rules are written with a colon."""

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        self.library, self.vocabulary, self.vocab_size = import_module("llguidance"), vocabulary, vocab_size
        self.fill = import_module("llguidance.numpy").fill_next_token_bitmask
        self.tokenizer = self.library.LLTokenizer(self.library.TokenizerWrapper(_TokenizerView(vocabulary, vocab_size)))

    def compile(self, kind: str, text: str) -> Grammar:
        matcher = self.library.LLMatcher
        try:
            if kind == "json":
                schema = json.loads(text)
                options = {"whitespace_flexible": False}
                if isinstance(schema, dict):
                    grammar = matcher.grammar_from_json_schema(text, overrides=options)
                else:
                    grammar = matcher.grammar_from_json_schema({"allOf": [schema]}, overrides=options)
            elif kind == "choice":
                grammar = matcher.grammar_from_lark(
                    "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
                )
            else:
                grammar = (matcher.grammar_from_regex if kind == "regex" else matcher.grammar_from_lark)(text)
            found = matcher(self.tokenizer, grammar)
        except Exception as error:  # a library can raise anything
            raise ValueError(f"llguidance: {error}") from None
        if found.is_error():
            raise ValueError(f"llguidance: {found.get_error().strip()}")
        return _satisfiable(_LlguidanceGrammar(self, found), "llguidance")


LIBRARIES: dict[str, type[Library]] = {"llguidance": Llguidance, "xgrammar": Xgrammar}
"""By name; "auto" takes the first that is installed. llguidance refuses every keyword that it does not support."""


def is_installed(name: str) -> bool:
    return find_spec(name) is not None


def _fails_alone(method: F) -> F:
    """Whatever the library raises becomes a GrammarError, which ends its own request only."""

    @wraps(method)
    def guarded(*arguments: Any) -> Any:
        try:
            return method(*arguments)
        except GrammarError:
            raise
        except Exception as error:
            raise GrammarError(f"its grammar failed: {_last_line(error)}") from None

    return guarded  # type: ignore[return-value]


class _LibraryMatcher:
    """The common part of both matchers: the end, and the bitmask that the library writes to."""

    def __init__(self, matcher: Any, vocabulary: Vocabulary, vocab_size: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._bitmask = np.zeros((1, -(-vocab_size // 32)), np.int32)
        self._has_ended = False  # by an end-of-sequence token
        self._eos = np.frombuffer(vocabulary.eos.to_bytes(vocabulary.num_mask_bytes, "little"), np.int32)

    def constrains(self, num_ahead: int) -> bool:
        return True

    @_fails_alone
    def mask(self) -> bytes:
        if self._has_ended:
            return self._vocabulary.everything
        self._fill()
        if not self._bitmask.any():
            raise GrammarError("its grammar allows none of the vocabulary's tokens")
        return self._bitmask.tobytes()

    @_fails_alone
    def accept(self, token_id: int) -> bool:
        if self._has_ended:
            return False
        if token_id in self._vocabulary.eos_token_ids:
            self._has_ended = self._is_accepting()
            return self._has_ended
        is_text = token_id < len(self._vocabulary.tokens) and self._vocabulary.tokens[token_id] is not None
        return is_text and self._take(token_id)

    @_fails_alone
    def rollback(self, num_tokens: int) -> None:
        if num_tokens and self._has_ended:
            self._has_ended, num_tokens = False, num_tokens - 1
        if num_tokens:
            self._matcher.rollback(num_tokens)

    @_fails_alone
    def forced(self) -> list[int]:
        return [] if self._has_ended else self._vocabulary.split(self._forced_bytes())

    # What the libraries differ in.
    def _fill(self) -> None: ...
    def _is_accepting(self) -> bool: ...  # type: ignore[empty-body]
    def _take(self, token_id: int) -> bool: ...  # type: ignore[empty-body]
    def _forced_bytes(self) -> bytes: ...  # type: ignore[empty-body]


class _XgrammarGrammar:
    def __init__(self, library: Xgrammar, compiled: Any, is_json: bool) -> None:
        self.library, self.compiled, self.is_json = library, compiled, is_json

    def matcher(self) -> _XgrammarMatcher:
        return _XgrammarMatcher(self.library, self.compiled, self.is_json)


class _XgrammarMatcher(_LibraryMatcher):
    def __init__(self, library: Xgrammar, compiled: Any, is_json: bool) -> None:
        super().__init__(library.library.GrammarMatcher(compiled), library.vocabulary, library.vocab_size)
        self._plain = library.plain if is_json else None
        rest = library.vocab_size % 32
        self._last_word = (1 << rest) - 1 if rest else -1

    @property
    @_fails_alone
    def is_finished(self) -> bool:
        if self._has_ended or not self._matcher.is_completed():
            return self._has_ended
        self._fill()
        return not (self._bitmask[0] & ~self._eos).any()

    def _fill(self) -> None:
        self._matcher.fill_next_token_bitmask(self._bitmask)
        self._bitmask[0, -1] &= self._last_word  # it sets bits beyond the last token
        if self._plain is not None:
            self._bitmask[0] &= self._plain

    def _is_accepting(self) -> bool:
        return bool(self._matcher.is_completed())

    def _take(self, token_id: int) -> bool:
        is_plain = self._plain is None or bool(self._plain[token_id >> 5] >> (token_id & 31) & 1)
        return is_plain and bool(self._matcher.accept_token(token_id))

    def _forced_bytes(self) -> bytes:
        return self._matcher.find_jump_forward_string().encode()


class _LlguidanceGrammar:
    def __init__(self, library: Llguidance, first: Any) -> None:
        self.library, self.first = library, first

    def matcher(self) -> _LlguidanceMatcher:
        return _LlguidanceMatcher(self.library, self.first.deep_copy())


class _LlguidanceMatcher(_LibraryMatcher):
    def __init__(self, library: Llguidance, matcher: Any) -> None:
        super().__init__(matcher, library.vocabulary, library.vocab_size)
        self._fill_next = library.fill

    @property
    @_fails_alone
    def is_finished(self) -> bool:
        return self._has_ended or (self._matcher.is_stopped() and self._matcher.is_accepting())

    def _fill(self) -> None:
        self._fill_next(self._matcher, self._bitmask, 0)
        if self._matcher.is_error():
            raise GrammarError(f"llguidance: {self._matcher.get_error().strip()}")
        if self._matcher.is_accepting():  # it sets the bit of one end-of-sequence token
            self._bitmask[0] |= self._eos

    def _is_accepting(self) -> bool:
        return bool(self._matcher.is_accepting())

    def _take(self, token_id: int) -> bool:
        return self._matcher.try_consume_tokens([token_id]) == 1  # consume_token would break the matcher

    def _forced_bytes(self) -> bytes:
        return self._matcher.compute_ff_bytes()


class _TokenizerView:
    """The vocabulary in llguidance's form. Special tokens and rows without a token get names that no text contains."""

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        special = [i for i in range(vocab_size) if i >= len(vocabulary.tokens) or vocabulary.tokens[i] is None]
        self.special_token_ids = special
        self.tokens = [*vocabulary.tokens, *[None] * (vocab_size - len(vocabulary.tokens))]
        self.tokens = [f"<|special {i}|>".encode() if text is None else text for i, text in enumerate(self.tokens)]
        self.bos_token_id = None
        # If there is none, a token that is never sampled stands in for it.
        self.eos_token_id = min(vocabulary.eos_token_ids, default=special[0] if special else vocab_size - 1)
        self._split = vocabulary.split

    def __call__(self, text: str | bytes) -> list[int]:
        return self._split(text.encode() if isinstance(text, str) else text)


def _satisfiable(grammar: Grammar, name: str) -> Grammar:
    """The grammar. Raises ValueError if it allows no first token: a schema that leads back to itself, for example."""
    try:
        grammar.matcher().mask()
    except GrammarError:
        raise ValueError(f"{name}: nothing satisfies it") from None
    return grammar


def _subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and all of its parts."""
    if isinstance(schema, list):
        for part in schema:
            yield from _subschemas(part)
    elif isinstance(schema, dict):
        yield schema
        for keyword, part in schema.items():
            if keyword in ("properties", "$defs", "definitions") and isinstance(part, dict):  # their keys are names
                yield from _subschemas([*part.values()])
            elif keyword not in ("const", "enum", "default", "examples"):
                yield from _subschemas(part)


def _left_out(schema: dict[str, Any]) -> str | None:
    """What xgrammar would leave out of a schema without an error."""
    if (keyword := next((one for one in _XGRAMMAR_IGNORES if one in schema), None)) is not None:
        return f"keyword {keyword!r} is not supported"
    if "pattern" in schema and (limit := next((one for one in ("minLength", "maxLength") if one in schema), None)):
        return f"{limit} beside pattern is not supported"
    required, known = schema.get("required"), schema.get("properties", {})
    if isinstance(required, list) and isinstance(known, dict):
        unknown = next((name for name in required if name not in known), None)
        return None if unknown is None else f"required {unknown!r}, which is none of its properties, is not supported"
    return None


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[-1].split(": ", 1)[-1]
