"""How many held-out sums a model answers correctly: directly or in steps, with and without examples before them."""

import math
from dataclasses import dataclass
from typing import Any

from paged_infer.storyteller.stories.grammar import END, FIRST_EVALUATION_SEED
from paged_infer.storyteller.stories.sums import END_THINK, THINK, Form, Sum, tell_sum

Z_95 = 1.96  # a normal variable is within this many standard deviations of its mean with probability 0.95
IN_CHAT = (Form.THINKING, Form.NOT_THINKING)


@dataclass(frozen=True)
class SumScore:
    """Whether each answer is right, and how many answers have the partial sums first."""

    right: tuple[bool, ...]
    num_in_steps: int

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return sum(self.right) / len(self.right)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy on all sums (Wilson 1927), which stays within 0 and 1."""
        share, weight = self.accuracy, Z_95**2 / len(self.right)
        middle = (share + weight / 2) / (1 + weight)
        spread = math.sqrt(weight * share * (1 - share) + weight**2 / 4) / (1 + weight)
        return middle - spread, middle + spread


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
    right = tuple(_final(text).endswith(told.question.answer) for text, told in zip(texts, asked, strict=True))
    return SumScore(right, sum(" is " in text for text in texts))


def _final(text: str) -> str:
    """The text after the reasoning; empty if the reasoning has no end."""
    return "" if THINK in text and END_THINK not in text else text.split(END_THINK)[-1].strip()
