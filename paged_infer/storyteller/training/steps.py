"""Train the storyteller that works in steps: `python -m paged_infer.storyteller.training.steps`.

It starts from the storyteller, with two more tokens, `<think>` and `</think>`, and learns to write sums in each `Form`:
in a text, where all sums of one document are answered directly, or all with the partial sums, so that earlier sums show
which; and in a chat, where reasoning comes first. The other rows are stories, so that it remains a storyteller: in a
text as before, and in a chat, where their questions need no reasoning.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import Qwen3ForCausalLM

from paged_infer.storyteller import PATH, STEPS_PATH
from paged_infer.storyteller.stories.grammar import END, FIRST_EVALUATION_SEED, ask, tell
from paged_infer.storyteller.stories.sums import END_THINK, THINK, Form, Sum, tell_sum
from paged_infer.storyteller.training.batches import Mix, Rows
from paged_infer.storyteller.training.export import export
from paged_infer.storyteller.training.train import BatchTokens, Out, Precision, Products, Seed, Steps, Threads, fit
from paged_infer.terminal import run_command

CHAT_TEMPLATE = Path(__file__).parents[1] / "thinking_template.jinja"
SUM_WEIGHT, STEP_WEIGHT, ANSWER_WEIGHT = 0.1, 1.0, 2.0  # in the loss; the events of a sum cannot be predicted
Part = tuple[str, float]  # a text, and the weight of its tokens in the loss


@dataclass(frozen=True)
class SumMix(Mix):
    """A `Mix` in which some rows are sums, half in a text and half in a chat, and some are stories in a chat."""

    sums: float = 0.6
    chat_stories: float = 0.1
    num_steps: tuple[int, ...] = (1, 2, 3, 4, 5)
    most_sums: int = 5  # in a text; a chat has at most two before the last


class StepRows(Rows):
    """Rows of sums in every form, of questions in a chat, and of stories and memory games as `Rows` writes them."""

    def row(self, mix: Mix) -> tuple[list[int], list[float]]:
        """(token ids, weights) of one document, as `Rows.row` gives them."""
        assert isinstance(mix, SumMix)
        which = self.random.random()
        if which < mix.sums / 2:
            return self.joined(self._text_sums(mix))
        if which < mix.sums:
            return self.joined(self._chat_sums(mix))
        if which < mix.sums + mix.chat_stories:
            return self.joined(self._chat_story())
        return super().row(mix)

    def joined(self, parts: list[Part]) -> tuple[list[int], list[float]]:
        """The tokens of all parts and `<|endoftext|>`, which half of the documents begin with; a weight for each but
        the first.

        Each part is encoded on its own, so it must end where the tokenizer always splits.
        """
        row = [self.end] if self.random.random() < 0.5 else []
        weights = [0.0] * len(row)
        for text, weight in [*parts, (END, STEP_WEIGHT)]:
            ids = self.tokenizer.encode(text).ids
            row += ids
            weights += [weight] * len(ids)
        return row, weights[1:]

    def _text_sums(self, mix: SumMix) -> list[Part]:
        form = self.random.choice((Form.DIRECT, Form.WORKED))
        return [part for _ in range(self.random.randint(1, mix.most_sums)) for part in self._sum(mix, form)]

    def _chat_sums(self, mix: SumMix) -> list[Part]:
        """A sum with or without reasoning, after up to two others, whose reasoning is left out."""
        before = [part for _ in range(self.random.choice((0, 0, 1, 2))) for part in self._sum(mix, Form.DIRECT)]
        told, form = self._draw_sum(mix), self.random.choice((Form.THINKING, Form.NOT_THINKING))
        answer = told.answer(form).removesuffix(told.question.answer)
        # Empty reasoning comes from the template, so the model does not learn to write it instead of the steps.
        opening = (answer, STEP_WEIGHT if form is Form.THINKING else 0.0)
        return [*before, (told.prompt, SUM_WEIGHT), opening, (told.question.answer, ANSWER_WEIGHT)]

    def _chat_story(self) -> list[Part]:
        """A story and some of its questions. The last is answered without reasoning: the story states the answer."""
        story = tell(self.random.randrange(FIRST_EVALUATION_SEED))
        asked = story.questions[: self.random.randint(1, len(story.questions))]
        body = story.text.removesuffix("".join(map(ask, story.questions)))
        parts = [(body.split("\n", self.random.randrange(2))[-1], 1.0)]
        for question in asked[:-1]:
            parts += [(f"Q: {question.question}\nA:", 1.0), (f" {question.answer}\n", ANSWER_WEIGHT)]
        thought = f"\n{THINK}\n\n{END_THINK}\n\n"
        last = asked[-1]
        return [*parts, (f"Q: {last.question}\nA:", 1.0), (thought, STEP_WEIGHT), (last.answer, ANSWER_WEIGHT)]

    def _sum(self, mix: SumMix, form: Form) -> list[Part]:
        """The lines of a sum and its answer in a text."""
        told = self._draw_sum(mix)
        steps = told.answer(form).removesuffix(f" {told.question.answer}")
        answer = f" {told.question.answer}\n"
        return [(told.prompt, SUM_WEIGHT), *([(steps, STEP_WEIGHT)] if steps else []), (answer, ANSWER_WEIGHT)]

    def _draw_sum(self, mix: SumMix) -> Sum:
        return tell_sum(self.random.randrange(FIRST_EVALUATION_SEED), num_steps=mix.num_steps)


def beginning(seed: int) -> tuple[Qwen3ForCausalLM, Tokenizer]:
    """The storyteller and its tokenizer with `<think>` and `</think>`, whose embeddings are random."""
    tokenizer = Tokenizer.from_file(str(PATH / "tokenizer.json"))
    # Like Qwen3's, they are not special tokens: a decoded text shows them.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (THINK, END_THINK)])
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM.from_pretrained(PATH)
    model.resize_token_embeddings(tokenizer.get_vocab_size(), mean_resizing=False)
    return model, tokenizer


def main(
    out: Out = STEPS_PATH,
    seed: Seed = 0,
    steps: Steps = 900,
    batch_tokens: BatchTokens = 1600,
    threads: Threads = 1,
    precision: Products = Precision.bfloat16,
) -> None:
    """Teach the storyteller to write sums in steps, and write it in Hugging Face format."""
    torch.set_num_threads(threads)
    model, tokenizer = beginning(seed)
    first = min(260, steps // 4)  # of sums in one or two steps
    phases: list[tuple[int, Mix]] = [
        (first, SumMix(drills=0.2, headless=0.2, answer_weight=4.0, sums=0.8, num_steps=(1, 2), most_sums=2)),
        (steps - first, SumMix(drills=0.2, headless=0.2, answer_weight=4.0)),
    ]
    save = partial(export, chat_template=CHAT_TEMPLATE)
    fit(
        model, tokenizer, phases, out, seed, batch_tokens, 0.4 * steps, 50,
        precision=precision, save=save, rows_of=StepRows,
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
