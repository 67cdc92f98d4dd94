"""What the output of a request must follow: a schema, a pattern, a choice or a grammar. Nothing here imports torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paged_infer.suggestions import suggests_names
from paged_infer.values import Checked, as_tuple

BACKENDS = ("auto", "native", "xgrammar", "llguidance")


@suggests_names("StructuredOutputsParams")
@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams(Checked):
    """What the output must follow: exactly one of json, regex, choice and grammar. Names and meanings are vLLM's.

    Args:
        json: a JSON schema, as a dict, True (any document) or JSON text; see ``control.guided.json_schema`` for what
            is supported and which valid documents can be generated.
        regex: a regular expression that the whole output matches; see ``control.guided.regex``.
        choice: a list of strings; the output is one of them.
        grammar: a context-free grammar in the EBNF of the library that reads it: GBNF for xgrammar, Lark for
            llguidance.
        backend: what compiles it. "native" is this package's own, in ``control.guided``, without EBNF. "xgrammar" and
            "llguidance" are libraries (extra ``[guided]``). "auto" is "native", except for EBNF, schemas that it does
            not support, and vocabularies of more than 16,384 tokens, for which it is slow: those go to a library that
            is installed.

    Raises:
        ValueError: none or several are given, or a value is malformed; the message names it. Grammars are compiled,
            and refused, when a request is added.
    """

    _prefix = "structured_outputs: "

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise ValueError(
                f"structured_outputs: exactly one of json, regex, choice and grammar is needed, not {found}"
            )
        self._check_choice("backend", BACKENDS)
        if self.json is not None:
            self._check_json()
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise self._refuse(name, "must be a str that is not empty")
        if self.grammar is not None and self.backend == "native":
            raise self._refuse("backend", "only xgrammar and llguidance read a grammar")
        if self.choice is not None:
            choices = () if isinstance(self.choice, str) else as_tuple(self.choice) or ()
            if not choices or not all(isinstance(text, str) and text for text in choices):
                raise self._refuse("choice", "must be a list of str, none of them empty")
            self._keep("choice", choices)

    def _check_json(self) -> None:
        schema = self.json
        if isinstance(schema, str):
            try:
                schema = json.loads(schema, parse_constant=_refuse_constant)
            except (ValueError, RecursionError) as error:
                raise self._refuse("json", f"is not valid JSON: {error or 'it is nested too deep'}") from None
        if not isinstance(schema, (Mapping, bool)):
            raise self._refuse("json", "a schema must be an object, or true")
        try:
            text = json.dumps(dict(schema) if isinstance(schema, Mapping) else schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise self._refuse("json", f"is not valid JSON: {error}") from None
        self._keep("json", text)

    @property
    def kind(self) -> str:
        """Which of json, regex, choice and grammar is given."""
        return next(name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None)

    @property
    def text(self) -> str:
        """The schema, pattern or grammar, or the choices as a JSON list."""
        value = getattr(self, self.kind)
        return json.dumps(value) if self.kind == "choice" else value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
