"""Claims about the storyteller that works in steps: still a storyteller, and steps buy it what the README says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_infer import LLM, SamplingParams, storyteller
from paged_infer.bench.sums import FORMS, NUM_EXAMPLES, NUM_FIRST, measure, table
from paged_infer.evaluation.statistics import proportion
from paged_infer.storyteller import PATH, STEPS_PATH, evaluate
from paged_infer.storyteller.stories.sums import Form, tell_sum
from paged_infer.storyteller.sums_evaluation import sum_prompt

STORED = json.loads((Path(__file__).parents[2] / "figures/storyteller_sums.json").read_text())
GREEDY = SamplingParams(temperature=0, max_tokens=96)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("storyteller-steps", device="cpu")


def stored(form: Form, examples: int, model: str = "storyteller-steps") -> dict[str, Any]:
    asked = (model, form.value, examples)
    [row] = [row for row in STORED["rows"] if (row["model"], row["form"], row["examples"]) == asked]
    return row


def test_the_folder_is_under_eight_megabytes_and_has_two_tokens_more_than_the_first_storyteller() -> None:
    assert sum(file.stat().st_size for file in STEPS_PATH.iterdir()) < 8_000_000
    ours, first = (AutoTokenizer.from_pretrained(path).get_vocab() for path in (STEPS_PATH, PATH))
    assert ours == first | {"<think>": len(first), "</think>": len(first) + 1}


def test_transformers_loads_the_folder() -> None:
    model, report = AutoModelForCausalLM.from_pretrained(STEPS_PATH, output_loading_info=True)
    assert model.config.model_type == "qwen3" and model.config.vocab_size == 1757
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_its_name_is_a_model_s_name(llm: LLM) -> None:
    assert llm.name == "storyteller-steps" and llm.is_storyteller and llm.folder == STEPS_PATH


def test_a_chat_gives_the_prompts_of_the_evaluation_and_an_answer_behind_its_thought(llm: LLM) -> None:
    told = tell_sum(2, held_out=True)
    messages = [{"role": "user", "content": f"{told.story} {told.question.question}"}]
    assert llm.tokenizer is not None
    assert llm.tokenizer.decode(llm.chat_prompt(messages)) == sum_prompt(told, Form.THINKING, [])
    output = llm.chat(messages, GREEDY)
    [output] = output if isinstance(output, list) else [output]
    assert "\n" + output.outputs[0].text == told.answer(Form.THINKING)
    assert output.outputs[0].finish_reason == "stop"


def test_the_engine_knows_where_its_thought_ends() -> None:
    llm = LLM("storyteller-steps", device="cpu", num_blocks=64, reasoning_parser="qwen3")
    told = tell_sum(2, held_out=True)
    prompts = [sum_prompt(told, form, []) for form in (Form.THINKING, Form.NOT_THINKING)]
    on, off = (output.outputs[0] for output in llm.generate(prompts, GREEDY, use_tqdm=False))
    assert llm.tokenizer is not None
    assert on.num_reasoning_tokens == len(llm.tokenizer.encode(f"<think>\n{told.steps}\n</think>"))
    assert off.num_reasoning_tokens == 0


def template(messages: list[dict[str, str]], **options: Any) -> str:
    tokenizer = AutoTokenizer.from_pretrained(STEPS_PATH)
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_thinking_is_turned_off_as_for_qwen3(llm: LLM) -> None:
    told = tell_sum(2, held_out=True)
    messages = [{"role": "user", "content": f"{told.story} {told.question.question}"}]
    for thinking, form, end in (
        (True, Form.THINKING, "A:\n"),
        (False, Form.NOT_THINKING, "A:\n<think>\n\n</think>\n\n"),
    ):
        ids = llm.chat_prompt(messages, chat_template_kwargs={"enable_thinking": thinking})
        assert llm.tokenizer is not None and llm.tokenizer.decode(ids) == sum_prompt(told, form, [])
        assert sum_prompt(told, form, []).endswith(end)


def test_thoughts_before_the_last_request_are_left_out() -> None:
    asked = {"role": "user", "content": "Mia had two plums. Then she lost one. How many plums does Mia have?"}
    thought = "Mia had two. Then two without one is one."
    in_content = {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\nShe has one."}
    apart = {"role": "assistant", "content": "She has one.", "reasoning_content": thought}
    for answer in (in_content, apart):
        assert template([asked, answer]).endswith(f"A:\n<think>\n{thought}\n</think>\n\nShe has one.\n")
        again = template([asked, answer, asked], add_generation_prompt=True)
        assert "A: She has one.\n" in again and "think" not in again


def test_its_held_out_sums_come_out_right_in_steps_and_not_without(llm: LLM) -> None:
    sums = [tell_sum(seed, held_out=True) for seed in range(24)]
    right = dict.fromkeys(Form, 0)
    for form in (Form.THINKING, Form.NOT_THINKING):
        outputs = llm.generate([sum_prompt(told, form, []) for told in sums], GREEDY, use_tqdm=False)
        for told, output in zip(sums, outputs, strict=True):
            right[form] += output.outputs[0].text.endswith(told.question.answer)
    assert right[Form.THINKING] >= 17 and right[Form.NOT_THINKING] <= 12


@pytest.mark.parametrize(("form", "examples"), [(Form.THINKING, 0), (Form.NOT_THINKING, 0), (Form.WORKED, 1)])
def test_the_stored_numbers_are_measured_again(form: Form, examples: int, llm: LLM) -> None:
    again, before = measure(llm, form, examples, NUM_FIRST), stored(form, examples)
    # Another machine may round another way, and a close decision then falls otherwise.
    assert again["first_right"] == pytest.approx(before["first_right"], abs=1)


def test_the_readme_has_the_stored_numbers() -> None:
    lines = (Path(storyteller.__file__).parent / "README.md").read_text("utf-8").splitlines()
    assert [line for line in table(STORED["rows"]) if line not in lines] == []


def test_every_row_is_stored_and_its_interval_holds_its_share() -> None:
    assert len(STORED["rows"]) == len(NUM_EXAMPLES) * sum(map(len, FORMS.values())) and STORED["num_sums"] >= 500
    for row in STORED["rows"]:
        low, high = row["interval"]
        num_sums, right = STORED["num_sums"], round(row["accuracy"] * STORED["num_sums"])
        assert row["interval"] == pytest.approx(proportion([i < right for i in range(num_sums)])[1:], abs=1e-4)
        assert low <= row["accuracy"] <= high and high - low < 0.1


def test_steps_buy_much_and_examples_say_which_form_is_meant() -> None:
    assert stored(Form.THINKING, 0)["interval"][0] > stored(Form.NOT_THINKING, 0)["interval"][1] + 0.2
    assert stored(Form.WORKED, 1)["interval"][0] > stored(Form.DIRECT, 1)["interval"][1] + 0.2
    for examples in (1, 4):
        assert stored(Form.WORKED, examples)["in_steps"] > 0.97 and stored(Form.DIRECT, examples)["in_steps"] < 0.03
    for form in FORMS["storyteller"]:
        assert all(stored(form, examples, "storyteller")["accuracy"] < 0.3 for examples in NUM_EXAMPLES)


def test_it_is_still_a_storyteller(llm: LLM) -> None:
    result = evaluate(llm, num_stories=20)
    assert result["recall"] >= 0.95
    assert result["perplexity"] <= 1.06 * result["grammar_perplexity"]
