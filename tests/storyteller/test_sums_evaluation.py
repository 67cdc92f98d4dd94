"""Claims about asking for sums: prompts show the form that is meant, and an answer counts by its last sentence."""

from types import SimpleNamespace

import pytest

from paged_infer.storyteller.stories.sums import Form, is_held_out, tell_sum
from paged_infer.storyteller.sums_evaluation import evaluate_sums, sum_prompt

TOLD, EXAMPLE = tell_sum(0, held_out=True), tell_sum(1)


def test_examples_in_a_text_have_the_form_that_is_meant():
    for form in (Form.DIRECT, Form.WORKED):
        shown = f"{EXAMPLE.prompt}{EXAMPLE.answer(form)}\n"
        assert sum_prompt(TOLD, form, [EXAMPLE]) == f"<|endoftext|>{shown}{TOLD.prompt}"


def test_examples_in_a_chat_are_earlier_answers_without_their_thoughts():
    shown = f"{EXAMPLE.prompt} {EXAMPLE.question.answer}\n"
    assert sum_prompt(TOLD, Form.THINKING, [EXAMPLE]) == f"{shown}{TOLD.prompt}\n"
    assert sum_prompt(TOLD, Form.NOT_THINKING, [EXAMPLE]) == f"{shown}{TOLD.prompt}\n<think>\n\n</think>\n\n"


class Oracle:
    """Answers in thoughts; the second has no end, and the third answer is wrong."""

    def generate(self, prompts, params, use_tqdm=True):
        sums = [tell_sum(1_000_000_000 + i, held_out=True) for i in range(len(prompts))]
        texts = [told.answer(Form.THINKING)[1:] for told in sums]
        texts[1], texts[2] = texts[1].replace("</think>", ""), "She has twelve."
        assert all(told.prompt in prompt for told, prompt in zip(sums, prompts, strict=True))
        return [SimpleNamespace(outputs=[SimpleNamespace(text=text)]) for text in texts]


def test_an_answer_counts_by_its_last_sentence_and_never_inside_a_thought():
    score = evaluate_sums(Oracle(), Form.THINKING, num_examples=2, num_sums=10)
    assert score.right == (True, False, False, *[True] * 7) and score.num_in_steps == 9


def test_the_sums_that_are_asked_are_held_out():
    assert all(is_held_out(tell_sum(1_000_000_000 + i, held_out=True).counts) for i in range(50))


@pytest.mark.parametrize(("examples", "sums"), [(0, 0), (-1, 5)])
def test_no_sums_and_fewer_than_no_examples_are_refused(examples, sums):
    with pytest.raises(ValueError, match=f"num_sums={sums}, num_examples={examples}: must be at least 1, and at least"):
        evaluate_sums(Oracle(), Form.DIRECT, examples, sums)
