"""The most characters that a token can stand for: a bound for every text, or none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from paged_infer.text.token_lengths import max_token_characters

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACES = "\N{LOWER ONE EIGHTH BLOCK}"
LETTERS = "e\u0301", "\u1f82", "\u03b1\u0313\u0300\u0345", "\u1112\u1161\u11ab", "\U0001f600"
TEXTS = st.lists(st.sampled_from([*"ab \n\t0\x00", *LETTERS, "aaaa", "<m>"]), max_size=60).map("".join)


def bpe(tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    return Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, **options))


def byte_level(normalizer: Any = None, cutter: Any = None, **options: Any) -> Tokenizer:
    backend = bpe([*ALPHABET, "aa", "aaaa"], [("a", "a"), ("aa", "aa")], **options)
    backend.normalizer = normalizer
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = level if cutter is None else pre_tokenizers.Sequence([cutter, level])
    return backend


def byte_fallback(normalizer: Any, tokens: list[str] = BYTES) -> Tokenizer:
    backend = bpe([*tokens, "<unk>", "a", SPACES], [], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend.normalizer = normalizer
    return backend


def with_token(backend: Tokenizer, **options: Any) -> Tokenizer:
    backend.add_special_tokens([AddedToken("<m>", **options)])
    return backend


LLAMA = normalizers.Sequence([normalizers.Prepend(SPACES), normalizers.Replace(" ", SPACES)])
BOUNDED = {
    "byte-level": (byte_level(), 4),
    "byte-level-cut": (byte_level(cutter=pre_tokenizers.Split(Regex(r"\s+"), "isolated")), 4),
    "nfc": (byte_level(normalizers.NFC()), 16),
    "byte-fallback": (byte_fallback(LLAMA), 6),
    "replace": (byte_level(normalizers.Replace("ab", "b")), 8),
    "special": (with_token(byte_level()), 4),
}
UNBOUNDED = {
    "word-level": Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")),
    "word-piece": Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
    "unigram": Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)),
    "bpe-of-letters": bpe(["a", "<unk>"], [], unk_token="<unk>", fuse_unk=True),
    "a-byte-is-missing": byte_fallback(LLAMA, BYTES[1:]),
    "strip": byte_level(normalizers.Strip()),
    "nfkc": byte_level(normalizers.NFKC()),
    "replace-by-nothing": byte_level(normalizers.Replace("a", "")),
    "replace-a-pattern": byte_level(normalizers.Replace(Regex(" +"), " ")),
    "removes": byte_level(cutter=pre_tokenizers.Split(" ", "removed")),
    "whitespace": byte_level(cutter=pre_tokenizers.WhitespaceSplit()),
    "takes-spaces": with_token(byte_level(), lstrip=True),
}


@pytest.mark.parametrize("kind", BOUNDED)
@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_no_token_stands_for_more_characters_than_the_bound(kind: str, text: str) -> None:
    backend, bound = BOUNDED[kind]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert max_token_characters(tokenizer) == bound
    assert len(text) <= bound * len(tokenizer.encode(text))


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_where_one_token_can_stand_for_any_text_there_is_no_bound(kind: str) -> None:
    assert max_token_characters(PreTrainedTokenizerFast(tokenizer_object=UNBOUNDED[kind])) is None


def test_a_tokenizer_without_a_backend_has_no_bound() -> None:
    assert max_token_characters(object()) is None
