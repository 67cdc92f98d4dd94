"""A request that fails in the engine gets its own error, whole, streamed or fetched later; other requests go on."""

from __future__ import annotations

import json
import logging
import threading
from typing import Any

import pytest
from serving import Served, error_of, poll, serving
from test_server_metrics import samples

MESSAGE = "the logits of position 7 are not finite"
FATE = {"seed": 666, "max_tokens": 20, "ignore_eos": True}  # the seed marks the request that fails
BAD = {"prompt": "Once upon a time", **FATE}
GOOD = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0, "ignore_eos": True}


def fail_at_step(served: Served, num_tokens: int) -> None:
    """As the engine does where logits cannot be sampled: all samples of the request end with an error."""
    engine = served.engine._core.engine
    step = engine.step

    def failing(*arguments: Any) -> Any:
        report = step(*arguments)
        for live in list(engine.requests.by_id.values()):
            first = live.request.sequences[0]
            if first.params.seed == BAD["seed"] and first.num_output_tokens >= num_tokens:
                failed = engine.abort(live.request.request_id)
                for one in failed.outputs:
                    one.finish_reason, one.error = "error", MESSAGE
                others = [one for one in report.outputs if one.request_id != failed.request_id]
                report.outputs = [*others, failed]
        return report

    engine.step = failing  # type: ignore[method-assign]


@pytest.fixture
def failing() -> Any:
    with serving(max_num_seqs=8, num_blocks=64) as served:
        fail_at_step(served, 3)
        yield served


def check(error: dict[str, Any]) -> None:
    assert (error["message"], error["code"], error["type"]) == (MESSAGE, "request_failed", "server_error")


@pytest.mark.parametrize("more", [{}, {"n": 3}, {"logprobs": 2, "echo": True}])
def test_a_failed_request_is_a_500_with_its_message_and_one_line_in_the_log(
    failing: Served, more: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In place of uvicorn's, which does not propagate.
    monkeypatch.setattr("paged_infer.server.service.logger", logging.getLogger("of this test"))
    check(error_of(failing.post("/v1/completions", **BAD, **more), 500))
    assert [record.message for record in caplog.records].count(MESSAGE) == 1
    assert failing.http.get("/health").status_code == 200
    assert failing.complete(**GOOD)["usage"]["completion_tokens"] == 40


def test_a_failed_chat_is_a_500_with_its_message(failing: Served) -> None:
    messages = [{"role": "user", "content": "Where is the key?"}]
    check(error_of(failing.post("/v1/chat/completions", messages=messages, **FATE), 500))


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_that_fails_ends_with_an_error_and_done(failing: Served, usage: bool) -> None:
    body = {**BAD, "stream": True, "stream_options": {"include_usage": usage}}
    with failing.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    check(json.loads(events[-2])["error"])
    assert all("error" not in json.loads(event) for event in events[:-2])


def test_a_job_that_fails_is_told_by_its_result(failing: Served) -> None:
    job = failing.post("/generate", **BAD).json()["id"]
    result = poll(failing, job)
    assert result["status"] == "failed" and "outputs" not in result
    check(result["error"])


def test_the_neighbours_of_a_failed_request_say_what_they_say_alone(failing: Served) -> None:
    alone = failing.complete(**GOOD)["choices"][0]["text"]
    received: list[str] = []
    thread = threading.Thread(target=lambda: received.append(failing.complete(**GOOD)["choices"][0]["text"]))
    thread.start()
    for _ in range(5):
        error_of(failing.post("/v1/completions", **BAD), 500)
    thread.join(60)
    assert received == [alone]


def test_failed_answers_are_counted_as_errors(failing: Served) -> None:
    assert samples(failing)["request_success_totalerror"] == 0
    error_of(failing.post("/v1/completions", **BAD, n=2), 500)
    assert samples(failing)["request_success_totalerror"] == 2


@pytest.mark.parametrize("asked", [{"stop": "zz"}, {"stop": "zz", "stream": True}, {"logprobs": 1}, {}])
def test_tokens_that_have_no_text_are_an_error_of_their_own_request(asked, monkeypatch) -> None:
    """Some tokenizers raise for an id that their vocabulary has not. The prompt's text is needed first, if at all."""
    with serving(max_num_seqs=8, num_blocks=64) as served:
        hf_tokenizer = served.engine.tokenizer._hf
        decode, fatal = hf_tokenizer.decode, 7

        def decode_or_raise(token_ids: list[int], **options: Any) -> str:
            if fatal in token_ids:
                raise IndexError("piece id is out of range")
            return decode(token_ids, **options)

        monkeypatch.setattr(hf_tokenizer, "decode", decode_or_raise)
        response = served.post("/v1/completions", prompt=[5, fatal], max_tokens=2, **asked)
        if asked.get("stream"):
            assert response.status_code == 200 and "the prompt could not be decoded" in response.text
            assert response.text.endswith("data: [DONE]\n\n")
        else:
            expected = (400, "the prompt could not") if "stop" in asked else (500, "tokens could not be decoded")
            assert expected[1] in error_of(response, expected[0])["message"]
        assert served.http.get("/health").status_code == 200
