"""Bad input gets one clear error with OpenAI's body, by the right status, and does not affect other requests."""

from __future__ import annotations

import json
from typing import Any

import pytest
from holding import LIMIT_S
from pydantic import ValidationError
from serving import CHAT, PROMPT, error_of, serving

from paged_infer.server.openai.errors import refusal
from paged_infer.server.openai.fields import REFUSED
from paged_infer.server.openai.protocol import ChatCompletionRequest, CompletionRequest, GenerateRequest, SamplingFields
from paged_infer.server.service import Settings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.5),
        ("temperature", 1e400),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("min_tokens", 3),
        ("n", 0),
        ("n", 1000),
        ("logprobs", 21),
        ("logprobs", -1),
        ("stop", ""),
        ("stop", ["x"] * 17),
        ("stop", "x" * 257),
        ("stop_token_ids", [10**6]),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 101}),
        ("truncate_prompt_tokens", 0),
        ("length_penalty", 2.0),
        ("prompt", []),
        ("prompt", ""),
        ("prompt", [[]]),
        ("prompt", [10**6]),
        ("prompt", [-1]),
        ("prompt", [2**70]),
        ("prompt", "x" * 5000),
        ("store", True),
        ("best_of", 2),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", -1),
        ("request_id", ""),
        ("request_id", "x" * 257),
        ("stream_options", {"include_usage": True}),
    ],
)
def test_a_value_out_of_its_range_is_a_400_that_names_it(served, field: str, value: Any) -> None:
    body = json.dumps({**PROMPT, field: value})  # httpx would not send an infinity
    response = served.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    error = error_of(response, 400)
    assert error["param"] in (field, None) and (error["param"] or field in error["message"]), error
    assert error["type"] == "invalid_request_error"


def test_end_tokens_that_leave_nothing_to_draw_are_a_400_and_cost_nobody_else_anything(served) -> None:
    ends = list(range(served.on_engine(lambda engine: engine.decoder.config.vocab_size)))
    error = error_of(served.post("/v1/completions", **PROMPT, stop_token_ids=ends, min_tokens=1), 400)
    assert error["param"] == "min_tokens" and "stop_token_ids" in error["message"]
    assert served.complete(**PROMPT, stop_token_ids=ends)["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("kind", [CompletionRequest, ChatCompletionRequest, GenerateRequest])
def test_a_seed_of_minus_one_is_no_seed(kind) -> None:
    prompt = {"messages": CHAT["messages"]} if kind is ChatCompletionRequest else PROMPT
    assert kind(**prompt, seed=-1).params() == kind(**prompt).params()
    assert kind(**prompt, seed=-2).params().seed == -2


ROUTES: list[tuple[str, Any, type[SamplingFields]]] = [
    ("/v1/completions", PROMPT, CompletionRequest),
    ("/v1/chat/completions", CHAT, ChatCompletionRequest),
    ("/generate", PROMPT, GenerateRequest),
]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_supported_is_refused_by_name_with_the_reason(served, name: str) -> None:
    for path, body, model in ROUTES:
        if name in model.model_fields:
            continue
        refused = model.refused_by_name[name]
        error = error_of(served.post(path, **body, **{name: {"an": "object"}}), 400)
        assert error["param"] == name and error["message"] == f"{name} is not supported: {refused.why}"
        for harmless in (None, *refused.harmless):
            assert served.post(path, **body, **{name: harmless}).status_code in (200, 202)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
def test_an_unknown_field_is_refused_by_name(served, path: str) -> None:
    body = CHAT if "chat" in path else PROMPT
    error = error_of(served.post(path, **body, temprature=0.5), 400)
    assert (error["param"], error["code"]) == ("temprature", "unknown_field")
    assert error["message"] == "unknown field: temprature (did you mean temperature?)"
    error = error_of(served.post(path, **body, max_new_tokens=5, zzz=1), 400)
    assert error["message"] == "unknown field: max_new_tokens (did you mean max_tokens?), zzz"


@pytest.mark.parametrize(
    ("path", "body", "field", "message"),
    [
        ("/v1/chat/completions", CHAT, "prompt", "unknown field: prompt (belongs to /v1/completions or /generate)"),
        ("/generate", PROMPT, "stream", "stream (belongs to /v1/completions or /v1/chat/completions)"),
        ("/v1/completions", PROMPT, "max_model_len", "max_model_len (belongs to paged-infer serve)"),
    ],
)
def test_a_field_of_another_route_is_refused_with_where_it_belongs(
    served, path: str, body: dict[str, Any], field: str, message: str
) -> None:
    assert message in error_of(served.post(path, **body, **{field: 1}), 400)["message"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/v1/completion", "there is no route /v1/completion (did you mean /v1/completions?)"),
        ("/chat/completions", "there is no route /chat/completions (did you mean /v1/chat/completions?)"),
        ("/v1/embeddings", "there is no route /v1/embeddings; /openapi.json lists them"),
    ],
)
def test_an_unknown_route_is_refused_with_the_one_that_may_be_meant(served, path: str, message: str) -> None:
    assert error_of(served.post(path, **PROMPT), 404)["message"] == message


def test_another_method_is_refused_with_the_one_that_the_route_takes(served) -> None:
    error = error_of(served.http.get("/v1/completions"), 405)
    assert error["message"] == "GET /v1/completions: this route takes POST"


def test_the_body_of_a_chat_sent_to_the_wrong_route_is_told_which_is_right(served) -> None:
    error = error_of(served.post("/v1/completions", **CHAT), 422)
    assert error["message"] == "prompt: Field required; unknown field: messages (belongs to /v1/chat/completions)"


@pytest.mark.parametrize(
    ("field", "value", "place"),
    [
        ("stream_options", {"include_usages": True}, "stream_options.include_usages"),
        ("messages", [{"role": "user", "content": "x", "nam": "y"}], "messages.0.nam"),
        ("body", 1, "body"),
    ],
)
def test_an_unknown_field_is_named_with_what_it_is_in(served, field: str, value: Any, place: str) -> None:
    error = error_of(served.post("/v1/chat/completions", **{**CHAT, "stream": True, field: value}), 400)
    assert (error["param"], error["message"]) == (field, f"unknown field: {place}")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (
            {"function_call": {"name": "f"}},
            "messages: function_call is not supported: tools and tool_choice have taken its place",
        ),
        (
            {"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages: content of type image_url is not supported: input and output are text only",
        ),
    ],
)
def test_what_a_message_may_not_hold_is_refused_with_the_reason(served, more: Any, reason: str) -> None:
    message = {"role": "tool", "content": "x", **more}
    error = error_of(served.post("/v1/chat/completions", messages=[message]), 400)
    assert (error["param"], error["message"]) == ("messages", reason)


@pytest.mark.parametrize(("field", "value"), [("stop_token_ids", [1, 10**6]), ("logit_bias", {str(10**6): 1})])
def test_a_token_that_is_not_there_is_named_with_its_field(served, field: str, value: Any) -> None:
    error = error_of(served.post("/v1/completions", **PROMPT, **{field: value}), 400)
    assert error["param"] == field and error["message"].startswith(f"{field}: token id 1000000 is outside")


def test_fields_about_accounts_are_accepted(served) -> None:
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    assert served.complete(**PROMPT, **harmless)["choices"]


def test_a_field_of_the_other_route_is_unknown_here(served) -> None:
    assert error_of(served.post("/v1/chat/completions", **CHAT, echo=True), 400)["param"] == "echo"
    assert error_of(served.post("/v1/completions", **PROMPT, messages=[]), 400)["param"] == "messages"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": 5}, "prompt"),
        ("/v1/completions", {"prompt": ["a", 5]}, "prompt"),
        ("/v1/completions", {**PROMPT, "temperature": "hot"}, "temperature"),
        ("/v1/completions", {**PROMPT, "n": 1.5}, "n"),
        ("/v1/completions", {**PROMPT, "n": True}, "n"),
        ("/v1/completions", {**PROMPT, "best_of": True}, "best_of"),
        ("/v1/completions", {**PROMPT, "stream": "yes"}, "stream"),
        ("/v1/completions", {**PROMPT, "logit_bias": [1]}, "logit_bias"),
        ("/v1/completions", {**PROMPT, "stream_options": {"include_usage": 1}}, "stream_options"),
        ("/v1/chat/completions", {}, "messages"),
        ("/v1/chat/completions", {"messages": "hello"}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "king", "content": "x"}]}, "messages"),
        ("/v1/chat/completions", {**CHAT, "logprobs": 3}, "logprobs"),
        ("/generate", {"prompt": ["a"]}, "prompt"),
        ("/generate", [], None),
        ("/generate", "text", None),
        ("/generate", None, None),
    ],
)
def test_a_wrong_type_is_a_422_that_names_the_field(served, path: str, body: Any, param: str | None) -> None:
    assert error_of(served.http.post(path, json=body), 422)["param"] == param


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**PROMPT, "n": 1.0, "top_k": 5.0, "seed": 3.0, "min_tokens": 1.0, "max_tokens": 2.0}),
        ("/v1/completions", {**PROMPT, "stop_token_ids": [5.0, 6], "logprobs": 2.0, "truncate_prompt_tokens": 2.0}),
        ("/v1/completions", {"prompt": [5.0, 6, 7.0], "max_tokens": 1}),
        ("/v1/completions", {"prompt": [[5, 6.0], [7.0]], "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": CHAT["messages"], "max_completion_tokens": 2.0}),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2.0}),
        ("/generate", {**PROMPT, "max_tokens": 3.0}),
    ],
)
def test_a_number_without_a_fraction_is_an_integer(served, path: str, body: Any) -> None:
    """As clients in languages with one kind of number send it."""
    response = served.http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 202), response.text


@pytest.mark.parametrize("value", [1.5, True, "1", 1e-9, [1.0], float("inf")])
def test_what_is_no_whole_number_is_no_integer(served, value: Any) -> None:
    for body in ({**PROMPT, "n": value}, {**PROMPT, "prompt": [5, value]}, {**PROMPT, "stop_token_ids": [value]}):
        headers = {"Content-Type": "application/json"}
        response = served.http.post("/v1/completions", content=json.dumps(body), headers=headers)
        error_of(response, 422)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"prompt": "x"',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b'{"prompt": "x"} y',
        b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}",
        b'{"prompt": "x", "temperature": NaN}',
    ],
)
def test_malformed_bodies_are_answered_as_such(served, content: bytes) -> None:
    response = served.http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    error_of(response, response.status_code)
    assert response.status_code in (400, 422)


MANY = 100_000  # in a body below the limit of 1 MiB


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [5] * MANY + ["x"]}),
        ("/v1/completions", {"prompt": ["x"] + [5] * MANY}),
        ("/v1/completions", {"prompt": [["x"]] * MANY}),
        ("/v1/completions", {**PROMPT, "stop": [5] * MANY}),
        ("/v1/completions", {**PROMPT, "stop_token_ids": ["x"] * MANY}),
        ("/v1/completions", {**PROMPT, "logit_bias": {str(i): "x" for i in range(MANY // 2)}}),
        ("/v1/completions", {**PROMPT, **{f"f{i}": 0 for i in range(MANY // 2)}}),
        ("/v1/chat/completions", {"messages": [None] * MANY}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [0] * MANY}]}),
        ("/generate", {"prompt": ["x"] * MANY}),
    ],
)
def test_a_hundred_thousand_mistakes_are_told_of_as_quickly_as_one(path: str, body: Any) -> None:
    """Reporting each took seconds and blocked the event loop."""
    model = {"/generate": GenerateRequest, "/v1/completions": CompletionRequest}.get(path, ChatCompletionRequest)
    with pytest.raises(ValidationError) as refused:
        model.model_validate(body)
    problems: list[Any] = list(refused.value.errors())
    assert len(problems) <= 8
    assert len(refusal(problems).message) < 200


@pytest.mark.parametrize("order", [1, -1])
def test_among_many_fields_that_change_nothing_an_unknown_one_is_found(served, order: int) -> None:
    fields = {**dict.fromkeys(REFUSED), **dict.fromkeys(GenerateRequest.model_fields), "temprature": 0.5}
    body = {name: fields[name] for name in list(fields)[::order]}
    assert error_of(served.post("/generate", **{**body, "prompt": "x"}), 400)["param"] == "temprature"


def test_a_conversation_that_makes_no_sense_is_a_400(served) -> None:
    assert error_of(served.post("/v1/chat/completions", messages=[]), 400)["param"] == "messages"
    error = error_of(served.post("/v1/chat/completions", **CHAT, max_completion_tokens=3), 400)
    assert error["param"] == "max_completion_tokens"
    assert error_of(served.post("/v1/chat/completions", **CHAT, top_logprobs=2), 400)["param"] == "top_logprobs"
    none = {"messages": CHAT["messages"], "max_completion_tokens": 0}
    error = error_of(served.post("/v1/chat/completions", **none), 400)
    assert error["param"] == "max_completion_tokens" and error["message"].startswith("max_completion_tokens=0")
    long = [{"role": "user", "content": "The river was wide. " * 100}]
    error = error_of(served.post("/v1/chat/completions", messages=long), 400)
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 0.5), ("logprobs", 1), ("stop", "x"), ("logit_bias", {"3": 1})]
)
def test_a_beam_search_refuses_what_it_does_not_know(served, field: str, value: Any) -> None:
    error = error_of(served.post("/v1/completions", **PROMPT, use_beam_search=True, **{field: value}), 400)
    assert error["param"] == field


@pytest.mark.parametrize("text", ["Zoë, 東京 и мы: 🦊", "nul \0 byte", "\u202eback", "e\u0301\u200d", "\r\n\t"])
@pytest.mark.parametrize("stream", [False, True])
def test_any_text_is_a_prompt(served, storyteller, text: str, stream: bool) -> None:
    answer = served.complete(prompt=text, max_tokens=4, temperature=0, echo=True)
    assert answer["choices"][0]["text"].startswith(text)
    assert answer["usage"]["prompt_tokens"] == len(storyteller.tokenizer.encode(text))


@pytest.mark.parametrize(
    ("path", "content", "param"),
    [
        ("/v1/completions", rb'{"prompt": "a \ud83d b"}', "prompt"),
        ("/v1/chat/completions", rb'{"messages": [{"role": "user", "content": "a \ud83d b"}]}', "messages"),
    ],
)
def test_half_a_surrogate_pair_is_no_text(served, path: str, content: bytes, param: str) -> None:
    response = served.http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert error_of(response, 400)["param"] == param


def test_any_string_is_a_salt(served) -> None:
    content = json.dumps({**PROMPT, "cache_salt": "half a pair: \ud83d"})
    headers = {"Content-Type": "application/json"}
    assert served.http.post("/v1/completions", content=content, headers=headers).status_code == 200


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_body_that_is_not_announced_as_json_is_told_how(served, content_type: str | None) -> None:
    """As curl sends it without an -H."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = served.http.post("/v1/completions", content=json.dumps(PROMPT), headers=headers)
    assert "Content-Type: application/json" in error_of(response, 422)["message"]


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, "function_call"),
        ({"role": "assistant", "content": None, "refusal": "no"}, "refusal"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}, "image_url"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "input_audio"),
    ],
)
def test_what_a_message_may_not_hold_is_refused_by_name(served, message: Any, named: str) -> None:
    error = error_of(served.post("/v1/chat/completions", messages=[message]), 400)
    assert named in error["message"] and "not supported" in error["message"] and error["param"] == "messages"


def test_a_path_or_method_that_is_not_there_has_the_same_body(served) -> None:
    error_of(served.http.get("/v2/completions"), 404)
    error_of(served.http.get("/v1/completions"), 405)


def test_a_key_is_asked_for_where_one_is_set() -> None:
    with serving(Settings(api_key="open sesame"), num_blocks=32) as locked:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic open sesame"}):
            response = locked.http.post("/v1/completions", json=PROMPT, headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            error_of(locked.http.get("/v1/models", headers=headers), 401)
            error_of(locked.http.get("/result/x", headers=headers), 401)
        assert locked.http.get("/health").status_code == locked.http.get("/metrics").status_code == 200
        assert locked.openai().completions.create(model="storyteller", prompt="x", max_tokens=1).choices


def test_the_model_answers_to_the_names_that_it_was_given() -> None:
    with serving(Settings(served_model_names=("tales", "org/tales")), num_blocks=32) as named:
        assert [m.id for m in named.openai().models.list()] == ["tales", "org/tales"]
        assert named.openai().models.retrieve("org/tales").id == "org/tales"
        assert named.complete(**PROMPT)["model"] == "tales"
        assert named.complete(**PROMPT, model="org/tales")["model"] == "org/tales"
        error_of(named.post("/v1/completions", **PROMPT, model="storyteller"), 404)


def test_an_engine_that_fails_tells_everybody_and_the_server_ends() -> None:
    with serving(max_num_seqs=4, num_blocks=64) as broken:
        runner = broken.engine._core.engine.executor.runner
        launch, count = runner.launch, 0

        def fail(step: Any) -> Any:
            nonlocal count
            count += 1
            if count == 4:
                raise ArithmeticError("the device fell off")
            return launch(step)

        runner.launch = fail  # type: ignore[method-assign]
        with broken.http.stream("POST", "/v1/completions", json={**PROMPT, "max_tokens": 99, "stream": True}) as r:
            events = [line.removeprefix("data: ") for line in r.iter_lines() if line]
        assert events[-1] == "[DONE]"
        assert "the device fell off" in json.loads(events[-2])["error"]["message"]
        broken.thread.join(LIMIT_S)
        assert not broken.thread.is_alive()


def test_a_failed_engine_is_not_healthy() -> None:
    with serving(num_blocks=32) as broken:
        broken.server.on_tick = lambda counter: _never()  # type: ignore[method-assign]
        broken.engine._core.engine.executor.runner.launch = None  # type: ignore[assignment]
        assert broken.http.get("/health").status_code == 200
        assert error_of(broken.post("/v1/completions", **PROMPT), 500)["code"] == "engine_dead"
        assert error_of(broken.http.get("/health"), 503)["code"] == "engine_dead"
        assert error_of(broken.post("/v1/completions", **PROMPT), 500)["code"] == "engine_dead"
        del broken.server.on_tick


async def _never() -> bool:
    return False
