"""Random JSON schemas, and walks through a grammar: at each step one of the tokens that it allows."""

from __future__ import annotations

import random
from typing import Any

from paged_infer.control.guided.grammar import Grammar
from paged_infer.control.guided.vocabulary import allowed_ids

PATTERNS = [r"^[a-c]{2,4}$", "x", r"^\d+-\w*$", '[^a-z"]$', "^(foo|bar)+$", r"\S\s?\S", r"^\W.\D$"]
FORMATS = ["date", "time", "date-time", "uuid", "ipv4", "email"]
CHOICES = ["x", 'é"q', 1, 2.5, None, True, [1, "a"], {"k": []}, "\n\x01"]


def random_schema(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    return {**_schema(rng, 0), "$defs": {"a": _schema(rng, 2), "b": _schema(rng, 2)}}


def _schema(rng: random.Random, depth: int) -> dict[str, Any]:
    nested = ["object", "array", "anyOf", "$ref"] * 2 if depth < 3 else []
    kind = rng.choice(["string", "integer", "number", "boolean", "null", "enum", "const", "any", *nested])
    if kind in ("any", "$ref", "enum", "const", "anyOf"):
        return {
            "any": dict,
            "$ref": lambda: {"$ref": rng.choice(["#/$defs/a", "#/$defs/b", "#"])},
            "enum": lambda: {"enum": rng.sample(CHOICES, rng.randint(1, 4))},
            "const": lambda: {"const": rng.choice(CHOICES)},
            "anyOf": lambda: {"anyOf": [_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]},
        }[kind]()
    schema: dict[str, Any] = {"type": kind}
    if kind == "string":
        schema |= _limits_of_a_string(rng)
    elif kind in ("integer", "number") and rng.random() < 0.7:
        low, high = sorted(rng.uniform(-300, 300) for _ in range(2))
        digits = rng.randint(0, 3) if kind == "number" else None
        if rng.random() < 0.7:
            schema[rng.choice(["minimum", "exclusiveMinimum"])] = round(low, digits)
        if rng.random() < 0.7:
            schema[rng.choice(["maximum", "exclusiveMaximum"])] = round(high, digits) + 2
    elif kind == "array":
        parts = {
            "items": lambda: _schema(rng, depth + 1),
            "prefixItems": lambda: [_schema(rng, depth + 1) for _ in range(rng.randint(1, 2))],
            "minItems": lambda: rng.randint(0, 2),
            "maxItems": lambda: rng.randint(2, 4),
        }
        schema |= {name: part() for name, part in parts.items() if rng.random() < 0.5}
    elif kind == "object":
        names = rng.sample(["name", "a", "ab", "é", 'q"x', "n"], rng.randint(0, 4))
        if rng.random() < 0.9:
            schema["properties"] = {name: _schema(rng, depth + 1) for name in names}
        schema["required"] = [name for name in names if rng.random() < 0.5]
        if rng.random() < 0.6 and "properties" in schema:
            schema["additionalProperties"] = rng.choice([False, True, _schema(rng, depth + 1)])
    return schema


def _limits_of_a_string(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(0, 4)
    return rng.choice(
        [
            {},
            {"minLength": low, "maxLength": low + rng.randint(0, 5)},
            {"pattern": rng.choice(PATTERNS)},
            {"format": rng.choice(FORMATS)},
            {"minLength": low, "pattern": rng.choice(["^[a-z]*$", "a", "^.{0,5}b"])},
        ]
    )


def walk(grammar: Grammar, seed: int, eos: int, closing: set[int], most: int = 1500) -> list[int] | None:
    """Random tokens from the beginning to the end of the grammar; None if it has not ended after ``most``.

    ``closing``: tokens that are preferred after the first 40, so that documents end.
    """
    rng, matcher, found = random.Random(seed), grammar.matcher(), list[int]()
    while not matcher.is_finished:
        if len(found) == most:
            return None
        allowed = allowed_ids(matcher.mask())
        preferred = [token_id for token_id in allowed if token_id in closing]
        is_late = preferred and len(found) > 40 and rng.random() < 0.7
        found.append(eos if eos in allowed and len(found) > 3 else rng.choice(preferred if is_late else allowed))
        assert matcher.accept(found[-1])
    return found
