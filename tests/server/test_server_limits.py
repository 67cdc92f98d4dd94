"""Limits of bodies, heads, queues and logprobs: the error names the limit, and other requests are not affected."""

from __future__ import annotations

import json
import select
import socket
from contextlib import ExitStack

import pytest
from holding import LIMIT_S, until
from serving import CHAT, PROMPT, error_of, serving

from paged_infer.async_llm import QueueFullError
from paged_infer.server.service import Settings


def test_bodies_over_the_limit_are_a_413_however_they_come() -> None:
    with serving(Settings(max_body_bytes=1000), num_blocks=32) as small:
        assert small.complete(prompt="x" * 20, max_tokens=1)
        error_of(small.post("/v1/completions", prompt="x" * 1000), 413)
        pieces = (b" " * 100 for _ in range(20))  # chunked: no Content-Length
        error_of(small.http.post("/v1/completions", content=pieces, headers={"Content-Type": "application/json"}), 413)
        with socket.create_connection(("127.0.0.1", small.port), LIMIT_S) as raw:  # a promise alone is enough
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 413")


def head_of(num_bytes: int) -> bytes:
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {num_bytes}\r\n\r\n".encode()


def test_half_a_body_is_waited_for_only_so_long() -> None:
    with serving(Settings(receive_timeout_s=0.3), num_blocks=64) as impatient:
        with socket.create_connection(("127.0.0.1", impatient.port), timeout=LIMIT_S) as raw:
            raw.sendall(head_of(100) + b'{"prompt": ')
            head, _, body = raw.makefile("rb").read().partition(b"\r\n\r\n")  # to the end: it hangs up, too
        assert head.startswith(b"HTTP/1.1 408")
        error = json.loads(body)["error"]
        assert error["code"] == "request_timeout" and "receive_timeout_s=0.3" in error["message"]


def test_an_answer_may_take_longer_than_a_body() -> None:
    with serving(num_blocks=64) as served, served.held() as steps:
        content = json.dumps({**PROMPT, "ignore_eos": True, "max_tokens": 30}).encode()
        with socket.create_connection(("127.0.0.1", served.port), timeout=LIMIT_S) as raw:
            raw.sendall(head_of(len(content)) + content[:20])
            service = served.server.service
            until(lambda: service.receiving)
            raw.sendall(content[20:])
            served.until_queued(waiting=1)
            assert not service.receiving, "nothing is left that could run out"
            steps.allow()
            assert raw.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_half_a_head_is_waited_for_only_so_long(http: str) -> None:
    pytest.importorskip(http)
    patient = Settings(receive_timeout_s=100 * LIMIT_S)
    with serving(patient, http=http, num_blocks=32) as served, served.held() as steps, ExitStack() as stack:
        address = ("127.0.0.1", served.port)
        silent, slow, second, busy = (stack.enter_context(socket.create_connection(address, LIMIT_S)) for _ in range(4))
        slow.sendall(b"POST /v1/comple")
        second.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_until(second, b"ok")
        second.sendall(b"GET /he")
        content = json.dumps(PROMPT).encode()
        busy.sendall(head_of(len(content)) + content)
        served.until_queued(waiting=1)
        until(lambda: len(served.server.server_state.connections) == 4)

        def hang_up(later_s: float) -> None:
            served.in_loop(lambda: served.server._close_idle_connections(served.loop.time() + later_s))

        hang_up(0.0)
        hang_up(patient.receive_timeout_s - LIMIT_S)
        assert not [one for one in (silent, slow, second) if can_be_read(one)]
        hang_up(patient.receive_timeout_s + LIMIT_S)
        assert [one.recv(1000) for one in (silent, slow, second)] == [b""] * 3  # it has hung up
        steps.allow()
        assert busy.recv(100).startswith(b"HTTP/1.1 200")


def test_who_says_nothing_is_hung_up_on() -> None:
    with (
        serving(Settings(receive_timeout_s=0.3), num_blocks=32) as impatient,
        socket.create_connection(("127.0.0.1", impatient.port), LIMIT_S) as silent,
    ):
        assert silent.recv(1000) == b""


def read_until(connection: socket.socket, end: bytes) -> bytes:
    received = b""
    while end not in received:
        piece = connection.recv(1000)
        assert piece, received
        received += piece
    return received


def can_be_read(connection: socket.socket) -> bool:
    return bool(select.select([connection], [], [], 0)[0])


def test_logprobs_that_would_fill_the_memory_are_refused() -> None:
    with serving(Settings(max_num_logprobs=1000), num_blocks=64, max_model_len=128) as served:
        least = {"max_tokens": 10, "logprobs": 4, "temperature": 1.0}
        assert served.complete(prompt=[[5] * 10] * 2, n=5, **least, echo=True)  # 2 x 5 x 20 tokens: 1,000
        for more in ({"n": 6}, {"logprobs": 5}, {"max_tokens": 11}, {"prompt": [[5] * 10] * 3}):
            body = {"prompt": [[5] * 10] * 2, "n": 5, **least, "echo": True, **more}
            error = error_of(served.post("/v1/completions", **body), 400)
            assert error["param"] == "logprobs" and "max_num_logprobs=1000" in error["message"]
        chat = {**CHAT, "logprobs": True, "top_logprobs": 9}
        assert served.post("/v1/chat/completions", **chat).status_code == 200
        endless = {key: value for key, value in chat.items() if key != "max_tokens"}  # to the end of the context
        error_of(served.post("/v1/chat/completions", **endless), 400)


def test_more_samples_or_beams_than_max_n_are_refused() -> None:
    with serving(Settings(max_n=3), num_blocks=64, max_num_seqs=2) as served:
        assert len(served.complete(**PROMPT, n=3)["choices"]) == 3  # more than run at once
        for more in ({}, {"use_beam_search": True}):
            error = error_of(served.post("/v1/completions", **PROMPT, n=4, **more), 400)
            assert error["param"] == "n" and error["message"] == "n=4: must be at most max_n=3"
        assert error_of(served.post("/v1/chat/completions", **CHAT, n=4), 400)["param"] == "n"
        assert error_of(served.post("/generate", **PROMPT, n=4), 400)["param"] == "n"


def test_more_or_longer_stop_strings_than_the_limit_are_refused() -> None:
    with serving(num_blocks=64) as served:
        assert served.complete(**PROMPT, stop=["x" * 256] * 16)
        for stop, found in ((["x"] * 17, "17 strings"), ("x" * 257, "of 257 characters")):
            error = error_of(served.post("/v1/completions", **PROMPT, stop=stop), 400)
            assert error["param"] == "stop" and found in error["message"]
            assert "at most 16 strings of at most 256 characters" in error["message"]


def test_a_stream_of_more_samples_than_run_at_once_is_that_of_the_whole_answer() -> None:
    with serving(num_blocks=64, max_num_seqs=4) as served:
        body = {**PROMPT, "max_tokens": 6, "n": 7, "seed": 5, "temperature": 1.0}
        whole = [choice["text"] for choice in served.complete(**body)["choices"]]
        texts, ends = [""] * 7, [""] * 7
        for event in served.post("/v1/completions", **body, stream=True).text.split("\n\n"):
            if event.startswith("data: {"):
                (choice,) = json.loads(event.removeprefix("data: "))["choices"]
                texts[choice["index"]] += choice["text"]
                ends[choice["index"]] += choice["finish_reason"] or ""
        assert texts == whole and set(ends) == {"length"}


def test_a_full_queue_is_a_429_that_says_when_to_come_again() -> None:
    with serving(max_num_seqs=1, max_num_waiting=1, num_blocks=64) as busy:
        with busy.held() as steps:
            running = busy.begin(**PROMPT)
            busy.until_queued(waiting=1)
            steps.run(1)
            waiting = busy.begin(**PROMPT)  # and fills the queue
            busy.until_queued(running=1, waiting=1)
            response = busy.post("/v1/completions", **PROMPT)
            assert error_of(response, 429)["type"] == "rate_limit_error"
            assert int(response.headers["retry-after"]) >= 1
        assert [one.result(LIMIT_S).status_code for one in (running, waiting)] == [200, 200]
        assert busy.complete(**PROMPT)
        assert error_of(busy.post("/v1/completions", prompt=["a", "b"]), 400)["param"] == "prompt"


def test_too_much_text_to_tokenize_is_a_429_and_what_cannot_fit_a_400() -> None:
    with serving(num_blocks=64) as served:

        def full(*_: object) -> None:
            raise QueueFullError("9 characters wait to be tokenized")

        served.engine._tokenizing.submit = full  # type: ignore[method-assign, assignment]
        for num_characters, status in ((5000, 429), (1_000_000, 400)):  # the queue does not see the second
            text = "a" * num_characters
            for path, prompt in (
                ("/v1/completions", {"prompt": text}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
                ("/generate", {"prompt": text}),
            ):
                response = served.post(path, **prompt, max_tokens=2)
                error = error_of(response, status)
                if status == 429:
                    assert error["type"] == "rate_limit_error" and "retry-after" in response.headers
                else:
                    assert error["code"] == "context_length_exceeded" and error["param"] == next(iter(prompt))


def test_what_is_too_much_for_an_empty_queue_is_no_429() -> None:
    """It would be asked for again and again, in vain."""
    with serving(max_num_seqs=8, max_num_waiting=8, num_blocks=64) as served:
        error = error_of(served.post("/v1/completions", **PROMPT | {"prompt": ["a", "b", "c"]}, n=4), 400)
        assert error["param"] == "prompt" and "max_num_waiting=8" in error["message"]
        assert served.complete(**PROMPT | {"prompt": ["a", "b"]}, n=7)
