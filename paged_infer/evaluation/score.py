"""One model on one task: its answer to each item, and the scores."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, field

from paged_infer.evaluation.items import Item
from paged_infer.evaluation.models import EvaluatedModel
from paged_infer.evaluation.statistics import Estimate, PairedAnswers, paired_answers, proportion, ratio
from paged_infer.evaluation.tasks import CHAT_STOP, Task, choice_ids, prompt_ids

_UNIT = {"token_perplexity": "tokens", "word_perplexity": "words", "bits_per_byte": "bytes"}  # of each mean


@dataclass(slots=True)
class Score:
    """One model on one task, item by item.

    Attributes:
        right: metric -> whether each answer is right; empty for texts that are read.
        amounts: the "nats", "tokens", "words" and "bytes" of each text; empty for questions.
        kinds: the kind of each question.
        answers: the generated text, or the choice with the greatest log-likelihood.
    """

    task: str
    right: dict[str, list[bool]] = field(default_factory=dict)
    amounts: dict[str, list[float]] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    def estimates(self) -> dict[str, Estimate]:
        """Metric -> its value and interval. For texts, these are means, converted to perplexity or to bits."""
        found = {metric: proportion(right) for metric, right in self.right.items()}
        for metric, unit in _UNIT.items() if self.amounts else ():
            mean = ratio(self.amounts["nats"], self.amounts[unit])
            convert = math.exp if unit != "bytes" else lambda nats: nats / math.log(2)
            found[metric] = Estimate(*(math.inf if x == math.inf else convert(x) for x in mean))
        return found

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Kind of question -> (number right by the first metric, number asked)."""
        right = next(iter(self.right.values()), [])
        return {
            kind: (sum(r for r, k in zip(right, self.kinds, strict=True) if k == kind), self.kinds.count(kind))
            for kind in dict.fromkeys(self.kinds)
        }


def compare(before: Score, after: Score) -> dict[str, PairedAnswers | Estimate]:
    """Metric -> how the second differs from the first on the same items: answers gained and lost, or the ratio of the
    token perplexities. That ratio's interval is narrow, because a text that is hard for one model is hard for both."""
    found: dict[str, PairedAnswers | Estimate] = {
        metric: paired_answers(right, after.right[metric]) for metric, right in before.right.items()
    }
    if before.amounts:
        more = [new - old for old, new in zip(before.amounts["nats"], after.amounts["nats"], strict=True)]
        mean = ratio(more, before.amounts["tokens"])
        found["token_perplexity"] = Estimate(*(math.inf if x == math.inf else math.exp(x) for x in mean))
    return found


def score(
    model: EvaluatedModel, task: Task, items: ReadOnlyList[Item], shots: ReadOnlyList[Item] = (), chat: bool = False
) -> Score:
    """Submit all items at once.

    Raises:
        ValueError: a prompt that the model cannot take, or a chat about a text without a question.
    """
    if task.output == "read":
        return _read(model, task, items)
    prompts = [prompt_ids(model, task, item, shots, chat) for item in items]
    kinds = [item.kind for item in items]
    if task.output == "generate":
        texts = model.generate(prompts, task.max_tokens, CHAT_STOP if chat else task.stop)
        right = [task.is_right(text, item.answer) for text, item in zip(texts, items, strict=True)]
        return Score(task.name, {task.metrics[0]: right}, kinds=kinds, answers=texts)
    return _choose(model, task, items, shots, chat)


def _choose(
    model: EvaluatedModel, task: Task, items: ReadOnlyList[Item], shots: ReadOnlyList[Item], chat: bool
) -> Score:
    """``acc``: by the sum of the log-probabilities of a choice's tokens; ``acc_norm``: by that sum over the choice's
    characters, so that long choices are not at a disadvantage (both as lm-eval defines them)."""
    pairs = [choice_ids(model, task, item, shots, chat, choice) for item in items for choice in item.choices]
    scores = iter(model.continuations(pairs))
    found = Score(task.name, {"acc": [], "acc_norm": []}, kinds=[item.kind for item in items])
    for item in items:
        sums = [sum(token.logprob for token in next(scores)) for _ in item.choices]
        by_length = [total / len(choice) for total, choice in zip(sums, item.choices, strict=True)]
        best = sums.index(max(sums))
        found.right["acc"].append(best == item.label)
        found.right["acc_norm"].append(by_length.index(max(by_length)) == item.label)
        found.answers.append(item.choices[best])
    return found


def _read(model: EvaluatedModel, task: Task, items: ReadOnlyList[Item]) -> Score:
    texts = [item.passage for item in items]
    scores = model.rolling(texts)
    amounts: dict[str, list[float]] = {
        "nats": [-sum(token.logprob for token in one) for one in scores],
        "tokens": [len(one) for one in scores],
        "words": [len(re.split(r"\s+", text)) for text in texts],
        "bytes": [len(text.encode()) for text in texts],
    }
    return Score(task.name, amounts=amounts)
