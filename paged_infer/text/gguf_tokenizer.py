"""The tokenizer in a GGUF file: its vocabulary, merges and rules, built with the tokenizers library.

A file names the kind of its vocabulary (``tokenizer.ggml.model``) and, for byte-level BPE, how a text is split into
words before merging (``tokenizer.ggml.pre``). The regular expressions behind these names are llama.cpp's, which took
them from each model's tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it imports torch
    from paged_infer.model.loading.gguf_file import GgufFile

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6  # tokenizer.ggml.token_type; 1 is a normal token
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_AFTER_2023 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "llama-bpe": (_AFTER_2023 % "{1,3}",),
    "qwen2": (_AFTER_2023 % "",),
    "smollm": (r"\p{N}", _GPT2),
}
"""``tokenizer.ggml.pre`` -> expressions that split a text, one after the other; what lies between matches is a part."""

_NO_TOKENIZER = (None, "none", "no_vocab")
_REFUSED = ("precompiled_charsmap", "remove_extra_whitespaces", "add_sep_token")  # they change how a text is encoded


def gguf_tokenizer(file: GgufFile) -> Any:
    """A ``PreTrainedTokenizerFast``; None if the file has no tokenizer, so that it serves token ids.

    Raises:
        ValueError: a kind of tokenizer that is not known, or keys that are missing, malformed or unsupported.
    """
    from transformers import PreTrainedTokenizerFast

    fields = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in file.metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    kind = fields.get("model")
    if kind in _NO_TOKENIZER:
        return None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"tokenizer.ggml.model={kind!r}: must be one of {', '.join(_KINDS)}")
    if refused := [key for key in _REFUSED if fields.get(key)]:
        raise ValueError(f"tokenizer.ggml.{refused[0]}={fields[refused[0]]!r} is not supported")
    tokens = _strings(fields, "tokens")
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(index for index, token in enumerate(tokens) if ids[token] != index)
        raise ValueError(f"tokenizer.ggml.tokens: {tokens[twice]!r} is both {twice} and {ids[tokens[twice]]}")
    types = _numbers(fields, "token_type", len(tokens), default=1)
    padding = {token for token, i in ids.items() if types[i] == _UNUSED and token == f"[PAD{i}]"}  # of the embedding
    vocabulary = {token: i for token, i in ids.items() if token not in padding}
    is_gemma = str(file.metadata.get("general.architecture")).startswith("gemma")
    try:
        backend = _KINDS[kind](fields, vocabulary, types, is_gemma)
    except ValueError:
        raise
    except Exception as error:  # the library raises a bare Exception: a merge of an unknown token, for example
        raise ValueError(f"tokenizer.ggml: {error}") from None
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: _token(fields, key, tokens) for name, key in names.items()}
    _add_whole_tokens(backend, vocabulary, types)
    _add_ends(backend, fields, special, ids)
    named = {name: token for name, token in special.items() if token is not None}
    template = file.metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"tokenizer.chat_template={template!r}: must be a string")
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **named)


def _byte_level(fields: dict[str, Any], vocabulary: dict[str, int], types: list[Any], is_gemma: bool) -> Any:
    """GPT-2's kind: each byte is a character, and the merges are listed by rank."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = fields.get("pre", "default")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre={name!r}: must be one of {', '.join(PRE_TOKENIZERS)}")
    merges: list[Any] = [tuple(merge.split(" ")) for merge in _strings(fields, "merges")]
    if wrong := [merge for merge in merges if len(merge) != 2]:
        raise ValueError(f"tokenizer.ggml.merges: {' '.join(wrong[0])!r} is not two tokens")
    # Llama 3 has whole words in its vocabulary that no merge reaches.
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name == "llama-bpe"))
    if name == "qwen2":  # as in its tokenizer.json; llama.cpp does not normalise
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in PRE_TOKENIZERS[name]]
    prefix = fields.get("add_space_prefix") is True
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: dict[str, Any], vocabulary: dict[str, int], types: list[Any], is_gemma: bool) -> Any:
    """Llama 2's kind: the neighbours with the best score are merged first, and unknown characters become bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _numbers(fields, "scores", len(types))
    # as transformers does for Gemma: rank pieces by id, since the scores of those added by hand are not ranks
    pieces = [(0.0 if is_gemma else -scores[i], i, piece) for piece, i in vocabulary.items() if types[i] == 1]
    merges = [
        (piece[:cut], piece[cut:])
        for _, _, piece in sorted(pieces)
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    unknown = next((token for token, i in vocabulary.items() if types[i] == _UNKNOWN), None)
    has_bytes = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes))
    has_prefix = fields.get("add_space_prefix", True) is True
    replaced = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replaced]) if has_prefix else replaced
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if has_prefix else parts)
    return backend


_KINDS: dict[str, Callable[[dict[str, Any], dict[str, int], list[Any], bool], Any]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}


def _add_whole_tokens(backend: Any, vocabulary: dict[str, int], types: list[Any]) -> None:
    """Control tokens are special: ``decode`` skips them. Neither they nor user-defined tokens are ever split."""
    from tokenizers import AddedToken

    for kind, add in ((_CONTROL, backend.add_special_tokens), (_USER_DEFINED, backend.add_tokens)):
        whole = [token for token, i in vocabulary.items() if types[i] == kind]
        add([AddedToken(token, normalized=False, special=kind == _CONTROL) for token in whole])


def _add_ends(backend: Any, fields: dict[str, Any], special: dict[str, Any], ids: dict[str, int]) -> None:
    """The tokens that begin and end each encoded text: as the file says, or else llama.cpp's default for its kind."""
    from tokenizers import processors

    begins = fields["model"] == "llama" or fields.get("pre") == "llama-bpe"
    added = {"bos_token": fields.get("add_bos_token", begins), "eos_token": fields.get("add_eos_token", False)}
    for name, is_added in added.items():
        if is_added and special[name] is None:
            raise ValueError(f"tokenizer.ggml: lacks the id of the {name}, which is added to each text")
    ends = [special[name] for name, is_added in added.items() if is_added]
    if ends:
        first, last = ([special[name]] if is_added else [] for name, is_added in added.items())
        pairs = [(token, ids[token]) for token in dict.fromkeys(ends)]
        backend.post_processor = processors.TemplateProcessing(single=[*first, "$A", *last], special_tokens=pairs)


def _token(fields: dict[str, Any], name: str, tokens: list[str]) -> str | None:
    index = fields.get(f"{name}_token_id")
    if index is None:
        return None
    if type(index) is not int or not 0 <= index < len(tokens):
        raise ValueError(f"tokenizer.ggml.{name}_token_id={index!r}: must be from 0 to {len(tokens) - 1}")
    return tokens[index]


def _strings(fields: dict[str, Any], key: str) -> list[str]:
    values = fields.get(key)
    if values is None:
        raise ValueError(f"tokenizer.ggml: lacks {key!r}")
    if not isinstance(values, list) or not values or not isinstance(values[0], str):
        raise ValueError(f"tokenizer.ggml.{key}: must be a list of strings")
    return values


def _numbers(fields: dict[str, Any], key: str, length: int, default: int | None = None) -> list[Any]:
    """One for each token; ``default`` for all, if it is given and the file has none."""
    values = fields.get(key)
    if values is None and default is not None:
        return [default] * length
    if not isinstance(values, list) or len(values) != length or not isinstance(values[0], (int, float)):
        found = f"has {len(values)}" if isinstance(values, list) else "has none"
        raise ValueError(f"tokenizer.ggml.{key}: one number for each of {length} tokens is needed, the file {found}")
    return values
