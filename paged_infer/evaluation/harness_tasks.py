"""The same tasks in lm-eval's format: a YAML and a JSONL file each, with whole prompts, examples included.

lm-eval's own tasks are fetched from a hub; these are local. ``lm_eval --include_path FOLDER --tasks story_recall ...``
"""

from __future__ import annotations

import json
from collections.abc import Sequence as ReadOnlyList
from pathlib import Path
from typing import Any

from paged_infer.evaluation.items import Item
from paged_infer.evaluation.report import Settings
from paged_infer.evaluation.tasks import Task, completion, examples, last_number
from paged_infer.storyteller.stories import lexicon

_STRIPPED = r"^\s*(.*?)\s*$"
_NUMBER = rf"(?i)\b({'|'.join(lexicon.NUMBERS)})\b"


def harness_name(task: Task) -> str:
    return f"story_{task.name}"


def write_harness_tasks(folder: Path, tasks: ReadOnlyList[Task], settings: Settings) -> list[Path]:
    """Write the files. Returns the YAML files, which refer to their data by an absolute path.

    Raises:
        ValueError: chat messages are requested, but a prompt is one text here.
    """
    if settings.chat:
        raise ValueError("write_tasks: prompts are texts to complete; leave out apply_chat_template")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for task in tasks:
        shots = examples(task, settings.num_fewshot, settings.seed)
        data, config = (folder / f"{harness_name(task)}{ending}" for ending in (".jsonl", ".yaml"))
        items = task.make(settings.limit, settings.seed)
        data.write_text("".join(json.dumps(_line(task, item, shots)) + "\n" for item in items), encoding="utf-8")
        settled = _config(task, items[0].lead) | {
            "task": harness_name(task),
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
            "test_split": "test",
            "num_fewshot": 0,  # examples are in the prompts
            "metadata": {"version": 1, "seed": settings.seed, "examples": settings.num_fewshot},
        }
        # A JSON value is a YAML value.
        config.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in settled.items()), encoding="utf-8")
        written.append(config)
    return written


def _line(task: Task, item: Item, shots: ReadOnlyList[Item]) -> dict[str, Any]:
    if task.output == "read":
        return {"text": item.passage}
    line: dict[str, Any] = {"prompt": completion(task, item, shots), "answer": item.answer}
    if task.output == "choose":
        return {**line, "choices": item.choices, "label": item.label}
    if task.match == "last number":
        number = last_number(item.answer)
        assert number is not None
        line["answer"] = lexicon.NUMBERS[number]
    return line


def _config(task: Task, lead: str) -> dict[str, Any]:
    if task.output == "read":
        metrics = [("word_perplexity", "weighted_perplexity"), ("bits_per_byte", "bits_per_byte")]
        return {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name, "aggregation": by, "higher_is_better": False} for name, by in metrics],
        }
    if task.output == "choose":
        return {
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "target_delimiter": lead,
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in task.metrics],
        }
    # The first match of the one, the last of the other.
    pattern = {"regex_pattern": _STRIPPED} if task.match == "exact" else {"regex_pattern": _NUMBER, "group_select": -1}
    return {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": list(task.stop), "max_gen_toks": task.max_tokens, "do_sample": False},
        "filter_list": [{"name": "match", "filter": [{"function": "regex", **pattern}, {"function": "take_first"}]}],
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
            if task.match == "last number"
            else {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
        ],
    }
