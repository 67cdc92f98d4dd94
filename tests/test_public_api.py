"""What a newcomer sees first: names, representations, tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from holding import LIMIT_S

import paged_infer
import paged_infer.viz
from paged_infer import LLM, LLMEngine, SamplingParams
from paged_infer.cli.info import attention_row
from paged_infer.config import EngineConfig
from paged_infer.kernels import attention_backends
from paged_infer.outputs import CompletionOutput, RequestMetrics, RequestOutput

ROOT = Path(__file__).resolve().parent.parent


def test_completion_shows_public_names_alone_whatever_has_been_imported() -> None:
    code = """
import json, sys
import paged_infer, paged_infer.viz, paged_infer.kernels, paged_infer.values
from paged_infer import SamplingParams
print(json.dumps([[name in sys.modules for name in ("torch", "matplotlib")], dir(paged_infer), dir(paged_infer.viz)]))
"""
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=LIMIT_S)
    imported, names, of_viz = json.loads(lines.stdout)
    assert imported == [False, False], lines.stderr
    assert names == sorted(paged_infer.__all__) and {"LLM", "LLMEngine", "SamplingParams"} <= {*names}
    assert of_viz == ["explore", "pool_map_figure", "timeline_figure"] == sorted(paged_infer.viz.__all__)
    assert all(callable(getattr(paged_infer.viz, name)) for name in of_viz)


def test_an_llm_describes_itself_in_one_line(llm) -> None:
    assert repr(llm) == (
        f"<LLM {llm.name!r} (qwen3), float32 on cpu, attention_backend={llm.engine.attention_backend.name!r}, "
        "64 blocks of 16 tokens>"
    )
    assert repr(llm.engine) == repr(llm).replace("<LLM ", "<LLMEngine ")


def test_info_and_repr_give_the_reason_for_a_slow_backend(make_llm, monkeypatch) -> None:
    monkeypatch.setattr(attention_backends, "unavailable_reason", lambda: "no C compiler was found")
    slow, asked = make_llm(attention_backend="auto"), make_llm(attention_backend="torch")
    assert slow.engine.attention_backend == ("sdpa", "no C compiler was found")
    assert "attention_backend='sdpa'" in repr(slow)
    assert attention_row(slow) == "sdpa, which is slower: no C compiler was found"
    assert attention_row(asked) == 'torch, as asked for; "auto" takes sdpa'
    monkeypatch.setattr(attention_backends, "unavailable_reason", lambda: None)
    assert attention_row(asked) == 'torch, as asked for; "auto" takes c'


def test_an_output_is_a_table_in_a_notebook_with_what_a_model_writes_escaped() -> None:
    metrics = RequestMetrics(1.0, first_token_time_s=1.25, finished_time_s=2.0)
    answers = [
        CompletionOutput(0, "<script>alert(1)</script>", [5, 6, 7], "stop"),
        CompletionOutput(1, "z" * 1000, [5], "error", error="its logits < 0 & NaN"),
    ]
    table = RequestOutput("a", "1 < 2 & 3", [1, 2], answers, metrics, finished=True)._repr_html_()
    assert "<script>" not in table and "&lt;script&gt;alert(1)&lt;/script&gt;" in table
    assert "1 &lt; 2 &amp; 3" in table and "its logits &lt; 0 &amp; NaN" in table
    assert "first token after 250 ms, all after 1,000 ms" in table and "3 tokens" in table
    assert table.count("z") < 310 and " ... " in table
    table = RequestOutput("a", None, [1, 2], answers[:1], RequestMetrics(1.0))._repr_html_()
    assert "2 token ids" in table and "first token" not in table


def test_an_engine_is_made_as_an_llm_is_or_with_a_config() -> None:
    for engine in (LLMEngine(num_blocks=99), LLMEngine("storyteller", EngineConfig(num_blocks=99))):
        assert engine.name == "storyteller" and engine.memory.num_blocks == 99
    with pytest.raises(TypeError, match="num_blocks and a config: pass either options or a config"):
        LLMEngine("storyteller", EngineConfig(), num_blocks=99)
    with pytest.raises(TypeError, match=r"did you mean num_blocks\?"):
        LLMEngine(num_block=99)  # type: ignore[call-arg]


def test_the_tokenizer_is_what_vllm_calls_it_and_refused_where_there_is_none(text_llm, llm) -> None:
    assert text_llm.get_tokenizer() is text_llm.tokenizer
    with pytest.raises(ValueError, match="has no tokenizer: prompts must be token ids"):
        llm.get_tokenizer()


def test_a_step_at_a_time_gives_what_generate_gives(llm) -> None:
    params = SamplingParams(temperature=0, max_tokens=5)
    (expected,) = llm.generate([5, 6, 7], params, use_tqdm=False)
    engine = LLMEngine(llm.folder, num_blocks=64, device="cpu")
    engine.add_request("mine", [5, 6, 7], params, streamed=True)
    lengths = []
    while engine.has_unfinished_requests:
        for output in engine.step().outputs:
            lengths.append(len(output.outputs[0].token_ids))
    assert lengths == [1, 2, 3, 4, 5]
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    assert isinstance(llm, LLM)
