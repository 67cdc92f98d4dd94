"""Claims about the sums: a seed fixes them, steps and answers are true, and held-out ones are never trained on."""

import re
import subprocess
import sys

import pytest
from tokenizers import Tokenizer

from paged_infer.storyteller import PATH
from paged_infer.storyteller.stories import lexicon
from paged_infer.storyteller.stories.sums import MOST, Form, is_held_out, tell_sum

SEEDS = range(400)
VALUES = {word: value for value, word in enumerate(lexicon.NUMBERS)}
NUMBER = "|".join(lexicon.NUMBERS)


def test_a_seed_tells_the_same_sum_in_every_process():
    command = "from paged_infer.storyteller.stories.sums import tell_sum; print(repr(tell_sum(7, held_out=True)))"
    out = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == repr(tell_sum(7, held_out=True))
    assert len({tell_sum(seed).story for seed in SEEDS}) == len(SEEDS)


def test_what_happens_in_the_story_adds_up_to_the_answer():
    for seed in SEEDS:
        told = tell_sum(seed)
        first, *changes = told.story.rstrip(".").split(". ")
        count = VALUES[re.search(rf" ({NUMBER}) ", first)[1]]
        for change in changes:
            by = VALUES[re.search(rf" ({NUMBER}) ", change)[1]]
            count += by if " more" in change else -by
            assert 1 <= count <= MOST
        assert told.question.answer.endswith(f" has {lexicon.NUMBERS[count]}.") and count == told.counts[-1]


def test_each_step_is_true_and_the_last_one_is_the_answer():
    for seed in SEEDS:
        told = tell_sum(seed)
        steps = re.findall(rf"(\w+): ({NUMBER}) (and|without) ({NUMBER}) is ({NUMBER})\.", told.steps)
        assert len(steps) == len(told.counts) - 1
        assert tuple(who for who, *_ in steps) == told.people[1:] and len(set(told.people)) == len(told.people)
        for _, before, sign, by, after in steps:
            assert VALUES[before] + (1 if sign == "and" else -1) * VALUES[by] == VALUES[after]
        assert told.answer(Form.WORKED) == f" {told.steps} {told.question.answer}"
        assert told.question.answer.endswith(f" {after}.")


def test_the_counts_between_are_in_the_steps_and_not_in_the_story():
    told = tell_sum(0, num_steps=(5,))
    assert len(told.counts) == 6 and "Now" not in told.story
    assert told.prompt == f"{told.story}\nQ: {told.question.question}\nA:"


def test_a_thought_is_written_as_qwen3_writes_it():
    told = tell_sum(3)
    assert told.answer(Form.THINKING) == f"\n<think>\n{told.steps}\n</think>\n\n{told.question.answer}"
    assert told.answer(Form.NOT_THINKING) == f"\n<think>\n\n</think>\n\n{told.question.answer}"
    assert told.answer(Form.DIRECT) == f" {told.question.answer}"


def test_training_and_held_out_sums_have_no_series_in_common():
    trained = {tell_sum(seed).counts for seed in range(2000)}
    held_out = {tell_sum(seed, held_out=True).counts for seed in range(1000)}
    assert not trained & held_out
    assert all(map(is_held_out, held_out)) and len(held_out) > 700
    assert {len(counts) - 1 for counts in held_out} == {3, 4, 5}
    every = [is_held_out((a, b, c)) for a in range(1, 11) for b in range(1, 11) for c in range(1, 11)]
    assert 0.17 < sum(every) / len(every) < 0.23


def test_every_answer_is_about_as_frequent():
    counts = [tell_sum(seed, held_out=True).counts[-1] for seed in range(2000)]
    assert all(140 < counts.count(value) < 260 for value in range(1, MOST + 1))


def test_sums_are_written_in_the_storyteller_s_words():
    tokenizer = Tokenizer.from_file(str(PATH / "tokenizer.json"))
    for seed in range(50):
        told = tell_sum(seed)
        for text in (f" {told.story}", told.answer(Form.WORKED)):
            assert tokenizer.encode(text).tokens == [word.replace(" ", "Ġ") for word in re.findall(r" \w+|[.:]", text)]


@pytest.mark.parametrize("num_steps", [(), (0, 3), (11,)])
def test_a_sum_with_no_steps_or_too_many_is_refused(num_steps):
    with pytest.raises(ValueError, match=r"num_steps=\(.*\): must be one or more numbers, each from 1 to 10"):
        tell_sum(0, num_steps=num_steps)
