"""A server that is down, fails, or answers with something else gets one line; nothing is scored by half an answer."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from paged_infer import storyteller
from paged_infer.evaluation.models import OverHttp
from paged_infer.text.tokenizer import Tokenizer

MODELS = {"data": [{"id": "one", "max_model_len": 64}]}


def rows(num_tokens: int) -> dict[str, Any]:
    return {"token_logprobs": [None] + [-1.0] * num_tokens, "top_logprobs": [None] + [{"a": -1.0}] * num_tokens}


class Answers(http.server.BaseHTTPRequestHandler):
    """``models`` and ``completions``: what is answered; bytes are all that is sent."""

    models: Any = MODELS
    completions: Any = None

    def do_GET(self) -> None:
        self.answer(self.models)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(self.completions)

    def answer(self, what: Any) -> None:
        if isinstance(what, bytes):
            self.wfile.write(what)
            return
        text = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer | None:
    return Tokenizer.from_pretrained(storyteller.PATH)


def test_whole_answers_are_scored(url: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answers, "completions", {"choices": [{"index": 0, "text": "a", "logprobs": rows(3)}]})
    model = OverHttp(url, tokenizer)
    assert model.token_scores([[5, 6, 7]]) == [[(-1.0, True), (-1.0, True)]]
    assert model.generate([[5]], 1, []) == ["a"]


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        ({"data": []}, "models: names no model: {'data': "),
        ({}, "names no model"),
        ([1], "names no model"),
        ({"data": [{"id": "one"}]}, "lacks max_model_len"),
        (b"nonsense\r\n\r\n", "nonsense"),
        (b"", "models: "),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "models: "),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", "models: "),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 1\r\n\r\n\xff", "models: 500: "),
    ],
    ids=str,
)
def test_a_server_that_names_no_model_is_refused(
    url: str, tokenizer: Tokenizer, models: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "models", models)
    with pytest.raises(ValueError, match=reason) as caught:
        OverHttp(url, tokenizer)
    assert str(caught.value).startswith(url)


@pytest.mark.parametrize("base_url", ["http://127.0.0.1:x", "http://127.0.0.1:99999", "nowhere", "http://[::1"])
def test_what_is_no_address_is_refused(base_url: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError):
        OverHttp(base_url, tokenizer)


@pytest.mark.parametrize(
    ("completions", "reason"),
    [
        ({}, "has no choices: {}"),
        ({"choices": []}, "0 answers to 1 prompts"),
        ({"choices": [{"text": "a"}]}, "has no index"),
        ({"choices": [{"index": 0, "text": "a", "logprobs": None}]}, "has no logprobs"),
        ({"choices": [{"index": 0, "logprobs": rows(1)}]}, "lacks log-probabilities of its prompt"),
        ({"choices": [{"index": 0, "logprobs": {**rows(3), "top_logprobs": [None] * 4}}]}, "lacks log-probabilities"),
    ],
    ids=str,
)
def test_an_answer_without_its_log_probabilities_is_refused(
    url: str, tokenizer: Tokenizer, completions: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "completions", completions)
    with pytest.raises(ValueError, match=reason):
        OverHttp(url, tokenizer).token_scores([[5, 6, 7]])
