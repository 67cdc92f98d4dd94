"""Sums told as stories: `tell_sum(seed)` writes one, with its answer and the partial sums that lead there.

The stories of the grammar state each new count ("Now Mia had seven"). A sum does not, so answering it means adding up
everything that happened: directly, or with the partial sums written first.

    Mia had three plums. Tom gave her four more. Ben took two home.
    Q: How many plums does Mia have?
    A: She has five.                                                                            direct
    A: Mia had three. Tom: three and four is seven. Ben: seven without two is five. She has five.    worked

Each gain and loss is by another person, so that a step can say which it is about.
"""

import itertools
import zlib
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass
from enum import Enum

from paged_infer.storyteller.stories import lexicon
from paged_infer.storyteller.stories.chooser import Chooser
from paged_infer.storyteller.stories.world import Question, World

MOST = 10  # the vocabulary has the words for one to ten
NUM_STEPS = (3, 4, 5)
MOST_STEPS = 10  # each by another person
HELD_OUT_OF = 5  # one in five series of counts is held out of training
THINK, END_THINK = "<think>", "</think>"  # Qwen3's marks, for models whose tokenizer has them

_GAINS = ("{b} gave {a.him} {y} more.", "{b} found {y} more for {a.him}.", "{b} added {y} more.")
_LOSSES = ("{b} took {y} home.", "{b} lost {y} of them.", "{b} dropped {y} into the river.")


class Form(Enum):
    """How an answer is written."""

    DIRECT = "direct"  # only the answer
    WORKED = "worked"  # the partial sums, then the answer, in one line
    THINKING = "thinking"  # as in a chat with Qwen3: the partial sums between <think> and </think>, then the answer
    NOT_THINKING = "not thinking"  # the same with thinking turned off: the reasoning is empty


@dataclass(frozen=True)
class Sum:
    """A sum of one person's things, its question, and the series of counts: at first, and after each step.

    `people` are the owner, and then the person who does each step.
    """

    story: str
    question: Question
    counts: tuple[int, ...]
    people: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The lines up to the answer, without a leading `<|endoftext|>`."""
        return f"{self.story}\nQ: {self.question.question}\nA:"

    @property
    def steps(self) -> str:
        """The partial sums, one sentence each."""
        words = lexicon.NUMBERS
        sentences = [f"{self.people[0]} had {words[self.counts[0]]}."]
        for who, (before, after) in zip(self.people[1:], itertools.pairwise(self.counts), strict=True):
            sign, by = ("and", after - before) if after > before else ("without", before - after)
            sentences.append(f"{who}: {words[before]} {sign} {words[by]} is {words[after]}.")
        return " ".join(sentences)

    def answer(self, form: Form) -> str:
        """What follows `prompt`, without the end of its line."""
        if form is Form.DIRECT:
            return f" {self.question.answer}"
        if form is Form.WORKED:
            return f" {self.steps} {self.question.answer}"
        thought = self.steps if form is Form.THINKING else ""
        return f"\n{THINK}\n{thought}\n{END_THINK}\n\n{self.question.answer}"


def without_thought(text: str) -> str:
    """What stands behind a thought; nothing if the thought has no end."""
    return "" if THINK in text and END_THINK not in text else text.rpartition(END_THINK)[2]


def tell_sum(seed: int, held_out: bool = False, num_steps: ReadOnlyList[int] = NUM_STEPS) -> Sum:
    """The sum of this seed, with one of `num_steps` gains and losses.

    Training and held-out sums have no series of counts in common: which are held out is decided by a checksum.

    Raises:
        ValueError: `num_steps` is empty, or has a number below 1 or above `MOST_STEPS`.
    """
    if not num_steps or min(num_steps) < 1 or max(num_steps) > MOST_STEPS:
        raise ValueError(f"num_steps={num_steps}: must be one or more numbers, each from 1 to {MOST_STEPS}")
    chooser = Chooser.from_seed(seed)
    counts = _counts(chooser, chooser.pick(num_steps))
    while is_held_out(counts) is not held_out:
        counts = _counts(chooser, len(counts) - 1)
    world = World(chooser)
    owner, *others = (world.new_person() for _ in counts)
    noun = chooser.pick(lexicon.FRUITS + lexicon.GROUND + lexicon.BAKED + lexicon.KEPT)
    words = lexicon.NUMBERS
    sentences = [f"{owner} had {words[counts[0]]} {noun}."]
    for other, (before, after) in zip(others, itertools.pairwise(counts), strict=True):
        templates = _GAINS if after > before else _LOSSES
        sentences.append(world.say(templates, a=owner, b=other, y=words[abs(after - before)]))
    question = Question(f"How many {noun} does {owner} have?", f"{owner.He} has {words[counts[-1]]}.")
    return Sum(" ".join(sentences), question, counts, tuple(person.name for person in world.cast))


def is_held_out(counts: tuple[int, ...]) -> bool:
    """Whether sums with this series of counts are for evaluation only."""
    return zlib.crc32(" ".join(map(str, counts)).encode()) % HELD_OUT_OF == 0


def _counts(chooser: Chooser, num_steps: int) -> tuple[int, ...]:
    """A first count from 2 on, since nouns are plural, and one from 1 on after each step, unlike the one before."""
    counts = [chooser.pick(range(2, MOST + 1))]
    for _ in range(num_steps):
        counts.append(chooser.pick([count for count in range(1, MOST + 1) if count != counts[-1]]))
    return tuple(counts)
