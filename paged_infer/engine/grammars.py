"""The grammars of an engine's requests, each compiled once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from functools import cached_property

from paged_infer.control.guided.grammar import Grammar, NativeGrammar
from paged_infer.control.guided.json_keywords import UnsupportedError
from paged_infer.control.guided.vocabulary import Vocabulary
from paged_infer.params import StructuredOutputsParams
from paged_infer.sampling.grammar_libraries import LIBRARIES, Library, is_installed
from paged_infer.text.tokenizer import Tokenizer

MAX_GRAMMARS = 64  # the most recently used ones are kept for later requests
# Beyond this, "auto" takes a library, if one is installed. The mask of a state that is reached for the first time takes
# the native grammar up to 1 us for each token of the vocabulary (strings of a limited length have a state for each
# length), and a library some microseconds in all. A state that was reached before takes 1 us.
MAX_NATIVE_TOKENS = 16_384


class GrammarCache:
    """Compiles grammars for one tokenizer, and keeps them. Thread-safe.

    Args:
        tokenizer: None if the checkpoint has none; then every request is refused.
        vocab_size: number of tokens that the model has logits for.
        eos_token_ids: the tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, eos_token_ids
        self._grammars: OrderedDict[tuple[str, str, str], Grammar] = OrderedDict()
        self._lock = threading.Lock()  # of ``_grammars``; not held while one is compiled
        self._libraries: dict[str, Library] = {}

    def get(self, asked: StructuredOutputsParams) -> Grammar:
        """The compiled grammar.

        Raises:
            ValueError: it is malformed, unsupported or unsatisfiable, its library is not installed, or there is no
                tokenizer; the message gives the reason.
        """
        key = asked.kind, asked.text, asked.backend
        with self._lock:
            grammar = self._grammars.get(key)
        if grammar is None:
            try:
                grammar = self._compile(asked)
            except RecursionError:
                raise ValueError(f"structured_outputs: {asked.kind}: it is nested too deep") from None
            except ValueError as error:
                raise ValueError(f"structured_outputs: {asked.kind}: {error}") from None
        with self._lock:
            self._grammars[key] = grammar
            self._grammars.move_to_end(key)
            while len(self._grammars) > MAX_GRAMMARS:
                self._grammars.popitem(last=False)
        return grammar

    def holds(self, asked: StructuredOutputsParams) -> bool:
        """Whether it has been compiled already."""
        with self._lock:
            return (asked.kind, asked.text, asked.backend) in self._grammars

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens' bytes as a trie. Raises ValueError if there is no tokenizer."""
        if self._tokenizer is None:
            raise ValueError("needs text, but this checkpoint has no tokenizer")
        return Vocabulary(self._tokenizer.vocabulary_bytes()[: self._vocab_size], self._eos_token_ids, self._vocab_size)

    def _compile(self, asked: StructuredOutputsParams) -> Grammar:
        kind, text, vocabulary = asked.kind, asked.text, self.vocabulary
        installed = [name for name in LIBRARIES if is_installed(name)]
        if asked.backend in LIBRARIES:
            return self._by_library(asked.backend, kind, text)
        if kind == "grammar":
            return self._by_library("xgrammar" if "::=" in text else "llguidance", kind, text)
        is_large = len(vocabulary.tokens) > MAX_NATIVE_TOKENS and asked.backend == "auto"
        if is_large and installed:
            try:
                return self._by_library(installed[0], kind, text)
            except ValueError:
                return NativeGrammar(kind, text, vocabulary)  # if this refuses it too, its error has the location
        try:
            return NativeGrammar(kind, text, vocabulary)
        except UnsupportedError as error:
            if asked.backend == "native":
                raise
            if not installed:
                raise ValueError(f"{error} (xgrammar or llguidance may: pip install 'paged-infer[guided]')") from None
            try:
                return self._by_library(installed[0], kind, text)
            except ValueError as refused:
                raise ValueError(f"{error} ({refused})") from None  # the first has the keyword and its location

    def _by_library(self, name: str, kind: str, text: str) -> Grammar:
        if not is_installed(name):
            raise ValueError(f"needs {name}: pip install 'paged-infer[guided]'")
        if name not in self._libraries:
            self._libraries[name] = LIBRARIES[name](self.vocabulary, self._vocab_size)
        return self._libraries[name].compile(kind, text)
