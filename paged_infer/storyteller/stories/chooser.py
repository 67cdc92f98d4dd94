"""Random choices that keep count of their probability: every draw adds its log-probability to a running sum."""

import math
import random
from collections.abc import Callable, Mapping
from collections.abc import Sequence as ReadOnlyList
from typing import TypeVar

T = TypeVar("T")


class Chooser:
    """Draws from finite choices, and keeps the probability of all draws together.

    The grammar must have no other source of randomness. As long as different draws always end in
    different texts, `logprob` is therefore exactly the log-probability of the text, in nats.
    """

    def __init__(self, random_: Callable[[], float]) -> None:
        self._random = random_
        self.logs: list[float] = []

    @classmethod
    def from_seed(cls, seed: int) -> "Chooser":
        """A chooser whose draws depend on `seed` alone."""
        return cls(random.Random(seed).random)

    @property
    def logprob(self) -> float:
        """Sum of the log-probabilities of all draws so far, in nats."""
        return math.fsum(self.logs)

    def pick(self, options: ReadOnlyList[T]) -> T:
        """One of `options`, each equally likely."""
        if not options:
            raise ValueError("pick: there is nothing to choose from")
        self.logs.append(-math.log(len(options)))
        return options[min(int(self._random() * len(options)), len(options) - 1)]

    def weigh(self, options: Mapping[T, float]) -> T:
        """One of the keys of `options`, with probability proportional to its value."""
        total = math.fsum(options.values())
        mark = self._random() * total
        chosen = list(options)[-1]  # in case rounding leaves none chosen
        for option, weight in options.items():
            mark -= weight
            if mark < 0.0:
                chosen = option
                break
        self.logs.append(math.log(options[chosen] / total))
        return chosen

    def chance(self, probability: float) -> bool:
        """True with the given probability, which lies strictly between 0 and 1."""
        return self.weigh({True: probability, False: 1.0 - probability})
