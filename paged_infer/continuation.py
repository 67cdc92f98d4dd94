"""What an output adds to the text of its prompt."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paged_infer.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no UTF-8
CONTEXT = 3  # characters at the start of a decoded window that may differ from the whole text
CONTEXT_TOKENS = 8  # of a prompt that are decoded with its output; more where they are short of CONTEXT


def continuation(tokenizer: Tokenizer, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """The text of an output: what ``token_ids`` add to the text of the prompt.

    ``prompt_text(prompt) + continuation(prompt, output)`` is ``decode(prompt + output)``, in which special tokens leave
    no trace, a BOS that ``encode`` has added among them. So a first space is kept, which a decoder such as Llama's
    strips from an output that is decoded alone, and a character that the prompt has begun is part of the output.

    One kind of output changes text of the prompt itself: bytes that are not UTF-8 after a prompt that ends in
    byte-fallback tokens. The decoder turns the whole run of them into U+FFFD; the output then begins with that run.
    """
    context = prompt_context(tokenizer, prompt_token_ids)
    before, whole = prompt_text(tokenizer, context), tokenizer.decode([*context, *token_ids])
    return whole[num_shared(before, whole) :]


def num_shared(text: str, other: str) -> int:
    """How many first characters the two have in common."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (one, two) in pairs if one != two), min(len(text), len(other)))


def prompt_text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """``decode(token_ids)`` without a last character of which only the first bytes are there."""
    text = tokenizer.decode(token_ids)
    return text[: len(text) - num_unfinished(tokenizer, token_ids, text)]


def prompt_context(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[int]:
    """The last tokens of a prompt: what the decoder has to see before an output to decode it as after all of them.

    A decoder that begins there gives the same text but for the first ``CONTEXT`` characters: it may see the rest of a
    character, three bytes at most, or take the first token for the start of a text. It does not begin inside a run of
    byte-fallback tokens, whose text depends on all of the run.
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
    """How many characters at the end of ``text`` stand for bytes that later tokens may complete to one character.

    Args:
        text: what ``token_ids`` decode to, or its end.
    """
    if not text.endswith(REPLACEMENT):
        return 0
    newest = [t for t in reversed(token_ids) if not tokenizer.is_silent(t)]
    run = list(takewhile(tokenizer.byte_tokens.__contains__, newest))
    last = run or newest[:3]  # a character that is not complete has three bytes at most
    utf8 = codecs.getincrementaldecoder("utf-8")("strict" if run else "replace")
    try:
        utf8.decode(b"".join(tokenizer.token_bytes(token_id) for token_id in reversed(last)))
    except UnicodeDecodeError:  # nothing completes this run any more
        return 0
    has_begun = bool(utf8.getstate()[0])
    return has_begun * max(1, len(run))  # a run that is not UTF-8 yet decodes to one U+FFFD a byte
