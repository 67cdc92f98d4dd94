"""Compile a JSON schema to a network of the documents that it describes, each in one spelling.

Not every document that a schema allows can be generated:

- properties come in the schema's order; optional ones may be left out. Further properties come only if
  ``additionalProperties`` is true or a schema, or if ``properties`` is absent, and never under the name of a property;
- whitespace is at most one space after a comma or a colon, so it cannot go on forever;
- characters stand for themselves, without ``\\u`` escapes where none is needed;
- numbers have no exponent and a bounded number of digits (see ``numbers``);
- a schema without ``type`` allows the types that its keywords apply to.

Each of these gives a subset, so every document that is generated is valid. What is not supported is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from paged_infer.control.guided.automaton import Automaton, TooLargeError, limited
from paged_infer.control.guided.characters import in_json, utf8
from paged_infer.control.guided.json_keywords import (
    ANNOTATIONS,
    KEYWORDS,
    SUPPORTED,
    UnsupportedError,
    bound,
    limits,
    list_of,
    refuse_others,
    shown,
    types_of,
)
from paged_infer.control.guided.json_texts import (
    FORMATS,
    any_number,
    any_text,
    fixed_texts,
    is_fixed,
    literal,
    other_texts,
)
from paged_infer.control.guided.network import Network
from paged_infer.control.guided.numbers import are_satisfiable, ends, max_digits, number_automaton
from paged_infer.control.guided.regex import regex_dfa


def json_network(schema: Any) -> Network:
    """The network of the documents that ``schema`` (a dict, or True for any document) describes.

    Raises:
        UnsupportedError: a keyword, format or value that is not supported; the message names it and its location.
        ValueError: a schema that is malformed, or that nothing satisfies.
    """
    network = Network()
    try:
        network.close(_Compiler(schema, network).value(schema, network.rules[0][0], "#"))
    except RecursionError:
        raise ValueError("the schema is nested too deep") from None
    except TooLargeError as error:
        raise UnsupportedError(str(error)) from None
    return network


class _Compiler:
    """Each method adds a part of the schema to the network from a given state, and returns the state after it.

    ``where`` is the location of that part in the schema, for errors.
    """

    def __init__(self, root: Any, network: Network) -> None:
        self.root, self.network = root, network
        self._rules: dict[str, int] = {}  # by the location of their schema

    def value(self, schema: Any, start: int, where: str) -> int:
        if schema is True or schema == {}:
            return self.call("any", {"type": [*KEYWORDS], "additionalProperties": True}, start)
        if schema is False:
            return self.network.new_state()  # which cannot be reached
        if not isinstance(schema, Mapping):
            raise ValueError(f"{where}: {shown(schema)} is not a schema: must be an object, true or false")
        for keyword in schema:
            if keyword not in SUPPORTED and keyword not in ANNOTATIONS:
                raise UnsupportedError(f"{where}: keyword {keyword!r} is not supported; known: {', '.join(SUPPORTED)}")
        for keyword in ("$ref", "anyOf", "allOf"):
            if keyword in schema:
                refuse_others(schema, keyword, (), where)
                return getattr(self, "_" + keyword.strip("$").lower())(schema, start, where)
        if is_fixed(schema):
            return self.network.literals(start, fixed_texts(schema, where))
        return self._typed(schema, start, where)

    def call(self, name: str, schema: Any, start: int) -> int:
        """Call the rule of the schema at the location ``name``; it is compiled at its first call."""
        if name not in self._rules:
            rule = self._rules[name] = self.network.new_rule()
            first, last = self.network.rules[rule]
            self.network.free[self.value(schema, first, name)].append(last)
        return self.network.call(start, self._rules[name])

    # -- one of several -----------------------------------------------------------------------------------------

    def _ref(self, schema: Mapping[str, Any], start: int, where: str) -> int:
        reference = schema["$ref"]
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise UnsupportedError(f"{where}: $ref {shown(reference)} is not supported: only #/... in this schema")
        target = self.root
        for part in unquote(reference).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and part.isascii() and part.isdecimal() and int(part) < len(target):
                target = target[int(part)]
            elif isinstance(target, Mapping) and part in target:
                target = target[part]
            else:
                raise ValueError(f"{where}: $ref {reference!r} cannot be resolved: there is no {part!r}")
        return self.call(reference, target, start)

    def _anyof(self, schema: Mapping[str, Any], start: int, where: str) -> int:
        end, texts = self.network.new_state(), list[bytes]()
        for place, option in enumerate(list_of(schema, "anyOf", where)):
            own = f"{where}/anyOf/{place}"
            if is_fixed(option):
                texts += fixed_texts(option, own)
            else:
                self._branch(start, end, option, own)
        if texts:
            self.network.free[self.network.literals(start, texts)].append(end)
        return end

    def _allof(self, schema: Mapping[str, Any], start: int, where: str) -> int:
        parts = list_of(schema, "allOf", where)
        if len(parts) != 1:
            raise UnsupportedError(f"{where}: allOf of {len(parts)} schemas is not supported: must be one")
        return self.value(parts[0], start, f"{where}/allOf/0")

    def _branch(self, start: int, end: int, schema: Any, where: str) -> None:
        begin = self.network.new_state()
        self.network.free[start].append(begin)
        self.network.free[self.value(schema, begin, where)].append(end)

    def _typed(self, schema: Mapping[str, Any], start: int, where: str) -> int:
        if "type" in schema:
            types = [*dict.fromkeys(types_of(schema, where))]
        else:
            types = [name for name, keywords in KEYWORDS.items() if not set(keywords).isdisjoint(schema)] or [*KEYWORDS]
        if "number" in types:
            types = [name for name in types if name != "integer"]
        end = self.network.new_state()
        for name in types:
            begin = self.network.new_state()
            self.network.free[start].append(begin)
            self.network.free[getattr(self, "_" + name)(schema, begin, where)].append(end)
        return end

    # -- types --------------------------------------------------------------------------------------------------

    def _null(self, schema: Mapping[str, Any], start: int, where: str) -> int:
        return self.network.literal(start, b"null")

    def _boolean(self, schema: Mapping[str, Any], start: int, where: str) -> int:
        return self.network.literals(start, (b"true", b"false"))

    def _integer(self, schema: Mapping[str, Any], start: int, where: str) -> int:
        return self._number(schema, start, where, is_integer=True)

    def _number(self, schema: Mapping[str, Any], start: int, where: str, is_integer: bool = False) -> int:
        low = bound(schema, "minimum", "exclusiveMinimum", max, where)
        high = bound(schema, "maximum", "exclusiveMaximum", min, where)
        if low is None and high is None:
            return self.network.splice(start, any_number(is_integer), utf8)
        numbers = number_automaton(low, high, is_integer=is_integer)
        if not ends(numbers) and are_satisfiable(low, high, is_integer):
            most = f"{max_digits(is_integer)} digits and without an exponent"
            raise UnsupportedError(f"{where}: no number of at most {most} is within the bounds")
        return self.network.splice(start, numbers, utf8)

    def _string(self, schema: Mapping[str, Any], start: int, where: str) -> int:
        low, high = limits(schema, "minLength", "maxLength", where)
        pattern = schema.get("pattern")
        if "format" in schema:
            name = schema["format"]
            if name not in FORMATS:
                raise UnsupportedError(f"{where}: format {shown(name)} is not supported; known: {', '.join(FORMATS)}")
            if pattern is not None:
                raise UnsupportedError(f"{where}: format together with pattern is not supported")
            pattern = FORMATS[name]
        if pattern is None:
            text = any_text()
        elif isinstance(pattern, str):
            try:
                text = regex_dfa(pattern, is_searched=True)
            except ValueError as error:
                raise UnsupportedError(f"{where}: pattern {error}") from None
        else:
            raise ValueError(f"{where}: pattern={shown(pattern)} must be a string")
        if low or high is not None:
            try:
                text = limited(text, low, high)
            except ValueError as error:
                raise UnsupportedError(f"{where}: minLength={low}, maxLength={high}: {error}") from None
        return self._quoted(text, start)

    def _quoted(self, text: Automaton, start: int) -> int:
        return self.network.literal(self.network.splice(self.network.literal(start, b'"'), text, in_json), b'"')

    def _array(self, schema: Mapping[str, Any], start: int, where: str) -> int:
        low, high = limits(schema, "minItems", "maxItems", where)
        first = list_of(schema, "prefixItems", where) if "prefixItems" in schema else []
        after, network = self.network.literal(start, b"["), self.network
        end = network.new_state()
        count = max(low, len(first), 1) if high is None else high
        for place in range(count):
            if place >= low:
                network.free[network.literal(after, b"]")].append(end)
            before = after if place == 0 else self._separator(after, b",")
            after = self._item(schema, first, place, before, where)
        if high is None:
            again = self._item(schema, first, count, self._separator(after, b","), where)
            network.free[again].append(after)
        network.free[network.literal(after, b"]")].append(end)
        return end

    def _item(self, schema: Mapping[str, Any], first: list[Any], place: int, start: int, where: str) -> int:
        if place < len(first):
            return self.value(first[place], start, f"{where}/prefixItems/{place}")
        return self.call(f"{where}/items", schema.get("items", True), start)

    def _object(self, schema: Mapping[str, Any], start: int, where: str) -> int:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping):
            raise ValueError(f"{where}: properties={shown(properties)} must be an object")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise ValueError(f"{where}: required={shown(required)} must be a list of strings")
        others = schema.get("additionalProperties", "properties" not in schema)
        unnamed = [name for name in dict.fromkeys(required) if name not in properties]
        if unnamed and schema.get("additionalProperties") is False:
            raise ValueError(f"{where}: required {unnamed[0]!r} is not a property, and additionalProperties is false")
        network, needed = self.network, set(required)
        none, some = network.literal(start, b"{"), network.new_state()  # before the first property; after one
        for name, of_name in {**properties, **dict.fromkeys(unnamed, others or True)}.items():
            begin, after = self._either(none, some), network.new_state()
            escaped = name.replace("~", "~0").replace("/", "~1")  # as in a $ref, so that locations differ
            colon = self._separator(network.literal(begin, literal(name, where)), b":")
            network.free[self.value(of_name, colon, f"{where}/properties/{escaped}")].append(after)
            if name in needed:
                none, some = network.new_state(), after
            else:
                before_none, before_some = none, some
                none, some = network.new_state(), after
                network.free[before_none].append(none)
                network.free[before_some].append(some)
        if others is not False:
            begin = self._either(none, some)
            key = self._quoted(other_texts([*properties, *unnamed]), begin)
            value = self.call(f"{where}/additionalProperties", others, self._separator(key, b":"))
            network.free[value].append(some)
        end = network.new_state()
        network.free[network.literal(none, b"}")].append(end)
        network.free[network.literal(some, b"}")].append(end)
        return end

    def _either(self, none: int, some: int) -> int:
        """The state where a property begins: the first one, or one after a comma."""
        begin = self.network.new_state()
        self.network.free[none].append(begin)
        self.network.free[self._separator(some, b",")].append(begin)
        return begin

    def _separator(self, start: int, sign: bytes) -> int:
        """A comma or a colon, and at most one space."""
        bare = self.network.literal(start, sign)
        end = self.network.literal(bare, b" ")
        self.network.free[bare].append(end)
        return end
