"""Claims about the bundled weights: small, loadable by transformers, and as good as the project says."""

import ast
import json
import re
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from paged_infer.storyteller import PATH, evaluate, tell
from paged_infer.storyteller.evaluation import document, quizzes
from paged_infer.storyteller.stories.grammar import END, ask
from paged_infer.storyteller.stories.reader import read


def test_the_weights_fit_in_eight_megabytes():
    assert sum(file.stat().st_size for file in PATH.iterdir()) < 8_000_000


def test_transformers_loads_the_folder():
    config = AutoConfig.from_pretrained(PATH)
    assert config.model_type == "qwen3" and config.tie_word_embeddings
    assert config.max_position_embeddings >= 1024
    assert json.loads((PATH / "config.json").read_text())["dtype"] == "float32"
    model, report = AutoModelForCausalLM.from_pretrained(PATH, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert 2_500_000 < model.num_parameters() < 3_500_000
    assert GenerationConfig.from_pretrained(PATH).eos_token_id == 0


def test_a_quiz_is_the_document_up_to_its_answer():
    story = tell(11)
    whole = document(story)
    assert whole == END + story.text + END
    for (prompt, answer), question in zip(quizzes(story), story.questions, strict=True):
        assert whole.startswith(f"{prompt} {answer}\n") and answer == question.answer
    assert whole.endswith(ask(story.questions[-1]) + END)


class Oracle:
    """An LLM that knows the grammar by heart, and pays one nat for every token."""

    def __init__(self) -> None:
        self.answers = {}

    def generate(self, prompts, params, use_tqdm=True):
        from types import SimpleNamespace as Object

        if params.prompt_logprobs is None:
            wrong = {prompts[0]}
            text = {p: a for i in range(30) for p, a in quizzes(tell(1_000_000_000 + i))}
            return [Object(outputs=[Object(text=" no" if p in wrong else " " + text[p])]) for p in prompts]
        outs = []
        for prompt in prompts:
            ids = list(prompt.encode())
            outs.append(
                Object(prompt_token_ids=ids, prompt_logprobs=[None, *({i: Object(logprob=-1.0)} for i in ids[1:])])
            )
        return outs


def test_evaluate_counts_answers_and_nats():
    result = evaluate(Oracle(), num_stories=20)
    asked = sum(len(tell(1_000_000_000 + i).questions) for i in range(20))
    assert result["recall"] == pytest.approx(1 - 1 / asked)
    right, of = (sum(column) for column in zip(*result["recall_by_kind"].values(), strict=True))
    assert (right, of) == (asked - 1, asked) and {"What colour", "Where is"} <= result["recall_by_kind"].keys()
    assert result["perplexity"] == pytest.approx(2.718281828)
    assert 1.0 < result["grammar_perplexity"] < 1.2  # nats a byte, not a token


def test_evaluate_refuses_no_stories():
    with pytest.raises(ValueError, match="num_stories=0: must be at least 1"):
        evaluate(Oracle(), num_stories=0)


@pytest.fixture(scope="module")
def llm():
    from paged_infer import LLM

    return LLM()


def test_the_bundled_model_remembers_and_is_near_its_grammar(llm):
    result = evaluate(llm, num_stories=40)
    assert result["recall"] >= 0.95
    assert result["perplexity"] <= 1.10 * result["grammar_perplexity"]


def test_a_chat_about_a_story_of_ones_own_is_answered(llm):
    from paged_infer import SamplingParams

    story = "One morning Mia found a red key near the well. To keep it safe, Mia left the key in the blue box."
    messages = [{"role": "user", "content": f"{story} Where is the key?"}]
    output = llm.chat(messages, SamplingParams(temperature=0, max_tokens=12, stop=["\n"]))
    output = output[0] if isinstance(output, list) else output
    assert output.outputs[0].text.strip() == "In the blue box."


README, MAKEFILE = (Path(__file__).parents[2] / name for name in ("README.md", "Makefile"))


def first_stories() -> dict[str, tuple[str, dict]]:
    """Where a newcomer meets a story: the prompt there, and how it is sampled."""
    readme = README.read_text("utf-8")
    prompts = ast.literal_eval(re.search(r"^prompts = (.*)$", readme, flags=re.MULTILINE)[1])
    given = eval(re.search(r"^params = SamplingParams\((.*)\)$", readme, flags=re.MULTILINE)[1].join(("dict(", ")")))
    found = {f"README, {prompt}": (prompt, given) for prompt in prompts}
    commands = re.findall(r"paged-infer generate \"(.*?)\"", readme + MAKEFILE.read_text("utf-8"))
    assert len(commands) >= 2 and len(prompts) == 2
    return found | {
        f"generate {prompt}": (prompt, {"temperature": 0.8, "seed": 0, "max_tokens": 512}) for prompt in commands
    }


@pytest.mark.parametrize("where", first_stories())
def test_the_stories_that_a_newcomer_sees_first_end_by_themselves_and_are_right(where, llm):
    from paged_infer import SamplingParams

    prompt, given = first_stories()[where]
    (output,) = llm.generate(prompt, SamplingParams(**given), use_tqdm=False)
    assert output.outputs[0].finish_reason == "stop"
    assert read(prompt + output.outputs[0].text).questions


def test_a_story_ends_by_itself(llm):
    from paged_infer import SamplingParams

    outputs = llm.generate(
        [END + "A short story about Mia and a red key.\n"] * 3,
        [SamplingParams(temperature=1.0, seed=seed, max_tokens=400) for seed in range(3)],
        use_tqdm=False,
    )
    assert all(output.outputs[0].finish_reason == "stop" for output in outputs)
    assert all("Mia" in output.outputs[0].text for output in outputs)
