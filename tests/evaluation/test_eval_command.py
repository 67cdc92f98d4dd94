"""``paged-infer eval``: its columns, its JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paged_infer.cli import app
from paged_infer.evaluation.harness_tasks import write_harness_tasks
from paged_infer.evaluation.report import Report, Settings, variants
from paged_infer.evaluation.score import Score
from paged_infer.evaluation.tasks import TASKS, completion, examples


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["eval", *words, "--device", "cpu", "--num-blocks", "256"])
    return result.exit_code, result.output


def test_a_table_of_schemes_with_error_bars_and_differences(tmp_path: Path) -> None:
    path = tmp_path / "results" / "eval.json"
    code, text = run("--tasks", "recall,choice,perplexity", "--limit", "3", "--schemes", "float32,w4a16",
                     "--output", str(path))  # fmt: skip
    assert code == 0, text
    assert "1.000 [0.439, 1.000]" in text and "compared with float32" in text and "+0 -0, p = 1" in text
    found = json.loads(path.read_text())
    assert list(found["results"]) == ["float32", "w4a16"] and list(found["distances"]) == ["w4a16"]
    assert found["how"]["perplexity"]["prefix"] == "<|endoftext|>"
    assert found["how"]["recall"] | {"stop": ["\n"], "num_fewshot": 0, "items": 3} == found["how"]["recall"]
    recall = found["results"]["w4a16"]["recall"]
    assert recall["metrics"]["exact_match"]["value"] == 1.0 and len(recall["answers"]) == 3
    assert 0 < found["distances"]["w4a16"]["kl"]["value"] < 0.01
    ratio = found["compared_with_the_first"]["w4a16"]["perplexity"]["token_perplexity"]
    one, other = (found["results"][name]["perplexity"]["amounts"] for name in ("float32", "w4a16"))
    assert ratio["low"] < ratio["value"] < ratio["high"]
    assert one["tokens"] == other["tokens"] and one["nats"] != other["nats"]


def test_a_reference_is_the_first_column_and_examples_come_first() -> None:
    code, text = run("storyteller-moe", "--tasks", "sums", "--limit", "2", "--num-fewshot", "1",
                     "--reference", "storyteller")  # fmt: skip
    assert code == 0 and "storyteller (reference)" in text and "compared with storyteller (reference)" in text


def test_columns_are_schemes_by_ranks() -> None:
    assert variants(["float32", "w8a16"], [1, 2]) == {
        "float32, 1 rank": {"dtype": "float32", "tensor_parallel_size": 1},
        "float32, 2 ranks": {"dtype": "float32", "tensor_parallel_size": 2},
        "w8a16, 1 rank": {"dtype": "float32", "quantization": "w8a16", "tensor_parallel_size": 1},
        "w8a16, 2 ranks": {"dtype": "float32", "quantization": "w8a16", "tensor_parallel_size": 2},
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", "mmlu"), "tasks=mmlu: must be some of recall, choice"),
        (("--schemes", "w3a16"), "quantization='w3a16'"),
        (("--ranks", "0"), "ranks='0': must be numbers of at least 1"),
        (("--base-url", "http://127.0.0.1:9", "--schemes", "w8a16"), "a server has its own engine"),
        (("--tasks", "ending", "--apply-chat-template", "--limit", "1"), "has no question to ask in a chat"),
        (("--tasks", "recall", "--num-fewshot", "20", "--limit", "1"), "max_model_len"),
    ],
)
def test_what_cannot_be_evaluated_gets_one_line(words: tuple[str, ...], message: str) -> None:
    code, text = run(*words)
    assert code == 2 and message in text and text.count("error:") == 1


def test_the_bounds_of_a_single_text_are_null_in_json(tmp_path: Path) -> None:
    amounts = {"nats": [2.0], "tokens": [8.0], "words": [4.0], "bytes": [16.0]}
    report = Report(Settings(1), scores={"one": {"perplexity": Score("perplexity", amounts=amounts)}})
    report.save(tmp_path / "eval.json")
    found = json.loads((tmp_path / "eval.json").read_text())["results"]["one"]["perplexity"]["metrics"]
    assert found["word_perplexity"]["low"] == 0 and found["word_perplexity"]["high"] is None


def test_tasks_for_lm_eval_have_whole_prompts(tmp_path: Path) -> None:
    code, text = run("--write-tasks", str(tmp_path), "--tasks", "choice,sums", "--limit", "3", "--num-fewshot", "2")
    assert code == 0 and text.split() == [str(tmp_path / "story_choice.yaml"), str(tmp_path / "story_sums.yaml")]
    task = TASKS["choice"]
    for line, item in zip((tmp_path / "story_choice.jsonl").open(), task.make(3, 0), strict=True):
        known = json.loads(line)
        assert (
            known["prompt"] == completion(task, item, examples(task, 2, 0))
            and known["choices"][known["label"]] == item.answer
        )
    config = dict(line.split(": ", 1) for line in (tmp_path / "story_sums.yaml").read_text().splitlines())
    assert json.loads(config["num_fewshot"]) == 0 and json.loads(config["generation_kwargs"])["until"] == ["\n"]
    with pytest.raises(ValueError, match="leave out apply_chat_template"):
        write_harness_tasks(tmp_path, [task], Settings(chat=True))


def test_a_file_that_cannot_be_written_is_an_error_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "eval.json"):
        code, text = run("nowhere", "--output", str(path))
        assert code == 2 and f"output={path}: " in text
    code, text = run("--write-tasks", str(tmp_path / "file"))
    assert code == 2 and f"write_tasks={tmp_path / 'file'}: " in text and text.count("error:") == 1
