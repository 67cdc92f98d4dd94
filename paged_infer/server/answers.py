"""From the engine's outputs to OpenAI's JSON, whole or in pieces."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from collections.abc import Sequence as ReadOnlyList
from typing import Any

from paged_infer.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs

DONE = b"data: [DONE]\n\n"
LOWEST = -9999.0  # JSON has no infinity
HEAVY = 128  # of weight: a few milliseconds, where every token has 20 rivals
FILLED = 128
SLICE = 64  # elements of a list that are encoded in one go


def event(content: dict[str, Any], *, in_pieces: bool = False, obfuscate: bool = False) -> bytes:
    """One server-sent event; ``obfuscate`` fills it up to a multiple of ``FILLED`` bytes."""
    text = "".join(encoded(content)) if in_pieces else json.dumps(content, separators=(",", ":"))
    if obfuscate:
        text = text[:-1] + ',"obfuscation":"'
        text += "".join(random.choices(string.ascii_letters, k=-(len(text) + 2) % FILLED)) + '"}'
    return b"data: " + text.encode() + b"\n\n"


def encoded(value: Any) -> Iterator[str]:
    """JSON, piece by piece. Between two of them, another thread has its turn; ``json.dumps`` lets nobody in meanwhile.

    An iterator becomes a list. Lists of scalars or of small things are cut into slices; big things have to be in dicts.
    """
    if isinstance(value, dict):
        begin = "{"
        for name, inner in value.items():
            yield f"{begin}{json.dumps(name)}:"
            yield from encoded(inner)
            begin = ","
        yield "}" if value else "{}"
    elif isinstance(value, Iterator):
        begin = "["
        for inner in value:
            yield begin
            yield from encoded(inner)
            begin = ","
        yield "]" if begin == "," else "[]"
    elif isinstance(value, list):
        slices = (value[i : i + SLICE] for i in range(0, len(value), SLICE))
        yield "["
        for index, part in enumerate(slices):
            yield ("," if index else "") + json.dumps(part, separators=(",", ":"))[1:-1]
        yield "]"
    else:
        yield json.dumps(value)


def weight(output: RequestOutput) -> int:
    """How many tokens' logprobs there are to tell, and answers: what it costs to put it into JSON."""
    rows = sum(len(one.logprobs or ()) for one in output.outputs)
    return rows + len(output.outputs) * (1 + len(output.prompt_logprobs or ()))


def usage(outputs: ReadOnlyList[RequestOutput], num_output_tokens: int | None = None) -> dict[str, Any]:
    """Tokens read and written; a prompt counts once, however many answers it has."""
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    if num_output_tokens is None:
        num_output_tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(o.metrics.num_cached_tokens for o in outputs)},
    }


class Growth:
    """What is new in one answer since it was looked at last."""

    __slots__ = ("_num_characters", "_num_ids", "_num_tokens", "_offset", "was_sent")

    def __init__(self) -> None:
        self._num_characters = self._num_ids = self._num_tokens = self._offset = 0
        self.was_sent = False  # whether a piece of it has been sent

    def text(self, one: CompletionOutput) -> str:
        piece = one.text[self._num_characters :]
        self._num_characters += len(piece)
        return piece

    def token_ids(self, one: CompletionOutput) -> list[int]:
        start, self._num_ids = self._num_ids, len(one.token_ids)
        return one.token_ids[start:]

    def rows(self, one: CompletionOutput) -> tuple[list[int], list[TokenLogprobs]]:
        """New tokens and their logprobs; nothing where none were asked for."""
        if one.logprobs is None:
            return [], []
        start, self._num_tokens = self._num_tokens, len(one.token_ids)
        return one.token_ids[start:], one.logprobs[start:]

    def completion_logprobs(
        self, token_ids: ReadOnlyList[int], rows: ReadOnlyList[TokenLogprobs | None], texts: ReadOnlyList[str]
    ) -> dict[str, Any]:
        """Of ``/v1/completions``; offsets go on where the last ones ended. No row, as for the first token: null."""
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        chosen = [None if row is None else row[i] for i, row in zip(token_ids, rows, strict=True)]
        return {
            "tokens": list(texts),
            "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in chosen],
            "top_logprobs": [None if row is None else _by_text(row) for row in rows],
            "text_offset": offsets,
        }


def chat_logprobs(
    token_ids: ReadOnlyList[int], rows: ReadOnlyList[TokenLogprobs], num_top: int
) -> dict[str, Any]:
    """Of ``/v1/chat/completions``: each token with the ``num_top`` most probable ones in its place."""
    content = []
    for token_id, row in zip(token_ids, rows, strict=True):
        top = sorted((entry for entry in row.values() if entry.rank <= num_top), key=lambda entry: entry.rank)
        content.append({**_described(row[token_id]), "top_logprobs": [_described(entry) for entry in top]})
    return {"content": content, "refusal": None}


def texts_of(token_ids: ReadOnlyList[int], rows: ReadOnlyList[TokenLogprobs]) -> list[str]:
    return [row[token_id].decoded_token or "" for token_id, row in zip(token_ids, rows, strict=True)]


def _described(entry: Logprob) -> dict[str, Any]:
    text = entry.decoded_token or ""
    return {"token": text, "logprob": _finite(entry.logprob), "bytes": list(text.encode())}


def _by_text(row: TokenLogprobs) -> dict[str, float]:
    """Tokens of the same text (pieces of a character, say) share a place: the most probable one has it."""
    named: dict[str, float] = {}
    for entry in sorted(row.values(), key=lambda entry: entry.rank):
        named.setdefault(entry.decoded_token or "", _finite(entry.logprob))
    return named


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def described_rows(rows: ReadOnlyList[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: for each token but the first, token id -> logprob, rank and text."""
    described: list[dict[str, Any] | None] = []
    for row in rows:
        entries = () if row is None else row.items()
        about = {str(i): {**entry._asdict(), "logprob": _finite(entry.logprob)} for i, entry in entries}
        described.append(about or None)
    return described


def tokens_by_id(token_ids: ReadOnlyList[int], rows: ReadOnlyList[TokenLogprobs | None]) -> dict[str, Any]:
    """The part of ``completion_logprobs`` that names tokens, as vLLM's ``return_tokens_as_token_ids`` has it."""
    named = [
        None if row is None else {_id_name(i): _finite(entry.logprob) for i, entry in row.items()}
        for row in rows
    ]
    return {"tokens": [_id_name(i) for i in token_ids], "top_logprobs": named}


def named_by_id(rows: ReadOnlyList[TokenLogprobs]) -> list[TokenLogprobs]:
    """The rows of ``chat_logprobs`` with such a name as each token's text."""
    return [{i: entry._replace(decoded_token=_id_name(i)) for i, entry in row.items()} for row in rows]


def _id_name(token_id: int) -> str:
    return f"token_id:{token_id}"
