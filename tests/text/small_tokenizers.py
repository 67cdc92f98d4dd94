"""Small tokenizers of every kind, built here: byte-level BPE (GPT-2, Qwen, Llama 3), SentencePiece-like BPE with byte
fallback (Llama 2, Mistral), metaspace, WordPiece, whole words; and texts to try them on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from paged_infer.text.tokenizer import Tokenizer

ENDLESS = ["the fox ", "你", "กก์", "😀", "🇩", "👩\u200d", "e\u0301\u0301", "\u0301", "\ufffd"]
ENDLESS_BYTES = [b"a", b"\xff", b"\x80", b"\xe4\xbd", b"\xf0", b"\xf0\x9f\x98\x80", b"\xb1\xd8"]
FAMILY = "👩\u200d👩\u200d👧"  # three people joined by ZWJ
LINES = [
    "Once upon a time there was a little fox who lived in a red house by the sea.",
    "The quick brown fox jumps over the lazy dog; 12 + 30 = 42.",
    "从前有一只小狐狸住在海边。 むかしむかし。 옛날 옛적에.",
    f"เก็บกุญแจ क्षत्रिय {FAMILY} 👍🏽 🇩🇪🇫🇷 café ✈️ مرحبا שלום",
]
SNIPPETS = [
    *(
        "a|b|z|1|9|.|,|\n| |  | the|fox |é|ß|Привет|ξ|你|好吗|む|が|옛|\r\n|😀|👍🏽|🇩🇪|🇫🇷|🇯|✈️|1\ufe0f\u20e3|↔\ufe0f"
    ).split("|"),
    *(
        "\u200d|\ufe0f|🏽|क्षि|नि|กำ|ก็|مَرحبا|שָׁלוֹם|\u0301|e\u0301|你\u0301|か\u3099|\u1100\u1161\u11a8|\u0600|\ufffd"
    ).split("|"),
    FAMILY,
]
METASPACE_PIECES = [*"▁abcdefghijklmnopqrstuvwxyz.,19é你", "▁the", "▁fox", "▁a", "</s>"]
TEXTS = st.lists(st.sampled_from(SNIPPETS), max_size=24).map("".join)


@cache
def byte_level() -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|turn|>"],
        show_progress=False,
    )
    backend.train_from_iterator(LINES, trainer)
    backend.add_special_tokens([AddedToken("<|reserved|>", special=True)])
    backend.add_tokens([AddedToken("<think>", special=False)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>"))


@cache
def byte_fallback() -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁"]
    pieces += [*"abcdefghijklmnopqrstuvwxyz.,19", "é", "你", "\u0301", "\u200d", "👩", "😀", "क", "์", "ก", "\ufffd"]
    pieces += ["▁t", "he", "▁the"]
    backend = Backend(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("▁", "▁"), ("▁", "t"), ("h", "e"), ("▁t", "he")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    )


@cache
def metaspace() -> Tokenizer:
    """As T5 and the first XLNet: a space begins a piece, and one is put before the text."""
    backend = Backend(models.Unigram([("<unk>", 0.0), *((piece, -len(piece)) for piece in METASPACE_PIECES)], 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"))


@cache
def word_pieces() -> Tokenizer:
    """As BERT: a decoder writes the space before a word that does not go on with ##, and none before a full stop."""
    pieces = ["[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz.,!'19", "the", "fox", "n't", "你", "é"]
    pieces += [f"##{piece}" for piece in [*"abcdefghijklmnopqrstuvwxyz19", "ing", "é"]]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    return Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", eos_token="[SEP]")
    )


@cache
def words() -> Tokenizer:
    """Whole words and no decoder: tokens are joined by spaces."""
    vocab = {word: index for index, word in enumerate(["<unk>", "</s>", "the", "fox", "a", "b", ".", "你"])}
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"))


@cache
def word_ends() -> Tokenizer:
    """As the first GPT: </w> ends a word, and is no space at the end of a text."""
    letters = "abcdefghijklmnopqrstuvwxyz.,19"
    pieces = ["<unk>", "</s>", *letters, *(f"{letter}</w>" for letter in letters), "th", "the</w>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(
        vocab, [("t", "h"), ("th", "e</w>")], unk_token="<unk>", end_of_word_suffix="</w>", fuse_unk=True
    )
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder("</w>")
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"))


EVERY_KIND = pytest.mark.parametrize(
    "make", [byte_level, byte_fallback, metaspace, word_pieces, words, word_ends], ids=lambda make: make.__name__
)
KINDS = pytest.mark.parametrize("make", [byte_level, byte_fallback], ids=lambda make: make.__name__)


class CountingTokenizer(Tokenizer):
    num_decoded = 0

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.num_decoded += len(token_ids)
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


def byte_id(tokenizer: Tokenizer, byte: int) -> int:
    """The token that stands for one byte, in either kind of tokenizer."""
    vocab = tokenizer._hf.get_vocab()
    if tokenizer.byte_tokens:
        return vocab[f"<0x{byte:02X}>"]
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]  # as in GPT-2
    others = [b for b in range(256) if b not in printable]
    return vocab[chr(byte) if byte in printable else chr(256 + others.index(byte))]
