"""The most characters of a text that one token can stand for, so that the length alone can show that it is too long.

The bound must hold for every text. A BPE tokenizer with every byte in its vocabulary loses no character: its tokens
spell the text, byte by byte or character by character. There is no bound if an unknown word of any length becomes one
token, if a normalizer or pre-tokenizer drops characters, or if an added token absorbs the spaces around it.
"""

from __future__ import annotations

import json
from typing import Any

SHRINKS_BY = {"NFC": 4, "NFD": 1, "Prepend": 1, "ByteLevel": 1}
"""By normalizer: how many characters may become one. Unicode's canonical decompositions have at most four."""

KEEPS_ALL = ("ByteLevel", "Metaspace", "Digits", "Split")
"""Pre-tokenizers that only split a text; ``Split`` unless its behavior is "Removed"."""


def max_token_characters(hf_tokenizer: Any) -> int | None:
    """The most characters that one token of a Hugging Face tokenizer can stand for; None if there is no bound."""
    backend = getattr(hf_tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE":
        return None
    normalizers, cutters = _parts(backend.normalizer), _parts(backend.pre_tokenizer)
    if any(part["type"] not in KEEPS_ALL or part.get("behavior") == "Removed" for part in cutters):
        return None
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if any(part["type"] == "ByteLevel" for part in [*normalizers, *cutters]):
        if not _byte_level_alphabet() <= vocabulary.keys():
            return None
    elif not backend.model.byte_fallback or any(f"<0x{byte:02X}>" not in vocabulary for byte in range(256)):
        return None
    longest = max(map(len, vocabulary))
    for part in normalizers:
        shrinks_by = _shrinks_by(part)
        if shrinks_by is None:
            return None
        longest *= shrinks_by
    return longest


def _parts(component: Any) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer of the tokenizers library, from its JSON form."""
    if component is None:
        return []
    return _flat(json.loads(component.__getstate__()))


def _flat(part: dict[str, Any]) -> list[dict[str, Any]]:
    if part["type"] != "Sequence":
        return [part]
    inner = part.get("normalizers") or part.get("pretokenizers") or []
    return [one for each in inner for one in _flat(each)]


def _shrinks_by(normalizer: dict[str, Any]) -> int | None:
    if normalizer["type"] != "Replace":
        return SHRINKS_BY.get(normalizer["type"])
    pattern, content = normalizer["pattern"].get("String"), normalizer["content"]
    return -(-len(pattern) // len(content)) if pattern and content else None


def _byte_level_alphabet() -> set[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())
