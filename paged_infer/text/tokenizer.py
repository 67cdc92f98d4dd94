"""Text to token ids and back. ``transformers`` is imported when a tokenizer is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import Any

from paged_infer.text.chat_template import (
    check_shows_tools,
    check_text,
    check_variables,
    checked_messages,
    checked_tools,
    fitted_messages,
)
from paged_infer.text.gguf_tokenizer import gguf_tokenizer
from paged_infer.text.token_lengths import max_token_characters

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are not UTF-8
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
    """A Hugging Face tokenizer, reduced to the few calls that the engine makes. Errors are ValueErrors."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self._hf = hf_tokenizer
        self._token_texts: dict[int, str] = {}

    @classmethod
    def from_pretrained(cls, path_or_id: str | PathLike[str]) -> Tokenizer | None:
        """The tokenizer of a local checkpoint folder, a GGUF file or a hub id; None for one that has none.

        Without a tokenizer the engine serves token ids. Files that cannot be read are a ValueError.
        """
        folder = Path(path_or_id)
        if folder.is_file():
            from paged_infer.model.loading.gguf_file import read_gguf

            file = read_gguf(folder)
            try:
                found = gguf_tokenizer(file)
            except ValueError as error:
                raise ValueError(f"{folder}: its tokenizer cannot be loaded ({error})") from None
            return None if found is None else cls(found)
        if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
            return None
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(str(path_or_id)))
        except Exception as error:  # transformers and tokenizers raise many types, even a bare Exception
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{path_or_id}: its tokenizer cannot be loaded ({reason})") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with the special tokens that this tokenizer adds by default, such as a BOS."""
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, not {type(text).__name__}")
        check_text(text)
        return list(self._hf.encode(text, verbose=False))  # verbose would warn of the length, which the engine checks

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``token_ids``. Invalid UTF-8 becomes U+FFFD; ids outside the vocabulary are skipped."""
        return self._hf.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def token_text(self, token_id: int) -> str:
        """What one token looks like inside a text: its leading space is kept, and special tokens are shown."""
        text = self._token_texts.get(token_id)
        if text is None:  # two decodes can take as long as a model step, and logprobs need thousands
            text = self._token_texts[token_id] = self._text_inside(token_id)
        return text

    def _text_inside(self, token_id: int) -> str:
        alone = self.decode([token_id], skip_special_tokens=False)
        twice = self.decode([token_id, token_id], skip_special_tokens=False)
        # Decoders such as Llama's strip the first space of a text, so decode it twice and take the second.
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

    def vocabulary_bytes(self) -> list[bytes | None]:
        """``token_bytes`` of every token id; None for ids that ``decode`` leaves out."""
        pieces = self._hf.convert_ids_to_tokens(range(self.vocab_size))
        is_byte_level = set(BYTE_OF_CHARACTER) <= set(self._hf.get_vocab()) and self.decode([pieces.index("Ġ")]) == " "
        added = self._hf.added_tokens_decoder
        return [
            None
            if self.is_silent(token_id)
            else bytes(
                BYTE_OF_CHARACTER[character] for character in piece
            )  # a decode would take 3 s for 150,000 tokens
            if is_byte_level and token_id not in added
            else self.token_bytes(token_id)
            for token_id, piece in enumerate(pieces)
        ]

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation as the model was trained to read it, ready for the assistant's turn.

        A content is a str or a list of text parts. The role "developer" becomes "system" if the template leaves such a
        message out or rejects it.

        Args:
            tools: the functions that the assistant may call, as OpenAI describes them.
            chat_template_kwargs: variables of the template.

        Raises:
            ValueError: no template, an empty conversation, a message that is malformed or that the template leaves
                out (the error names its index), tools that it leaves out, a variable that it does not read, or an
                error raised by the template.
        """
        conversation, described = checked_messages(messages), checked_tools(tools or ())
        if not self._hf.chat_template:
            raise ValueError("this tokenizer has no chat template: pass a prompt to generate() instead of messages")
        own = dict(chat_template_kwargs or {})
        template = self._hf.chat_template  # a str, or a dict of named templates
        text = template if isinstance(template, str) else "\n".join(template.values())
        check_variables(own, text, inspect.signature(self._hf.apply_chat_template).parameters)

        def render(
            conversation: list[dict[str, Any]], *, tokenize: bool = False, tools: Any = described or None
        ) -> Any:
            options = {"add_generation_prompt": add_generation_prompt, "tokenize": tokenize, "tools": tools, **own}
            return self._render(conversation, **options)

        fitted = fitted_messages(conversation, render)
        if described:
            check_shows_tools(described, partial(render, fitted))
        return list(render(fitted, tokenize=True))

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self._hf.apply_chat_template(messages, return_dict=False, **options)
        except Exception as error:  # a template is a program: it can raise anything
            if type(error) is TemplateError:  # its own raise_exception
                raise ValueError(f"the chat template rejects these messages: {error}") from error
            kind = type(error).__name__
            raise ValueError(f"the chat template fails on these messages: {kind}: {error}") from error

    def save(self, folder: Path) -> None:
        """Write its files to ``folder`` in Hugging Face's format."""
        self._hf.save_pretrained(folder)

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
        """Whether ``decode`` leaves the token out: a special token, or an id outside the vocabulary."""
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
