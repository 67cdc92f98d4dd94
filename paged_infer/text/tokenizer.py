"""Text to token ids and back, whole or as a sequence grows. ``transformers`` is imported when a tokenizer is loaded."""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import Any

import regex

from paged_infer.text.chat_template import check_text, checked_messages, fitted_messages
from paged_infer.text.continuation import CONTEXT, REPLACEMENT, num_shared, num_unfinished, prompt_context
from paged_infer.text.token_lengths import max_token_characters

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "spiece.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)


class Tokenizer:
    """A Hugging Face tokenizer behind the few calls that the engine makes. Errors are ValueErrors."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self._hf = hf_tokenizer
        self._token_texts: dict[int, str] = {}

    @classmethod
    def from_pretrained(cls, path_or_id: str | PathLike[str]) -> Tokenizer | None:
        """The tokenizer of a local checkpoint folder or of a hub id; None for a folder that holds no tokenizer.

        Without a tokenizer the engine serves token ids. Files that cannot be read are a ValueError.
        """
        folder = Path(path_or_id)
        if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
            return None
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(str(path_or_id)))
        except Exception as error:  # transformers and tokenizers raise many kinds, a bare Exception among them
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{path_or_id}: its tokenizer cannot be loaded ({reason})") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with the special tokens that this tokenizer adds by default (a BOS, say)."""
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, not {type(text).__name__}")
        check_text(text)
        return list(self._hf.encode(text, verbose=False))  # verbose would warn of the length, which the engine checks

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``token_ids``. Bytes that are no UTF-8 become U+FFFD; ids that name no token become nothing."""
        return self._hf.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def token_text(self, token_id: int) -> str:
        """What one token looks like inside a text: its leading space is kept, and special tokens are shown."""
        text = self._token_texts.get(token_id)
        if text is None:  # two decodes take as long as many a step of a model, and logprobs ask for thousands
            text = self._token_texts[token_id] = self._text_inside(token_id)
        return text

    def _text_inside(self, token_id: int) -> str:
        alone = self.decode([token_id], skip_special_tokens=False)
        twice = self.decode([token_id, token_id], skip_special_tokens=False)
        # Decoders such as Llama's strip the first space of a text, so the second of two tells the whole token.
        return twice[len(alone) :] if REPLACEMENT not in twice and twice.startswith(alone) else alone

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of ``token_text``; of a token that is part of a character, its own bytes."""
        text = self.token_text(token_id)
        if REPLACEMENT not in text:
            return text.encode()
        if token_id in self.byte_tokens:
            return bytes([self.byte_tokens[token_id]])
        piece = self._hf.convert_ids_to_tokens(token_id) or ""
        own = bytes(BYTE_OF_CHARACTER.get(char, 0) for char in piece)
        # If the vocabulary is not byte-level, the piece does not spell bytes: ``own`` does not decode to its text.
        return own if own.decode(errors="replace") == text else text.encode()

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation as the model was trained to read it, ready for the assistant's turn.

        A content is a str or a list of text parts. The role "developer" becomes "system" if the template leaves such a
        message out or refuses it.

        Raises:
            ValueError: no template, an empty conversation, a message that is malformed or that the template leaves
                out (the error names its index), or an error raised by the template.
        """
        conversation = checked_messages(messages)
        if not self._hf.chat_template:
            raise ValueError("this tokenizer has no chat template: pass a prompt to generate() instead of messages")
        fitted = fitted_messages(
            conversation, partial(self._render, tokenize=False, add_generation_prompt=add_generation_prompt)
        )
        return list(self._render(fitted, tokenize=True, add_generation_prompt=add_generation_prompt))

    def _render(self, messages: list[dict[str, Any]], **options: bool) -> Any:
        from jinja2 import TemplateError

        try:
            return self._hf.apply_chat_template(messages, return_dict=False, **options)
        except Exception as error:  # a template is a program: it can raise anything
            if type(error) is TemplateError:  # its own raise_exception
                raise ValueError(f"the chat template refuses these messages: {error}") from error
            kind = type(error).__name__
            raise ValueError(f"the chat template fails on these messages: {kind}: {error}") from error

    @property
    def eos_token_id(self) -> int | None:
        return self._hf.eos_token_id

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's embedding may have more rows than this."""
        return len(self._hf)

    @cached_property
    def max_token_characters(self) -> int | None:
        """The most characters of a text that one token can stand for; None if there is no bound."""
        return max_token_characters(self._hf)

    def is_silent(self, token_id: int) -> bool:
        """Whether ``decode`` leaves the token out: a special token, or an id that names none."""
        return token_id in self._special_ids or self._hf.convert_ids_to_tokens(token_id) is None

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The text of each special token -> its id. ``decode`` skips these tokens."""
        return {self._hf.convert_ids_to_tokens(token_id): token_id for token_id in self._special_ids}

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._hf.added_tokens_decoder
        return frozenset(self._hf.all_special_ids) | {i for i, token in added.items() if token.special}

    @cached_property
    def byte_tokens(self) -> dict[int, int]:
        """Token id -> byte, for the ``<0xNN>`` tokens of a tokenizer with byte fallback; empty for every other kind."""
        vocab = self._hf.get_vocab()
        ids = [vocab.get(f"<0x{byte:02X}>") for byte in range(256)]
        if None in ids:
            return {}
        c3, a9, ff = ids[0xC3], ids[0xA9], ids[0xFF]
        is_fallback = self.decode([c3, a9]) == "é" and self.decode([c3, a9, ff]) == REPLACEMENT * 3
        return {token_id: byte for byte, token_id in enumerate(ids)} if is_fallback else {}


def _bytes_of_characters() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHARACTER = _bytes_of_characters()
"""How a byte-level vocabulary (GPT-2's) spells bytes: a printable byte as itself, the n-th other as U+0100 + n."""


class StreamingDecoder:
    """Turns the growing ids of one sequence into text that, once given out, never changes.

    The pieces of all ``push`` calls and of ``finish`` join to exactly ``tokenizer.decode(all ids)``, or, after
    ``prompt_token_ids``, to ``continuation(tokenizer, prompt, all ids)``. Held back is:

    - a trailing U+FFFD, which may be the first bytes of a character whose rest comes with a later token;
    - with byte-fallback tokens (``<0xNN>``), the whole open run of them, since the decoder turns a run that is not
      UTF-8 into one U+FFFD a byte: only a token of another kind, or an invalid byte, settles the run;
    - the last grapheme cluster (Unicode annex 29) while its last character may still grow into a larger one: symbols
      and emoji (So, Sk, extended pictographs, regional indicators), format characters such as ZWJ (Cf), marks (Mn,
      Mc, Me), conjoining jamo, and letters without case that are not wide (Thai, Devanagari, Arabic, ...). It goes out
      with the text that shows that it is closed, or once it is longer than 32 code points.

    Everything else (ASCII, Latin, Cyrillic, Greek, digits, CJK, kana, Hangul syllables) goes out at once, so most text
    streams with no delay. One case is left: a mark that comes in a later token than such a base (``e`` + U+0301, the
    keycap ``1`` + U+FE0F + U+20E3) begins a piece of its own.

    Like vLLM's incremental detokenizer it decodes a short window of the newest ids, and a token costs O(1), amortised:

        window_ids   [ t t t t t t t ]   ->   text   [ context: is out | held ]
    """

    WINDOW = 8  # tokens that a window grows by before it is cut
    MAX_CLUSTER = 32  # code points; Unicode's stream-safe format allows 30 marks

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._byte_of = tokenizer.byte_tokens
        self._window_ids: list[int] = []
        self._num_out = 0  # characters of the window's text that have gone out
        self._cut_at = self.WINDOW
        self._run_length = 0  # byte tokens at the end of the window that no other token has closed
        self._run_utf8 = codecs.getincrementaldecoder("utf-8")()
        self._run_is_valid = True
        self._push(context := prompt_context(tokenizer, prompt_token_ids))
        held = tokenizer.decode(self._window_ids)[self._num_out :]
        # Text of the prompt that is still held back: it will precede the output's text and must be cut off.
        self._of_prompt = held[: len(held) - num_unfinished(tokenizer, context, held)]

    def push(self, token_ids: Sequence[int]) -> str:
        """Adds ids; returns the text that they settle, often "" or a few characters."""
        return self._behind_prompt(self._push(token_ids))

    def finish(self) -> str:
        """The text that was held back: nothing more will come."""
        return self._behind_prompt(self._give_out(self._tokenizer.decode(self._window_ids)))

    def _behind_prompt(self, piece: str) -> str:
        if not self._of_prompt:
            return piece
        num_same = num_shared(self._of_prompt, piece)
        self._of_prompt = self._of_prompt[num_same:] if num_same == len(piece) else ""
        return piece[num_same:]

    def _push(self, token_ids: Sequence[int]) -> str:
        pieces: list[str] = []
        stale = False  # ids were added since the window was decoded
        for token_id in token_ids:
            if self._tokenizer.is_silent(token_id):
                continue
            byte = self._byte_of.get(token_id)
            if byte is None:
                self._close_run()
                self._window_ids.append(token_id)
                stale = True
                continue
            if stale:
                pieces.append(self._emit())
                stale = False
            pieces.append(self._push_byte(token_id, byte))
        if stale:
            pieces.append(self._emit())
        return "".join(pieces)

    def _push_byte(self, token_id: int, byte: int) -> str:
        self._run_length += 1
        if not self._run_is_valid and self._run_length > 2:
            return REPLACEMENT  # the window's held U+FFFD goes out and this byte's is held instead
        self._window_ids.append(token_id)
        try:
            self._run_utf8.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._run_is_valid = False
        if self._run_is_valid or self._run_length < 2:
            return ""
        # Nothing can save the run: all of it is U+FFFD for good, and so is every byte that will prolong it. From here
        # a window of two invalid bytes, the first out and the second held, stands for the run.
        piece = self._give_out(self._tokenizer.decode(self._window_ids)[:-1])
        invalid_id = next(i for i, b in self._byte_of.items() if b == 0xFF)
        self._window_ids, self._num_out, self._cut_at = [invalid_id, invalid_id], 1, self.WINDOW
        return piece

    def _close_run(self) -> None:
        if self._run_length:
            self._run_length, self._run_is_valid = 0, True
            self._run_utf8.reset()

    def _emit(self) -> str:
        text = self._tokenizer.decode(self._window_ids)
        num_new = num_settled(text[self._num_out :], self.MAX_CLUSTER)
        piece = self._give_out(text[: self._num_out + num_new])
        if len(self._window_ids) > self._cut_at:
            self._cut_window(text)
        return piece

    def _give_out(self, settled: str) -> str:
        piece = settled[self._num_out :]
        self._num_out = len(settled)
        return piece

    def _cut_window(self, text: str) -> None:
        """Drops ids from the front whose text is out.

        The shorter window may begin inside a character, and its decoder sees a start of text, which can cost a space.
        Both show in its first characters only: at most three bytes of a begun character, each one U+FFFD, then the
        decoder is in step with the whole again. So a cut is right when that many characters behind it are out.
        """
        num_held = len(text) - self._num_out
        num_kept = 2
        while num_kept < len(self._window_ids):
            shorter = self._tokenizer.decode(self._window_ids[-num_kept:])
            if len(shorter) - num_held >= CONTEXT and text.endswith(shorter[CONTEXT:]):
                self._window_ids = self._window_ids[-num_kept:]
                self._num_out = len(shorter) - num_held
                break
            num_kept *= 2
        self._cut_at = len(self._window_ids) + self.WINDOW


def num_settled(text: str, max_cluster: int = StreamingDecoder.MAX_CLUSTER) -> int:
    """How many characters of ``text`` no later text can change or join: see StreamingDecoder."""
    end = len(text) - 1 if text.endswith(REPLACEMENT) else len(text)
    if not end or not _may_grow(text[end - 1]):
        return end
    *_, last = regex.finditer(r"\X", text, endpos=end)
    return last.start() if end - last.start() <= max_cluster else end


def _may_grow(char: str) -> bool:
    if char.isascii():
        return False
    category = unicodedata.category(char)
    if category == "Lo":
        is_conjoining = "\u1100" <= char <= "\u11ff" or "\ua960" <= char <= "\ua97f"
        return is_conjoining or unicodedata.east_asian_width(char) not in ("W", "F")
    growing = category in ("So", "Sk", "Cf", "Mn", "Mc", "Me")
    return growing or regex.match(r"\p{Extended_Pictographic}", char) is not None
