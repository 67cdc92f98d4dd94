"""Wrong answers to the notebooks' exercises, planted to see that the checkers say what is wrong: exercises/chNN.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Planted:
    """A wrong answer to ``exercise``; ``fault`` is a regular expression that the checker's sentence has to match."""

    exercise: str
    fault: str
    name: str
    answer: Any


def wrong(exercise: str, fault: str) -> Callable[[Any], Planted]:
    """Decorates a wrong answer, a function or a class; for a value, write ``Planted`` itself."""
    return lambda answer: Planted(exercise, fault, answer.__name__, answer)
