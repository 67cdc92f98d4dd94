"""Evaluate several variants of a model on several tasks, compare each with the first, and report tables and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as ReadOnlyList
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paged_infer.evaluation.distance import Distance, distance
from paged_infer.evaluation.items import Item
from paged_infer.evaluation.models import EvaluatedModel, InProcess
from paged_infer.evaluation.score import Score, compare, score
from paged_infer.evaluation.statistics import Estimate, PairedAnswers
from paged_infer.evaluation.tasks import CHAT_STOP, Task, examples, opening_of

DTYPES = ("float32", "bfloat16", "float16")
Cell = tuple[str, ...]


def variants(schemes: ReadOnlyList[str], ranks: ReadOnlyList[int]) -> dict[str, dict[str, Any]]:
    """Name -> options of the engine, for each combination of scheme and number of ranks.

    A scheme is a dtype, or a value of ``LLM(quantization=...)``; with the latter, the rest is float32.

    >>> variants(["float32", "w8a16"], [])
    {'float32': {'dtype': 'float32'}, 'w8a16': {'dtype': 'float32', 'quantization': 'w8a16'}}
    >>> list(variants([], [1, 2]))
    ['1 rank', '2 ranks']
    """
    found = {}
    for scheme in schemes or [""]:
        for count in ranks or [0]:
            words, options = list[str](), dict[str, Any]()
            if scheme:
                words.append(scheme)
                options |= {"dtype": scheme} if scheme in DTYPES else {"dtype": "float32", "quantization": scheme}
            if count:
                words.append(f"{count} rank{'s' * (count > 1)}")
                options["tensor_parallel_size"] = count
            if words:
                found[", ".join(words)] = options
    return found


@dataclass(slots=True)
class Settings:
    """Settings of all tasks; see ``paged-infer eval --help``."""

    limit: int = 100
    seed: int = 0
    num_fewshot: int = 0
    chat: bool = False


@dataclass(slots=True)
class Report:
    """The results of several models; the others are compared with the first.

    Attributes:
        how: task -> what must be the same if two numbers are compared.
        scores: model -> task -> the scores of its items.
        distances: model -> KL and agreement with the first, on the texts of a "read" task.
    """

    settings: Settings
    how: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    distances: dict[str, Distance] = field(default_factory=dict)

    def comparisons(self) -> dict[str, dict[str, dict[str, PairedAnswers | Estimate]]]:
        """Model -> task -> metric -> difference from the first model."""
        first, *others = self.scores
        return {
            name: {task: compare(before, self.scores[name][task]) for task, before in self.scores[first].items()}
            for name in others
        }

    def save(self, path: Path) -> None:
        """Write JSON; infinite bounds (of a single text) are null."""
        named: dict[str, Any] = {
            "settings": asdict(self.settings),
            "how": self.how,
            "results": {
                name: {
                    task: {
                        "metrics": {metric: one._asdict() for metric, one in found.estimates().items()},
                        "by_kind": found.by_kind(),
                        **{key: value for key, value in asdict(found).items() if key != "task" and value},
                    }
                    for task, found in tasks.items()
                }
                for name, tasks in self.scores.items()
            },
            "compared_with_the_first": {
                name: {task: {metric: one._asdict() for metric, one in found.items()} for task, found in tasks.items()}
                for name, tasks in self.comparisons().items()
            },
            "distances": {
                name: {key: one._asdict() for key, one in found._asdict().items()}
                for name, found in self.distances.items()
            },
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_finite(named), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def rows(self) -> Iterator[Cell]:
        """Each row is a metric, with the value and interval of each model."""
        for task, found in next(iter(self.scores.values())).items():
            for metric in found.estimates():
                cells = (_estimate(scores[task].estimates()[metric]) for scores in self.scores.values())
                yield f"{task} {metric}", *cells

    def difference_rows(self) -> Iterator[Cell]:
        """Each row is a metric, with the differences of all other models from the first."""
        compared = self.comparisons()
        for task, found in next(iter(compared.values()), {}).items():
            for metric in found:
                yield f"{task} {metric}", *(_difference(one[task][metric]) for one in compared.values())
        for name in Distance._fields if self.distances else ():
            yield name, *(_estimate(getattr(one, name)) for one in self.distances.values())


def evaluate(
    models: dict[str, Callable[[], EvaluatedModel]],
    tasks: ReadOnlyList[Task],
    settings: Settings,
    on_task: Callable[[str, str], None] = lambda model, task: None,
) -> Report:
    """Run every model on every task, one model after the other. Only the first stays open, if KL is measured.

    Args:
        models: name -> the function that opens it.

    Raises:
        ValueError: a model that cannot be opened, or that cannot take a prompt.
    """
    report, reference = Report(settings), None
    items = {task.name: task.make(settings.limit, settings.seed) for task in tasks}
    shots = {task.name: examples(task, settings.num_fewshot, settings.seed) for task in tasks}
    texts = [item.passage for task in tasks if task.output == "read" for item in items[task.name]]
    for name, opens in models.items():
        model = opens()
        report.scores[name] = {}
        for task in tasks:
            on_task(name, task.name)
            report.scores[name][task.name] = score(model, task, items[task.name], shots[task.name], settings.chat)
            report.how.setdefault(task.name, _how(task, model, settings, items[task.name]))
        if not isinstance(model, InProcess):
            continue
        if reference is None and len(models) > 1 and texts:
            reference = model
            continue
        if reference is not None:
            on_task(name, "kl")
            report.distances[name] = distance(reference, model, texts)
        model.llm.shutdown()
    if reference is not None:
        reference.llm.shutdown()
    return report


def _how(task: Task, model: EvaluatedModel, settings: Settings, items: ReadOnlyList[Item]) -> dict[str, Any]:
    prefix = model.tokenizer.decode(model.prefix_token_ids, skip_special_tokens=False)
    common: dict[str, Any] = {"about": task.about, "items": len(items), "seed": settings.seed}
    if task.output == "read":
        return {**common, "prefix": prefix, "long_texts": "windows of max_model_len - 1 tokens, each with most context"}
    common |= {
        "num_fewshot": settings.num_fewshot,
        "template": "the model's chat template" if settings.chat else _completion_template(task, opening_of(model)),
    }
    if task.output == "choose":
        return {**common, "acc": "sum of log-probabilities", "acc_norm": "that sum over the choice's characters"}
    exact = "white space around both is removed, then they are equal"
    return {
        **common,
        "stop": list(CHAT_STOP if settings.chat else task.stop),
        "max_tokens": task.max_tokens,
        "temperature": 0,
        "match": task.match,
    } | ({"normalisation": exact if task.match == "exact" else "the last number in each, in letters or digits"})


def _completion_template(task: Task, opening: str) -> str:
    if task.one_document:
        return f"one document, which begins with {opening!r}: examples, then the question"
    return f"documents: each example, and the question, after {opening!r}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _estimate(one: Estimate) -> str:
    """
    >>> _estimate(Estimate(0.9, 0.7, 0.97)), _estimate(Estimate(0.00048, 0.0004, 0.0006))
    ('0.900 [0.700, 0.970]', '0.00048 [0.0004, 0.0006]')
    """
    form = ".3f" if abs(one.value) >= 0.01 or one.value == 0 else ".2g"
    return f"{one.value:{form}} [{one.low:{form}}, {one.high:{form}}]"


def _difference(one: PairedAnswers | Estimate) -> str:
    """
    >>> _difference(PairedAnswers(1, 6, 0.125)), _difference(Estimate(1.0012, 1.0003, 1.0021))
    ('+1 -6, p = 0.12', 'x 1.0012 [1.0003, 1.0021]')
    """
    if isinstance(one, PairedAnswers):
        return f"+{one.gained} -{one.lost}, p = {one.p:.2g}"
    return f"x {one.value:.4f} [{one.low:.4f}, {one.high:.4f}]"
