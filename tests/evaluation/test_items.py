"""What is asked: the same for a seed in every process, true, independent, and unseen."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from paged_infer.evaluation.items import Item, choice_items, documents, ending_items, recall_items, sum_items
from paged_infer.evaluation.tasks import SHOT_SEEDS, TASKS, chat_messages, completion, examples, last_number, read_tasks
from paged_infer.storyteller.evaluation import document, quizzes
from paged_infer.storyteller.stories.grammar import FIRST_EVALUATION_SEED, tell
from paged_infer.storyteller.stories.sums import Form, is_held_out, tell_sum


def test_a_seed_makes_the_same_items_in_every_process() -> None:
    command = "from paged_infer.evaluation.tasks import TASKS; print([task.make(12, 3) for task in TASKS.values()])"
    out = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == repr([task.make(12, 3) for task in TASKS.values()])
    for task in TASKS.values():
        assert task.make(12, 3) == task.make(20, 3)[:12]  # a limit cuts, and changes nothing else
        assert task.make(12, 3) != task.make(12, 4)


def test_each_question_is_one_of_its_own_story_with_the_true_answer() -> None:
    for number, item in enumerate(recall_items(30, 0)):
        assert (completion(TASKS["recall"], item, []), item.answer) in quizzes(tell(FIRST_EVALUATION_SEED + number))
    kinds = Counter(item.kind for item in recall_items(200, 0))
    natural = Counter(" ".join(q.question.split()[:2]) for i in range(200) for q in tell(10**9 + i).questions)
    assert kinds["Who has"] / 200 > natural["Who has"] / natural.total()  # the rare ones are asked more often


def test_choices_have_the_form_of_the_answer_and_one_is_true() -> None:
    items = choice_items(100, 0)
    assert [(item.prompt, item.answer) for item in items] == [(i.prompt, i.answer) for i in recall_items(100, 0)]
    for item in items:
        assert len(set(item.choices)) == 4 and item.choices[item.label] == item.answer
        assert len({choice.split()[-1][-1] for choice in item.choices}) == 1
    assert {item.label for item in items} == {0, 1, 2, 3}
    number = next(item for item in items if item.kind == "How many")
    assert {choice.split()[0] for choice in number.choices} == {number.answer.split()[0]}  # He, or She


def test_wrong_choices_that_the_story_mentions_are_preferred() -> None:
    item = next(item for item in choice_items(200, 0) if item.kind == "Who has")
    names = [choice.removesuffix(".") for choice in item.choices]
    cast = [name for name in names if name in item.passage]
    assert len(cast) >= 2 and item.answer.removesuffix(".") in cast


def test_an_ending_is_the_one_of_its_story_and_all_are_about_its_people() -> None:
    for item in ending_items(40, 0):
        (story,) = [one for i in range(100) if (one := tell(10**9 + i)).text.startswith(item.passage + item.answer)]
        assert item.prompt == item.passage and not item.question
        hero = story.text.split(" about ")[1].split()[0]
        assert len(set(item.choices)) == 4 and all("{" not in choice for choice in item.choices)
        assert any(hero in choice for choice in item.choices)


def test_sums_are_held_out_and_their_examples_have_the_form_that_is_asked() -> None:
    plain, worked = (sum_items(20, 0, form) for form in (Form.DIRECT, Form.WORKED))
    for number, (one, other) in enumerate(zip(plain, worked, strict=True)):
        told = tell_sum(FIRST_EVALUATION_SEED + number, held_out=True)
        assert is_held_out(told.counts) and one.prompt == other.prompt == told.prompt
        assert f" {one.answer}" == told.answer(Form.DIRECT) and f" {other.answer}" == told.answer(Form.WORKED)
        assert last_number(one.answer) == last_number(other.answer) == told.counts[-1]


def test_documents_are_those_that_the_storyteller_is_evaluated_on() -> None:
    assert [f"<|endoftext|>{item.passage}" for item in documents(5, 0)] == [document(tell(10**9 + i)) for i in range(5)]


def test_examples_are_never_among_the_items_and_come_before_each_question() -> None:
    task = TASKS["recall"]
    shots, items = examples(task, 2, 0), task.make(50, 0)
    assert shots == task.make(2, SHOT_SEEDS) and not {s.passage for s in shots} & {i.passage for i in items}
    text = completion(task, items[0], shots)
    assert text.count("<|endoftext|>") == 3 and text.endswith("\nA:")
    assert f"A: {shots[0].answer}\n<|endoftext|>{shots[1].passage}" in text
    assert completion(task, items[0], shots, "").startswith(shots[0].passage)
    assert f"A: {shots[0].answer}\n\n{shots[1].passage}" in completion(task, items[0], shots, "")
    assert examples(TASKS["perplexity"], 2, 0) == []


def test_examples_of_sums_are_in_one_document_as_the_storyteller_of_sums_learned_them() -> None:
    task = TASKS["sums_worked"]
    (shot,), (item,) = examples(task, 1, 0), task.make(1, 0)
    assert completion(task, item, [shot]) == f"<|endoftext|>{shot.prompt} {shot.answer}\n{item.prompt}"


def test_a_chat_has_passages_and_questions_from_the_user_and_answers_from_the_assistant() -> None:
    shot, item = recall_items(2, 0)
    messages = chat_messages(item, [shot])
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == shot.answer and messages[2]["content"] == item.passage + item.question
    with pytest.raises(ValueError, match="has no question to ask in a chat"):
        chat_messages(Item("a text"), [])


@pytest.mark.parametrize(
    ("text", "number"),
    [(" She has seven.", 7), ("Then two and 3 is five. He has 12", 12), ("Someone went.", None), ("TEN apples", 10)],
)
def test_the_last_number_is_read_in_letters_or_digits(text: str, number: int | None) -> None:
    assert last_number(text) == number


def test_an_answer_without_a_number_is_never_right() -> None:
    task = TASKS["sums"]
    assert task.is_right(" Mia had two. She has five.", "She has five.")
    assert task.is_right("\n<think>\nMia had two.\n</think>\n\nShe has five.", "She has five.")
    assert not task.is_right("\n<think>\nMia had five.", "She has five.")
    assert not task.is_right("<think> She has five. </think> That is hard.", "She has five.")
    assert not task.is_right(" none", "She has five.") and not task.is_right(" none", "none")


def test_tasks_are_read_in_order_and_unknown_ones_are_named() -> None:
    assert [task.name for task in read_tasks("sums, recall,sums")] == ["sums", "recall"]
    with pytest.raises(ValueError, match=r"tasks=mmlu, arc: must be some of recall, choice, .*perplexity"):
        read_tasks("recall,mmlu,arc")
    with pytest.raises(ValueError, match="tasks=' , ': names no task"):
        read_tasks(" , ")
