"""A parser for the grammar: ``read(text)`` finds the choices that write a text, or its first line that does not fit.

It decides whether a story that a model sampled is right: whether the grammar could have written each name, thing,
place, sum and answer in it.
"""

import functools
import math
from collections.abc import Mapping
from collections.abc import Sequence as ReadOnlyList
from string import Formatter
from typing import TypeVar

from paged_infer.storyteller.stories.chooser import Chooser
from paged_infer.storyteller.stories.grammar import Story, pieces
from paged_infer.storyteller.stories.world import Person, Question, Thing, World

T = TypeVar("T")


def read(text: str) -> Story:
    """The story with this text; without a title line it may begin with the opening ("Once upon a time, ...").

    Searches depth first: the grammar writes again, with the last choice changed, until every piece matches the text. An
    attempt ends at the first piece that differs, and chooses only words of the lines that the choice can be about.

    Raises:
        ValueError: the grammar cannot write the text; the message has the first line that cannot follow those before.
    """
    path: list[int] | None = []
    rest = text
    while path is not None:
        attempt = _Attempt(text, path)
        world = World(attempt)
        try:
            for number, piece in enumerate(pieces(world)):
                if number > 0 or text.startswith("A "):
                    attempt.accept(piece)
            if not attempt.rest:
                return Story(text, tuple(world.asked), attempt.logprob)
        except _DiffersError:
            pass
        rest = min(rest, attempt.rest, key=len)
        path = attempt.next_path()
    number = text[: len(text) - len(rest)].count("\n") + 1
    raise ValueError(f"line {number} is not one of the grammar's: {rest.partition(chr(10))[0]!r}")


class _DiffersError(Exception):
    """The choices so far write another text."""


class _Attempt(Chooser):
    """Chooses the options numbered by ``path``, then the first ones, among those with words in the next lines."""

    def __init__(self, text: str, path: list[int]) -> None:
        super().__init__(lambda: 0.0)
        self.rest, self.path, self.taken, self.sizes = text, path, list[int](), list[int]()
        self.lines = "".join(text.splitlines(keepends=True)[:3])  # the discovery is drawn before the title

    def pick(self, options: ReadOnlyList[T]) -> T:
        self.logs.append(-math.log(len(options)))
        return self._take([option for option in options if all(word in self.lines for word in _words(option))])

    def weigh(self, options: Mapping[T, float]) -> T:
        chosen = self._take(list(options))
        self.logs.append(math.log(options[chosen] / math.fsum(options.values())))
        return chosen

    def _take(self, options: list[T]) -> T:
        if not options:
            raise _DiffersError
        depth = len(self.taken)
        self.sizes.append(len(options))
        self.taken.append(self.path[depth] if depth < len(self.path) else 0)
        return options[self.taken[-1]]

    def accept(self, piece: str) -> None:
        if not self.rest.startswith(piece):
            raise _DiffersError
        self.rest = self.rest[len(piece) :]
        self.lines = self.rest.partition("\n")[0]

    def next_path(self) -> list[int] | None:
        """The same choices up to the last that has another option, and that option. None if all have been tried."""
        for depth in reversed(range(len(self.taken))):
            if self.taken[depth] + 1 < self.sizes[depth]:
                return [*self.taken[:depth], self.taken[depth] + 1]
        return None


def _words(option: object) -> tuple[str, ...]:
    """Texts that are in every story for which ``option`` is drawn."""
    if isinstance(option, str):
        return _literals(option)
    if isinstance(option, Person):
        return (option.name,)
    if isinstance(option, Thing):
        return (option.noun,)
    return (option.question,) if isinstance(option, Question) else ()


@functools.cache
def _literals(template: str) -> tuple[str, ...]:
    """
    >>> _literals("{a} baked {x} {n}.")
    (' baked ', ' ', '.')
    """
    return tuple(literal for literal, *_ in Formatter().parse(template) if literal)
