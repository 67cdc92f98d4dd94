"""The grammar read backwards: it finds the draws of every story, and the line at which a text goes wrong."""

import re

import pytest

from paged_infer.storyteller import tell
from paged_infer.storyteller.stories.grammar import FIRST_EVALUATION_SEED
from paged_infer.storyteller.stories.reader import read

SEEDS = range(FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + 60)


def told(*patterns: str):
    """A story whose text has all of these patterns."""
    return next(s for s in map(tell, SEEDS) if all(re.search(pattern, s.text) for pattern in patterns))


def test_every_story_is_read_as_the_draws_that_told_it():
    for seed in SEEDS:
        story = tell(seed)
        assert read(story.text).questions == story.questions
        assert read(story.text).logprob == pytest.approx(story.logprob)


def test_a_story_without_its_title_is_read_too():
    story = tell(FIRST_EVALUATION_SEED)
    assert read(story.text.split("\n", 1)[1]).questions == story.questions


@pytest.mark.parametrize(
    ("pattern", "wrong"),
    [
        (r"Now (\w+) had (\w+)", r"Now \1 had twelve"),  # a wrong sum
        (r"A: It is (\w+)", "A: It is transparent"),  # a wrong answer
        (r"gave the (\w+) to (\w+)", r"gave the \1 to Nobody"),  # somebody who is not in the story
        (r"One morning, when ", "One evening, when "),  # a word
        (r"\nA: [^\n]*\n$", "\n"),  # its end
    ],
)
def test_a_change_is_noticed_in_the_line_where_it_stands(pattern, wrong):
    text = told(pattern).text
    found = re.search(pattern, text)
    changed = text[: found.start()] + re.sub(pattern, wrong, found[0]) + text[found.end() :]
    number = text[: found.start() + (found[0][0] == "\n")].count("\n") + 1
    with pytest.raises(ValueError, match=r"line \d+ is not one of the grammar's") as raised:
        read(changed)
    said = int(re.search(r"line (\d+)", str(raised.value))[1])
    assert said == number or (found[0][:2] in ("A:", "\nA") and said == number - 1)  # a question is two lines


@pytest.mark.parametrize(
    "text", ["", "Once", "A story about Mia and a red key.\n", "A tale about Mia and a red key.\n"]
)
def test_what_is_no_story_is_refused(text):
    with pytest.raises(ValueError, match="is not one of the grammar's"):
        read(text)
