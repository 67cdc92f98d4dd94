"""The same tasks in this process and over HTTP, by this package's evaluation and by lm-eval, have the same results."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served, serving
from typer.testing import CliRunner

from paged_infer import LLM, storyteller
from paged_infer.cli import app
from paged_infer.evaluation.harness_tasks import write_harness_tasks
from paged_infer.evaluation.models import InProcess, OverHttp
from paged_infer.evaluation.report import Settings
from paged_infer.evaluation.score import score
from paged_infer.evaluation.tasks import TASKS, examples
from paged_infer.text.tokenizer import Tokenizer

NUM_ITEMS, NUM_SHOTS = 4, 1
NAMES = ("recall", "ending", "sums", "perplexity")


@pytest.fixture(scope="module")
def whole_stories() -> Iterator[Served]:
    with serving(max_num_seqs=16, num_blocks=512) as served:
        yield served


@pytest.fixture(scope="module")
def in_process() -> InProcess:
    return InProcess(LLM(device="cpu", num_blocks=512))


@pytest.fixture(scope="module")
def known(in_process: InProcess) -> dict[str, dict[str, float]]:
    """Task -> metric -> value."""
    found = {}
    for name in NAMES:
        task = TASKS[name]
        one = score(in_process, task, task.make(NUM_ITEMS, 0), examples(task, NUM_SHOTS, 0))
        found[name] = {metric: estimate.value for metric, estimate in one.estimates().items()}
    return found


def test_a_server_is_evaluated_as_the_model_in_this_process(whole_stories: Served, known: Any) -> None:
    for url in (whole_stories.url, f"{whole_stories.url}/v1/"):
        model = OverHttp(url, Tokenizer.from_pretrained(storyteller.PATH))
        assert model.max_model_len == 1024 and model.prefix_token_ids == [0]
    for name, expected in known.items():
        task = TASKS[name]
        one = score(model, task, task.make(NUM_ITEMS, 0), examples(task, NUM_SHOTS, 0))
        assert {k: e.value for k, e in one.estimates().items()} == pytest.approx(expected, abs=1e-3)


def test_the_command_evaluates_a_server_by_its_address(whole_stories: Served, known: Any) -> None:
    words = ["--tasks", "sums", "--limit", str(NUM_ITEMS), "--num-fewshot", str(NUM_SHOTS)]
    result = CliRunner().invoke(app, ["eval", "--base-url", whole_stories.url, *words])
    assert result.exit_code == 0, result.output
    assert f"sums last_number  {known['sums']['last_number']:.3f} [" in result.output


def test_the_scores_of_tokens_are_the_same_over_http(whole_stories: Served, in_process: InProcess) -> None:
    model = OverHttp(whole_stories.url, Tokenizer.from_pretrained(storyteller.PATH))
    texts = [item.passage for item in TASKS["perplexity"].make(2, 1)]
    for one, other in zip(model.rolling(texts), in_process.rolling(texts), strict=True):
        assert [token.logprob for token in one] == pytest.approx([token.logprob for token in other], abs=1e-3)
        assert [token.is_best for token in one] == [token.is_best for token in other]


def test_a_server_that_is_not_there_or_refuses_is_named(whole_stories: Served) -> None:
    tokenizer = Tokenizer.from_pretrained(storyteller.PATH)
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/v1/models: .*refused"):
        OverHttp("http://127.0.0.1:9", tokenizer)
    model = OverHttp(whole_stories.url, tokenizer)
    with pytest.raises(ValueError, match=r"/v1/completions: 400: .*max_model_len"):
        model.generate([[5] * 2000], 1, ())


def test_lm_eval_agrees_in_this_process_and_over_http(
    whole_stories: Served, in_process: InProcess, known: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    import datasets
    from lm_eval.tasks import TaskManager

    from paged_infer.evaluation.lm_harness import PagedInferLM

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    tasks = [TASKS[name] for name in NAMES]
    names = [path.stem for path in write_harness_tasks(tmp_path, tasks, Settings(NUM_ITEMS, 0, NUM_SHOTS))]
    server = {
        "base_url": f"{whole_stories.url}/v1/completions",
        "model": "storyteller",
        "tokenizer": str(storyteller.PATH),
        "tokenizer_backend": "huggingface",
        "batch_size": 8,
        "max_length": 1024,
    }
    results = []
    for model, arguments in ((PagedInferLM(llm=in_process.llm), {}), ("local-completions", server)):
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        found = lm_eval.simple_evaluate(
            model, model_args=arguments, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=False
        )
        results.append({name: _values(found["results"][name]) for name in names})
    for one in results:
        for name, found in zip(NAMES, one.values(), strict=True):
            assert len(found) >= 1
            for metric, value in found.items():
                expected = known[name].get(metric, known[name].get("last_number"))
                assert math.isclose(value, expected, abs_tol=1e-3), (name, metric)


def _values(found: dict[str, Any]) -> dict[str, float]:
    """Metric -> value, without standard errors and names."""
    plain = {key.split(",")[0]: value for key, value in found.items() if "," in key and "_stderr" not in key}
    return {key: float(value) for key, value in plain.items()}


def test_a_model_for_lm_eval_refuses_what_it_would_ignore() -> None:
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    from paged_infer.evaluation.lm_harness import PagedInferLM, _sampling

    with pytest.raises(ValueError, match="batch_size=8: the engine makes its own batches"):
        PagedInferLM(batch_size=8)
    with pytest.raises(ValueError, match="generation_kwargs num_beams: not served"):
        _sampling({"until": ["\n"], "num_beams": 4})
    assert _sampling({"do_sample": False, "temperature": 0.7}).temperature == 0
    assert _sampling({"temperature": 0.7, "top_p": 0.9, "max_gen_toks": 5}).top_p == 0.9
