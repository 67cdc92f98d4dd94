"""Requests as real clients send them, recorded once from each: see the section "Clients" of the server's README."""

from __future__ import annotations

import json
from typing import Any

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
    body = {
        "model": "storyteller",
        "messages": MESSAGES,
        "max_tokens": 2,
        "logprobs": True,
        "top_logprobs": 1,
    }
    whole = served.post("/v1/chat/completions", **body, temperature=0, n=1).json()["choices"][0]
    first, *rest = events_of(served.post("/v1/chat/completions", **body, temperature=0, stream=True))
    role = {"role": "assistant", "content": ""}
    assert first["choices"] == [{"index": 0, "delta": role, "logprobs": None, "finish_reason": None}]
    assert all("role" not in event["choices"][0]["delta"] for event in rest)
    logprobs = [one for event in rest for one in event["choices"][0]["logprobs"]["content"]]
    assert logprobs == whole["logprobs"]["content"] and len(logprobs) == 2
