"""Questions and texts from the storyteller's grammar: the same seed gives the same items in every process.

Each item of a task comes from a story of its own, so that the items are independent of each other, as intervals and
tests require (``statistics``). None of these stories was in the training data.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from paged_infer.storyteller.evaluation import kind_of, quizzes
from paged_infer.storyteller.stories import lexicon
from paged_infer.storyteller.stories.grammar import END, FIRST_EVALUATION_SEED, KINDS, Story, tell
from paged_infer.storyteller.stories.sums import Form, tell_sum
from paged_infer.storyteller.stories.themes import THEMES
from paged_infer.storyteller.stories.world import Person

SEEDS = 1_000_000  # seeds of stories for each seed of a task
NUM_CHOICES = 4
_FRIEND = re.compile(r"(?:best friend was|Next door lived) (\w+),")


@dataclass(frozen=True, slots=True)
class Item:
    """One question, or one text.

    Attributes:
        passage: the text before the question, with its newline; or the whole text, if it is only read.
        question: empty if the passage is to be continued.
        answer: the correct one, without the space between it and ``A:``.
        kind: the kind of question.
        choices: answers of which one is correct; empty if none are offered.
    """

    passage: str
    question: str = ""
    answer: str = ""
    kind: str = ""
    choices: tuple[str, ...] = ()

    @property
    def lead(self) -> str:
        """The text between the prompt and an answer."""
        return " " if self.question else ""

    @property
    def prompt(self) -> str:
        """The text up to the answer."""
        return f"{self.passage}Q: {self.question}\nA:" if self.question else self.passage

    @property
    def label(self) -> int:
        """The index of the correct choice."""
        return self.choices.index(self.answer)


def recall_items(count: int, seed: int) -> list[Item]:
    """A question about each of ``count`` stories, after the questions and answers that come before it there.

    It is the story's first question of the kind that was asked least so far. So rare kinds are asked as often as
    possible, and the share of correct answers is not that of ``storyteller.evaluate``, which asks all questions.
    """
    found, asked = list[Item](), Counter[str]()
    for story in stories(count, seed):
        items = [_quiz(prompt, answer) for prompt, answer in quizzes(story)]
        found.append(min(items, key=lambda item: asked[item.kind]))
        asked[found[-1].kind] += 1
    return found


def choice_items(count: int, seed: int) -> list[Item]:
    """``recall_items`` with four choices of the same form. Wrong choices that the story mentions are preferred."""
    rng = random.Random(seed)
    return [replace(item, choices=_choices(item, rng)) for item in recall_items(count, seed)]


def ending_items(count: int, seed: int) -> list[Item]:
    """Stories without their last line, and four last lines: the story's own, and those of three other themes.

    As in HellaSwag (Zellers 2019), all mention the same people, and their lengths differ.
    """
    rng, found = random.Random(seed), list[Item]()
    for story in stories(None, seed):
        if len(found) == count:
            break
        if item := _ending(story, rng):
            found.append(item)
    return found


def sum_items(count: int, seed: int, form: Form = Form.DIRECT) -> list[Item]:
    """Held-out sums. As examples, their answers have the given form."""
    found = []
    for number in range(count):
        told = tell_sum(FIRST_EVALUATION_SEED + seed * SEEDS + number, held_out=True)
        kind = f"{len(told.counts) - 1} steps"
        found.append(Item(f"{told.story}\n", told.question.question, told.answer(form).removeprefix(" "), kind))
    return found


def documents(count: int, seed: int) -> list[Item]:
    """Stories to read, with the ``<|endoftext|>`` that ends them."""
    return [Item(story.text + END) for story in stories(count, seed)]


def stories(count: int | None, seed: int) -> Iterator[Story]:
    """``count`` stories that are not in the training data; None: all. Seed 0: those of ``storyteller.evaluate``."""
    for number in range(SEEDS if count is None else count):
        yield tell(FIRST_EVALUATION_SEED + seed * SEEDS + number)


def _quiz(prompt: str, answer: str) -> Item:
    passage, _, question = prompt.removeprefix(END).removesuffix("\nA:").rpartition("Q: ")
    return Item(passage, question, answer, kind_of(question))


def _choices(item: Item, rng: random.Random) -> tuple[str, ...]:
    words, form = _alternatives(item)
    wrong = [word for word in words if form(word) != item.answer]
    rng.shuffle(wrong)
    wrong.sort(key=lambda word: word not in item.passage)  # words that are mentioned (False) come first
    found = [item.answer, *map(form, wrong[: NUM_CHOICES - 1])]
    rng.shuffle(found)
    return tuple(found)


def _alternatives(item: Item) -> tuple[tuple[str, ...], Callable[[str], str]]:
    """The words of which an answer of this kind has one, and a function that writes the answer with one of them."""
    match item.kind:
        case "What colour":
            return lexicon.COLOURS, "It is {}.".format
        case "Where did":
            return lexicon.FINDING_PLACES, lambda place: place[0].upper() + place[1:] + "."
        case "Where is":
            return lexicon.CONTAINERS + lexicon.SPOTS, lambda place: place[0].upper() + place[1:] + "."
        case "Who has":
            return lexicon.GIRLS + lexicon.BOYS, "{}.".format
        case "How many":
            return lexicon.NUMBERS[1:11], f"{item.answer.split()[0]} has {{}}.".format
    raise AssertionError(item.kind)


def _ending(story: Story, rng: random.Random) -> Item | None:
    """None for a short story, which has no theme."""
    first_question = story.text.index("Q: ")
    *lines, last = story.text[:first_question].splitlines()
    friend = _FRIEND.search(lines[1])
    if friend is None:
        return None
    hero = re.search(rf"A (?:{'|'.join(KINDS)}) about (\w+) and", lines[0])
    assert hero is not None
    a, b = (Person(name[1], name[1] in lexicon.GIRLS, "") for name in (hero, friend))
    themes = [[ending.format(a=a, b=b) for ending in endings] for _, endings in THEMES]
    (own,) = (theme for theme in themes if any(map(last.startswith, theme)))
    answer = next(ending for ending in own if last.startswith(ending))
    others = rng.sample([theme for theme in themes if theme is not own], NUM_CHOICES - 1)
    found = [answer, *(rng.choice(theme) for theme in others)]
    rng.shuffle(found)
    return Item("\n".join(lines) + "\n", answer=answer, kind="ending", choices=tuple(found))
