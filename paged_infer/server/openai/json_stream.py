"""Convert the engine's outputs to OpenAI's JSON, whole or in pieces."""

from __future__ import annotations

import codecs
import json
import random
import string
from collections.abc import Iterator
from collections.abc import Sequence as ReadOnlyList
from typing import Any

from paged_infer.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from paged_infer.text.tokenizer import Tokenizer
from paged_infer.text.tool_parsers import ToolCallDelta

DONE = b"data: [DONE]\n\n"
LOWEST = -9999.0  # JSON has no infinity
HEAVY = 128  # weight from which JSON is made in another thread: some milliseconds with 20 logprobs per token
FILLED = 128  # bytes
SLICE = 64  # elements of a list per call of json.dumps


def event(content: dict[str, Any], *, in_pieces: bool = False, obfuscate: bool = False) -> bytes:
    """One server-sent event; ``obfuscate`` pads its JSON to a multiple of ``FILLED`` bytes."""
    text = "".join(encoded(content)) if in_pieces else json.dumps(content, separators=(",", ":"))
    if obfuscate:
        text = text[:-1] + ',"obfuscation":"'
        text += "".join(random.choices(string.ascii_letters, k=-(len(text) + 2) % FILLED)) + '"}'
    return b"data: " + text.encode() + b"\n\n"


def encoded(value: Any) -> Iterator[str]:
    """JSON in pieces, between which other threads can run; one ``json.dumps`` of it all would hold the GIL throughout.

    An iterator becomes a list. Lists are encoded in slices, so their elements must be small; put large ones in dicts.
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
    """The cost of converting an output to JSON: the number of its answers and of tokens with logprobs."""
    rows = sum(len(one.logprobs or ()) for one in output.outputs)
    return rows + len(output.outputs) * (1 + len(output.prompt_logprobs or ()))


def usage(outputs: ReadOnlyList[RequestOutput], num_output_tokens: int | None = None) -> dict[str, Any]:
    """OpenAI's ``usage``. A prompt counts once, however many answers it has."""
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    if num_output_tokens is None:
        num_output_tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    counts = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(o.metrics.num_cached_tokens for o in outputs)},
    }
    reasoning = [one.num_reasoning_tokens for output in outputs for one in output.outputs]
    if any(number is not None for number in reasoning):
        counts["completion_tokens_details"] = {"reasoning_tokens": sum(number or 0 for number in reasoning)}
    return counts


class DeltaTracker:
    """The new part of one answer since the last call, for the chunks of a stream."""

    def __init__(self) -> None:
        self._num_characters = self._num_ids = self._num_tokens = self._offset = 0
        self._has_begun = False  # whether a token with text has been seen
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.was_sent = self.has_ended = False  # whether its first and its last chunk have been sent

    def text(self, one: CompletionOutput) -> str:
        piece = one.text[self._num_characters :]
        self._num_characters += len(piece)
        return piece

    def token_ids(self, one: CompletionOutput) -> list[int]:
        start, self._num_ids = self._num_ids, len(one.token_ids)
        return one.token_ids[start:]

    def rows(self, one: CompletionOutput) -> tuple[list[int], list[TokenLogprobs]]:
        """New tokens and their logprobs; empty if none were requested."""
        if one.logprobs is None:
            return [], []
        start, self._num_tokens = self._num_tokens, len(one.token_ids)
        return one.token_ids[start:], one.logprobs[start:]

    def completion_logprobs(
        self,
        token_ids: ReadOnlyList[int],
        rows: ReadOnlyList[TokenLogprobs | None],
        tokenizer: Tokenizer | None,
        *,
        continues_text: bool,
        by_id: bool,
    ) -> dict[str, Any]:
        """The ``logprobs`` of ``/v1/completions``. A token without a row, such as the prompt's first, gets null.

        A token has the same name in ``tokens`` and in ``top_logprobs``, see ``token_names``; ``by_id``: vLLM's form for
        all. Its offset is the position of its first character in the returned text. ``continues_text``: these tokens
        continue a prompt that is not returned.
        """
        self._has_begun |= continues_text
        namer = None if by_id else tokenizer
        names = [token_names([token_id, *(row or ())], namer) for token_id, row in zip(token_ids, rows, strict=True)]
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            if tokenizer is not None and not tokenizer.is_silent(token_id):
                self._offset += len(self._utf8.decode(self._bytes_in_text(token_id, tokenizer)))
        chosen = [None if row is None else row[i] for i, row in zip(token_ids, rows, strict=True)]
        return {
            "tokens": [named[i] for i, named in zip(token_ids, names, strict=True)],
            "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in chosen],
            "top_logprobs": [
                None if row is None else {named[i]: _finite(row[i].logprob) for i in _by_rank(row)}
                for row, named in zip(rows, names, strict=True)
            ],
            "text_offset": offsets,
        }

    def _bytes_in_text(self, token_id: int, tokenizer: Tokenizer) -> bytes:
        """The token's bytes in the text: a decoder may strip the leading space of a text's first token."""
        is_first, self._has_begun = not self._has_begun, True
        own = tokenizer.token_bytes(token_id)
        return own.removeprefix(b" ") if is_first and not tokenizer.decode([token_id]).startswith(" ") else own


def chat_logprobs(
    token_ids: ReadOnlyList[int], rows: ReadOnlyList[TokenLogprobs], num_top: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The ``logprobs`` of ``/v1/chat/completions``: each token, and the ``num_top`` most probable in its position."""
    content = []
    for token_id, row in zip(token_ids, rows, strict=True):
        top = [i for i in _by_rank(row) if row[i].rank <= num_top]
        content.append(
            {**_described(token_id, row, tokenizer), "top_logprobs": [_described(i, row, tokenizer) for i in top]}
        )
    return {"content": content, "refusal": None}


def described_call(call: ToolCallDelta) -> dict[str, Any]:
    """The JSON of a call, or of the new part of one."""
    function = {"arguments": call.arguments}
    if call.id is None:
        return {"function": function}
    return {"id": call.id, "type": "function", "function": {"name": call.name, **function}}


def token_names(token_ids: ReadOnlyList[int], tokenizer: Tokenizer | None) -> dict[int, str]:
    """A unique name for each token. Without a tokenizer, all names have vLLM's form.

    The name is the token's text; ``bytes:\\xe4\\xbd``, OpenAI's legacy form, for a part of a character; or
    ``token_id:7``, vLLM's form, for a token without text or with the same text as an earlier one.
    """
    names: dict[int, str] = {}
    for token_id in token_ids:
        text = "" if tokenizer is None else tokenizer.token_text(token_id)
        own = text.encode() if tokenizer is None else tokenizer.token_bytes(token_id)
        name = text if own == text.encode() else "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)
        if token_id not in names:
            names[token_id] = f"token_id:{token_id}" if not name or name in names.values() else name
    return names


def _by_rank(row: TokenLogprobs) -> list[int]:
    return sorted(row, key=lambda token_id: row[token_id].rank)


def _described(token_id: int, row: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[str, Any]:
    entry = row[token_id]
    own = b"" if tokenizer is None else tokenizer.token_bytes(token_id)
    return {"token": entry.decoded_token or "", "logprob": _finite(entry.logprob), "bytes": list(own)}


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


def named_by_id(rows: ReadOnlyList[TokenLogprobs]) -> list[TokenLogprobs]:
    """The rows for ``chat_logprobs``, with ``token_id:5`` as each token's text."""
    return [{i: entry._replace(decoded_token=f"token_id:{i}") for i, entry in row.items()} for row in rows]
