"""Requests as real clients send them, recorded once from each: see the section "Clients" of the server's README."""

from __future__ import annotations

import json
from typing import Any

import pytest

from paged_infer import SamplingParams

MESSAGES = [
    {"role": "system", "content": "You tell stories."},
    {"role": "user", "content": "Tell me a story about Mia and a red key."},
]
TOKENS = [378, 699, 260, 660, 12, 299, 260, 610, 601]  # "Once upon a time, in a little house"


def events_of(response: Any) -> list[dict[str, Any]]:
    """The events of a stream without the closing [DONE]."""
    *events, done = (line.removeprefix("data: ") for line in response.text.split("\n\n") if line)
    assert done == "[DONE]"
    return [json.loads(one) for one in events]


def test_the_role_comes_before_the_first_token_for_openais_node_client(served) -> None:
    """Its ``chat.completions.stream`` takes the logprobs of an answer's first event twice."""
    body = {"model": "storyteller", "messages": MESSAGES, "max_tokens": 2, "logprobs": True, "top_logprobs": 1}
    whole = served.post("/v1/chat/completions", **body, temperature=0, n=1).json()["choices"][0]
    first, *rest = events_of(served.post("/v1/chat/completions", **body, temperature=0, stream=True))
    role = {"role": "assistant", "content": ""}
    assert first["choices"] == [{"index": 0, "delta": role, "logprobs": None, "finish_reason": None}]
    assert all("role" not in event["choices"][0]["delta"] for event in rest)
    logprobs = [one for event in rest for one in event["choices"][0]["logprobs"]["content"]]
    assert logprobs == whole["logprobs"]["content"] and len(logprobs) == 2


USAGE_LAST = {"stream": True, "stream_options": {"include_usage": True}}
USAGE_IN_ALL = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
LEGACY = {"frequency_penalty": 0, "presence_penalty": 0, "top_p": 1, "n": 1, "logprobs": None, "seed": None}
PLAIN = "y fair hour Laertes time be thine"
IN_PARTS = [{"role": "user", "content": [{"type": "text", "text": PLAIN}]}]
SENT: dict[str, tuple[str, dict[str, Any]]] = {
    "langchain ChatOpenAI": (
        "chat/completions",
        {"stream": False, "messages": MESSAGES, "max_completion_tokens": 5, "stop": ["\nQ:"], "temperature": 0.0},
    ),
    "langchain OpenAI": (
        "completions",
        {"prompt": ["Once upon a time"], **LEGACY, "max_tokens": 5, "temperature": 0.0},
    ),
    "litellm": (
        "completions",
        {"prompt": "Once", "logprobs": 1, "max_tokens": 5, "n": 1, "temperature": 0, "best_of": 1},
    ),
    "lm-eval local-chat-completions": (
        "chat/completions",
        {"messages": MESSAGES, "max_tokens": 5, "temperature": 0, "stop": ["\n", "Q:"], "seed": 1234},
    ),
    "guidellm /v1/completions": ("completions", {"prompt": PLAIN, "max_tokens": 5, "ignore_eos": True, **USAGE_IN_ALL}),
    "guidellm /v1/chat/completions": (
        "chat/completions",
        {"messages": IN_PARTS, "max_completion_tokens": 5, "ignore_eos": True, **USAGE_IN_ALL},
    ),
    "aiperf completions": (
        "completions",
        {"prompt": PLAIN, "stream": True, "max_tokens": 5, "ignore_eos": True, **USAGE_LAST},
    ),
    "aiperf chat": (
        "chat/completions",
        {"messages": MESSAGES, "max_completion_tokens": 5, "ignore_eos": True, "min_tokens": 5, **USAGE_LAST},
    ),
    "vllm bench serve openai": (
        "completions",
        {"prompt": PLAIN, "repetition_penalty": 1.0, "max_tokens": 5, "logprobs": None, "ignore_eos": True}
        | USAGE_LAST,
    ),
    "vllm bench serve openai-chat": (
        "chat/completions",
        {"messages": IN_PARTS, "max_completion_tokens": 5, "ignore_eos": True, "temperature": 0.0, **USAGE_LAST},
    ),
}


@pytest.mark.parametrize("client", SENT)
def test_what_a_client_sends_is_answered_in_full(served, client: str) -> None:
    path, body = SENT[client]
    response = served.post(f"/v1/{path}", model="storyteller", **body)
    assert response.status_code == 200, response.text
    last = events_of(response)[-1] if body.get("stream") else response.json()
    assert last["usage"]["completion_tokens"] == 5
    assert (last["choices"] == []) == bool(body.get("stream"))


def test_lm_eval_gets_the_probability_of_each_token_of_its_prompts(served, storyteller) -> None:
    prompts = [TOKENS, TOKENS[:4]]
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = served.complete(model="storyteller", **body)["choices"]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    for choice, output in zip(choices, storyteller.generate(prompts, params, use_tqdm=False), strict=True):
        rows = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        expected = [row[token_id].logprob for token_id, row in rows]
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][1:-1] == pytest.approx(expected)  # the last is the drawn token's
        assert all(
            token in top for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True)
        )
