"""The text of an output: what its tokens add to the text of the prompt."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import takewhile

from paged_infer.text.tokenizer import REPLACEMENT, Tokenizer

CONTEXT = 3  # first characters of a decoded window, which may differ from those in the whole text
CONTEXT_TOKENS = 8  # last tokens of a prompt to decode with its output; more if shorter than CONTEXT


def continuation(tokenizer: Tokenizer, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """The text of an output: what ``token_ids`` add to the text of the prompt.

    ``prompt_text(prompt) + continuation(prompt, output)`` equals ``decode(prompt + output)``, which skips special
    tokens, including a BOS that ``encode`` added. This keeps the first space of an output, which a decoder such as
    Llama's strips when it decodes the output alone. A character that begins in the prompt is part of the output.

    There is one exception: bytes that are not UTF-8 after a prompt that ends in byte-fallback tokens. The decoder turns
    the whole run into U+FFFD, so text of the prompt changes; the output then begins with that run.
    """
    context = prompt_context(tokenizer, prompt_token_ids)
    before, whole = prompt_text(tokenizer, context), tokenizer.decode([*context, *token_ids])
    return whole[num_shared(before, whole) :]


def num_shared(text: str, other: str) -> int:
    """Length of the common prefix, in characters."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (one, two) in pairs if one != two), min(len(text), len(other)))


def prompt_text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """``decode(token_ids)`` without an incomplete last character."""
    text = tokenizer.decode(token_ids)
    return text[: len(text) - num_unfinished(tokenizer, token_ids, text)]


def prompt_context(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, as many as an output needs before it to decode as it does after the whole prompt.

    Decoding from there gives the same text except for the first ``CONTEXT`` characters: it may begin with the rest of a
    character (three bytes at most), and the decoder may treat the first token as the start of a text. It never begins
    inside a run of byte-fallback tokens, because their text depends on the whole run.
    """
    num_tokens = CONTEXT_TOKENS
    while True:
        start = max(0, len(token_ids) - num_tokens)
        while start and (token_ids[start] in tokenizer.byte_tokens or tokenizer.is_silent(token_ids[start])):
            start -= 1
        context = list(token_ids[start:])
        if not start or len(tokenizer.decode(context)) >= CONTEXT:
            return context
        num_tokens = 2 * len(context)


def num_unfinished(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> int:
    """How many characters at the end of ``text`` stand for an incomplete character that later tokens may complete.

    Args:
        text: the decoded ``token_ids``, or the end of it.
    """
    if not text.endswith(REPLACEMENT):
        return 0
    newest = [t for t in reversed(token_ids) if not tokenizer.is_silent(t)]
    run = list(takewhile(tokenizer.byte_tokens.__contains__, newest))
    last = run or newest[:3]  # an incomplete character has three bytes at most
    utf8 = codecs.getincrementaldecoder("utf-8")("strict" if run else "replace")
    try:
        utf8.decode(b"".join(tokenizer.token_bytes(token_id) for token_id in reversed(last)))
    except UnicodeDecodeError:  # no later token can complete this run
        return 0
    has_begun = bool(utf8.getstate()[0])
    return has_begun * max(1, len(run))  # a run that is not yet UTF-8 decodes to one U+FFFD per byte
