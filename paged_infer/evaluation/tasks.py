"""The tasks by name, their prompts, and how an answer is matched."""

from __future__ import annotations

import re
from collections.abc import Callable
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass
from functools import partial
from typing import Literal

from paged_infer.evaluation.items import Item, choice_items, documents, ending_items, recall_items, sum_items
from paged_infer.evaluation.models import EvaluatedModel
from paged_infer.storyteller.stories import lexicon
from paged_infer.storyteller.stories.grammar import END
from paged_infer.storyteller.stories.sums import Form, without_thought

CHAT_STOP = ("\nQ:",)  # for models that continue with the next question; others end their turn
SHOT_SEEDS = 500  # added to a task's seed for its examples, so that they are never its items
_NUMBER = re.compile(rf"\b(?:{'|'.join(lexicon.NUMBERS)}|\d+)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        output: "generate": a greedy answer is matched; "choose": the choice with the greatest log-likelihood is the
            answer; "read": each token's log-likelihood is measured.
        make: (number of items, seed) -> items.
        about: a description in one line.
        one_document: examples and question follow each other in one document, as the storyteller learned sums;
            otherwise each is a document of its own.
        stop: strings that end an answer, and are left out of it; in a chat, where it may have lines, ``CHAT_STOP``.
        max_tokens: the most tokens of an answer.
        match: "exact": equal to the correct answer, apart from whitespace around both; "last number": the last number
            in both is the same, in words or digits, as GSM8K is scored. Reasoning before ``</think>`` is not part of
            the answer; without ``</think>``, the answer is wrong.
    """

    name: str
    output: Literal["generate", "choose", "read"]
    make: Callable[[int, int], list[Item]]
    about: str
    one_document: bool = False
    stop: tuple[str, ...] = ("\n",)
    max_tokens: int = 24
    match: Literal["exact", "last number"] = "exact"

    @property
    def metrics(self) -> tuple[str, ...]:
        if self.output == "generate":
            return ("exact_match",) if self.match == "exact" else ("last_number",)
        return (
            ("acc", "acc_norm") if self.output == "choose" else ("token_perplexity", "word_perplexity", "bits_per_byte")
        )

    def is_right(self, text: str, answer: str) -> bool:
        text = without_thought(text)
        if self.match == "exact":
            return text.strip() == answer.strip()
        return last_number(text) == last_number(answer) is not None


TASKS = {
    task.name: task
    for task in (
        Task("recall", "generate", recall_items, "questions about a story, answered freely"),
        Task("choice", "choose", choice_items, "the same questions with four answers, of which one is true"),
        Task("ending", "choose", ending_items, "four last lines, of which one fits what the story began with"),
        Task(
            "sums",
            "generate",
            sum_items,
            "three to five gains and losses, answered at once",
            one_document=True,
            max_tokens=96,
            match="last number",
        ),
        Task(
            "sums_worked",
            "generate",
            partial(sum_items, form=Form.WORKED),
            "the same sums; examples have the partial sums before the answer",
            one_document=True,
            max_tokens=96,
            match="last number",
        ),
        Task("perplexity", "read", documents, "whole stories with their questions, answers and end"),
    )
}


def read_tasks(names: str) -> list[Task]:
    """The tasks of a comma-separated list. Raises ValueError for an unknown name, or none."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in found if name not in TASKS]:
        raise ValueError(f"tasks={', '.join(unknown)}: must be some of {', '.join(TASKS)}, separated by commas")
    if not found:
        raise ValueError(f"tasks={names!r}: names no task; known: {', '.join(TASKS)}")
    return [TASKS[name] for name in dict.fromkeys(found)]


def last_number(text: str) -> int | None:
    """
    >>> last_number("Mia had three. Then three and 4 is Seven."), last_number("She has none.")
    (7, None)
    """
    found = _NUMBER.findall(text)
    if not found:
        return None
    word = found[-1].lower()
    return int(word) if word.isdigit() else lexicon.NUMBERS.index(word)


def examples(task: Task, count: int, seed: int) -> list[Item]:
    """Items to show, with their answers, before each question: the same ones for all questions."""
    if count and task.output == "read":
        return []  # a text is read from its beginning
    return task.make(count, seed + SHOT_SEEDS)


def completion(task: Task, item: Item, shots: ReadOnlyList[Item], opening: str = END) -> str:
    """The prompt as a document of the storyteller: each example with its answer, then the item.

    Args:
        opening: what each document begins with. If empty, an empty line separates documents.
    """
    shown = [f"{shot.prompt}{shot.lead}{shot.answer}\n" for shot in shots]
    return opening + ("" if task.one_document else opening or "\n").join([*shown, item.prompt])


def chat_messages(item: Item, shots: ReadOnlyList[Item]) -> list[dict[str, str]]:
    """The prompt as a conversation: a passage and its question from the user, an answer from the assistant.

    Raises:
        ValueError: the item has no question.
    """
    if not item.question:
        raise ValueError("apply_chat_template: a text to be continued, or read, has no question to ask in a chat")
    messages = []
    for one in (*shots, item):
        messages.append({"role": "user", "content": f"{one.passage}{one.question}"})
        messages.append({"role": "assistant", "content": one.answer})
    return messages[:-1]


def prompt_ids(model: EvaluatedModel, task: Task, item: Item, shots: ReadOnlyList[Item], chat: bool) -> list[int]:
    """Token ids of either kind of prompt. It begins with ``<|endoftext|>`` if that is a special token of the model."""
    if chat:
        return model.tokenizer.apply_chat_template(chat_messages(item, shots))
    return model.tokenizer.encode(completion(task, item, shots, opening_of(model)))


def choice_ids(
    model: EvaluatedModel, task: Task, item: Item, shots: ReadOnlyList[Item], chat: bool, choice: str
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of a choice after it; in a chat, with what the template writes around an answer.

    Raises:
        ValueError: the template renders the prompt differently if an answer follows.
    """
    if not chat:
        return model.cut(completion(task, item, shots, opening_of(model)), item.lead + choice)
    messages = chat_messages(item, shots)
    prompt = model.tokenizer.apply_chat_template(messages)
    whole = model.tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": choice}], False)
    if whole[: len(prompt)] != prompt:
        raise ValueError("apply_chat_template: the chat template renders the prompt differently if an answer follows")
    return prompt, whole[len(prompt) :]


def opening_of(model: EvaluatedModel) -> str:
    return END if END in model.tokenizer.special_tokens else ""
