"""An answer with the logprobs of thousands of tokens is made in another thread, and equals one made at once."""

from __future__ import annotations

import json
import math
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Served

from paged_infer.server.openai.json_stream import SLICE, encoded
from paged_infer.server.routes import responses
from paged_infer.server.routes.completions import _CompletionBuilder

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
CONTENT = st.recursive(
    SCALARS, lambda one: st.lists(one, max_size=200) | st.dictionaries(st.text(), one), max_leaves=300
)
BODY = {
    "prompt": "The river was wide and cold. " * 20,
    "max_tokens": 12,
    "n": 2,
    "seed": 3,
    "echo": True,
    "logprobs": 5,
}


@settings(max_examples=30, deadline=None)
@given(CONTENT)
def test_json_in_pieces_is_json(content: Any) -> None:
    assert json.loads("".join(encoded(content))) == content


def test_an_iterator_becomes_a_list() -> None:
    assert json.loads("".join(encoded({"a": iter([]), "b": iter([{"c": iter([1])}, []])}))) == {
        "a": [],
        "b": [{"c": [1]}, []],
    }


def test_no_piece_is_long() -> None:
    """What C code encodes in one go keeps every other thread waiting."""
    rows = [{f" token {i}": -1.25 for i in range(20)} for _ in range(1000)]
    content = {"choices": iter([{"logprobs": {"tokens": ["x"] * 1000, "top_logprobs": rows}}] * 3)}
    pieces = list(encoded(content))
    assert max(map(len, pieces)) < 2 * SLICE * len(json.dumps(rows[0])) and len(pieces) > 3 * 1000 / SLICE


def answer_of(served: Served, stream: bool) -> Any:
    response = served.post("/v1/completions", **BODY, stream=stream)
    assert response.status_code == 200, response.text
    if not stream:
        return response.json()["choices"]
    texts, logprobs = ["", ""], [[], []]
    for line in response.text.split("\n\n")[:-2]:
        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
        texts[choice["index"]] += choice["text"]
        logprobs[choice["index"]] += choice["logprobs"]["token_logprobs"]
    return texts, logprobs


@pytest.mark.parametrize("stream", [False, True])
def test_a_heavy_answer_is_made_in_another_thread_and_is_the_same(
    served, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    threads: list[str] = []
    usual = _CompletionBuilder.choice

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return usual(self, *arguments, **options)

    monkeypatch.setattr(_CompletionBuilder, "choice", watched)
    in_thread = answer_of(served, stream)
    assert all(name.startswith("answers") for name in threads[:2])  # the first pieces of a stream: the prompt's
    monkeypatch.setattr(responses, "HEAVY", math.inf)
    threads.clear()
    assert answer_of(served, stream) == in_thread
    assert not any(name.startswith("answers") for name in threads)
