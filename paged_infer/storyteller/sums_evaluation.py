"""How many held-out sums a model answers correctly: directly or in steps, with and without examples before them."""

from dataclasses import dataclass
from typing import Any

from paged_infer.storyteller.stories.grammar import END, FIRST_EVALUATION_SEED
from paged_infer.storyteller.stories.sums import Form, Sum, tell_sum, without_thought

IN_CHAT = (Form.THINKING, Form.NOT_THINKING)


@dataclass(frozen=True)
class SumScore:
    """Whether each answer is right, and how many answers have the partial sums first."""

    right: tuple[bool, ...]
    num_in_steps: int


def sum_prompt(told: Sum, form: Form, examples: list[Sum]) -> str:
    """The text that asks for an answer in `form`.

    In a text, only the examples show which form is meant: without any, the model chooses. In a chat, the line below
    "A:" asks for reasoning or gives an empty one; the examples are earlier questions, whose reasoning is left out.
    """
    shown = Form.DIRECT if form in IN_CHAT else form
    before = "".join(f"{example.prompt}{example.answer(shown)}\n" for example in examples)
    if form is Form.THINKING:
        return f"{before}{told.prompt}\n"
    if form is Form.NOT_THINKING:
        return before + told.prompt + told.answer(form).removesuffix(told.question.answer)
    return END + before + told.prompt


def evaluate_sums(llm: Any, form: Form, num_examples: int = 0, num_sums: int = 500) -> SumScore:
    """Ask `llm` for `num_sums` held-out sums in `form`, each after `num_examples` other sums of the training kind.

    `llm` is a `paged_infer.LLM`, or anything whose `generate` does the same. Answers are greedy; one is right if it
    ends with the correct sentence, whatever its form.

    Raises:
        ValueError: `num_sums` is below 1, or `num_examples` below 0.
    """
    from paged_infer.params import SamplingParams

    if num_sums < 1 or num_examples < 0:
        raise ValueError(f"num_sums={num_sums}, num_examples={num_examples}: must be at least 1, and at least 0")
    seeds = range(FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + num_sums)
    asked = [tell_sum(seed, held_out=True) for seed in seeds]
    examples = [[tell_sum(seed * 100 + i) for i in range(num_examples)] for seed in seeds]
    prompts = [sum_prompt(told, form, before) for told, before in zip(asked, examples, strict=True)]
    greedy = SamplingParams(temperature=0, max_tokens=96, stop=[] if form in IN_CHAT else ["\n"])
    texts = [output.outputs[0].text for output in llm.generate(prompts, greedy, use_tqdm=False)]
    right = tuple(
        without_thought(text).strip().endswith(told.question.answer) for text, told in zip(texts, asked, strict=True)
    )
    return SumScore(right, sum(" is " in text for text in texts))
