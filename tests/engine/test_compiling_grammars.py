"""In an engine's process, grammars are compiled outside the engine's thread: others' tokens do not wait for them."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any, cast

import pytest

from paged_infer import LLM, SamplingParams, StructuredOutputsParams
from paged_infer.engine import grammars
from paged_infer.engine.engine_core import _EngineCore
from paged_infer.engine.process_messages import Add


@pytest.mark.parametrize(("pattern", "is_compiled"), [("(yes|no){2}", True), ("(a", False)])
def test_a_request_reaches_the_engine_s_thread_with_its_grammar_compiled(
    pattern: str, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is refused goes on without: the engine's thread sends the error."""
    llm = LLM(num_blocks=32)
    (request,) = llm.prepare("x", SamplingParams(max_tokens=1))
    asked = StructuredOutputsParams(regex=pattern)
    object.__setattr__(request.params, "structured_outputs", asked)
    held: list[bool] = []
    core = _EngineCore(cast(Any, None))
    core._started.set_result(
        cast(
            Any,
            SimpleNamespace(
                engine=llm.engine, add=lambda *_: held.append(llm.engine.input_processor.grammars.holds(asked))
            ),
        )
    )
    core._process(Add(pickle.loads(pickle.dumps(request)), True))
    assert held == [is_compiled]
    monkeypatch.setattr(grammars, "NativeGrammar", None)  # it is not compiled again
    if is_compiled:
        llm.engine.input_processor.grammars.get(asked)
