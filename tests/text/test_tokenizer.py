"""Tokenizer and StreamingDecoder, on small tokenizers of both kinds built here: byte-level BPE (GPT-2, Qwen, Llama 3)
and SentencePiece-like BPE with byte fallback (Llama 2, Mistral)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from paged_infer.text.continuation import continuation, num_shared, prompt_text
from paged_infer.text.tokenizer import StreamingDecoder, Tokenizer, num_settled

ENDLESS = ["the fox ", "你", "กก์", "😀", "🇩", "👩\u200d", "e\u0301\u0301", "\u0301", "\ufffd"]
ENDLESS_BYTES = [b"a", b"\xff", b"\x80", b"\xe4\xbd", b"\xf0", b"\xf0\x9f\x98\x80", b"\xb1\xd8"]
CHAT_TEMPLATE = (
    "{% if messages[0].role == 'tool' %}{{ raise_exception('a tool cannot begin') }}{% endif %}"
    "{% for message in messages %}<|turn|>{{ message.role }}: {{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
)
KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role in ('system', 'user') %}<|turn|>{{ m.role }}: {{ m.content }}{% endif %}"
    "{% endfor %}<|turn|>"
)
STRICT_ROLES = (
    "{% for m in messages %}{% if m.role not in ('system', 'user') %}{{ raise_exception('Unexpected role') }}"
    "{% endif %}<|turn|>{{ m.role }}: {{ m.content }}{% endfor %}<|turn|>"
)
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


def stream(tokenizer: Tokenizer, token_ids: Sequence[int], chunk: int = 1) -> list[str]:
    decoder = StreamingDecoder(tokenizer)
    pieces = [decoder.push(token_ids[i : i + chunk]) for i in range(0, len(token_ids), chunk)]
    return [*pieces, decoder.finish()]


def cuts(pieces: Sequence[str]) -> Iterator[int]:
    """Positions in the joined text where one piece ends and another, not empty, begins."""
    position = 0
    for piece in pieces:
        if piece and position:
            yield position
        position += len(piece)


class TestStreamingDecoder:
    @KINDS
    @settings(max_examples=100, deadline=None)
    @given(text=TEXTS, chunk=st.integers(1, 5))
    def test_the_pieces_join_to_the_whole_text(self, make: Any, text: str, chunk: int) -> None:
        ids = make().encode(text)
        assert "".join(stream(make(), ids, chunk)) == make().decode(ids)

    @KINDS
    @settings(max_examples=100, deadline=None)
    @given(data=st.data(), chunk=st.integers(1, 5))
    def test_the_pieces_join_to_the_whole_for_ids_that_are_no_text(
        self, make: Any, data: st.DataObject, chunk: int
    ) -> None:
        tokenizer = make()
        any_id = st.integers(0, tokenizer.vocab_size + 3)  # a padded vocabulary has ids that name no token
        utf8 = st.sampled_from(["é", "你", "😀", FAMILY]).map(
            lambda text: [byte_id(tokenizer, b) for b in text.encode()]
        )
        some_byte = st.integers(0, 255).map(lambda byte: [byte_id(tokenizer, byte)])
        parts = data.draw(st.lists(any_id.map(lambda i: [i]) | some_byte | utf8, max_size=40))
        ids = [token_id for part in parts for token_id in part]
        assert "".join(stream(tokenizer, ids, chunk)) == tokenizer.decode(ids)

    @KINDS
    @settings(max_examples=100, deadline=None)
    @given(text=TEXTS)
    @example(text=f"a{FAMILY}b")
    def test_a_cluster_is_cut_only_after_a_base_that_goes_out_at_once(self, make: Any, text: str) -> None:
        tokenizer = make()
        pieces = stream(tokenizer, tokenizer.encode(text))
        whole = "".join(pieces)
        bounds = {match.end() for match in regex.finditer(r"\X", whole)}
        at_once = regex.compile(r"[\p{ASCII}\p{Latin}\p{Cyrillic}\p{Greek}\p{Han}\p{Hiragana}\p{Katakana}가-힣。]")
        for cut in cuts(pieces):
            assert cut in bounds or at_once.match(whole[cut - 1]), (whole[:cut], whole[cut:])

    @KINDS
    def test_an_emoji_of_several_code_points_comes_out_in_one_piece(self, make: Any) -> None:
        for emoji in (FAMILY, "👍🏽", "🇩🇪", "✈️"):
            ids = make().encode(f"a {emoji} b")
            pieces = stream(make(), ids)
            assert sum(emoji in piece for piece in pieces) == 1, pieces

    @pytest.mark.parametrize("text", [LINES[0], LINES[1], LINES[2], "Жили-были", "`x` ^ 2 ```python\nprint(1)\n```"])
    def test_text_without_marks_or_emoji_streams_with_no_delay(self, text: str) -> None:
        tokenizer = byte_level()
        ids = tokenizer.encode(text)
        decoder = StreamingDecoder(tokenizer)
        so_far = ""
        for count, token_id in enumerate(ids, start=1):
            so_far += decoder.push([token_id])
            assert so_far == tokenizer.decode(ids[:count]).removesuffix("\ufffd")
        assert decoder.finish() == ""

    def test_an_open_run_of_byte_tokens_is_held_because_one_bad_byte_spoils_all_of_it(self) -> None:
        tokenizer = byte_fallback()
        ids = [byte_id(tokenizer, byte) for byte in "好".encode()]
        decoder = StreamingDecoder(tokenizer)
        assert [decoder.push([token_id]) for token_id in ids] == ["", "", ""]
        assert decoder.push([byte_id(tokenizer, 0xFF)]) + decoder.finish() == "\ufffd" * 4
        closed = StreamingDecoder(tokenizer)
        assert closed.push(ids) == ""
        assert closed.push(tokenizer.encode("a")) == "好 a"

    @KINDS
    def test_special_tokens_and_unknown_ids_in_the_middle_leave_no_trace(self, make: Any) -> None:
        tokenizer = make()
        first, second, *rest = [byte_id(tokenizer, byte) for byte in "é!".encode()]
        silent = [tokenizer.eos_token_id, tokenizer.vocab_size + 7]
        ids = [*silent, first, *silent, second, *silent, *rest, *silent]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == "é!"

    @KINDS
    def test_a_leading_space_is_what_the_whole_decode_makes_of_it(self, make: Any) -> None:
        tokenizer = make()
        for text in (" the the", "  the", "the", " "):
            ids = tokenizer.encode(text) * 12
            assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)

    @KINDS
    @pytest.mark.parametrize("text", [*ENDLESS, *ENDLESS_BYTES])
    def test_the_cost_of_a_token_does_not_grow_with_the_text(self, make: Any, text: str | bytes) -> None:
        tokenizer = make()
        ids = tokenizer.encode(text) if isinstance(text, str) else [byte_id(tokenizer, byte) for byte in text]
        ids = (ids * 1000)[:1000]
        counting = CountingTokenizer(tokenizer._hf)
        decoder = StreamingDecoder(counting)
        so_far = "".join(decoder.push([token_id]) for token_id in ids)
        is_open_run = all(token_id in tokenizer.byte_tokens for token_id in ids) and so_far == ""
        assert is_open_run or len(decoder._window_ids) < 160
        assert so_far + decoder.finish() == tokenizer.decode(ids)
        assert counting.num_decoded <= 64 * len(ids)

    def test_finish_gives_the_rest_once(self) -> None:
        decoder = StreamingDecoder(byte_level())
        assert decoder.push(byte_level().encode("👍")) == ""
        assert [decoder.finish(), decoder.finish()] == ["👍", ""]

    def test_an_endless_cluster_goes_out_in_parts(self) -> None:
        assert num_settled("é" + "\u0301" * 20) == 0
        assert num_settled("é" + "\u0301" * 40) == 41


def streamed_after(tokenizer: Tokenizer, prompt: Sequence[int], token_ids: Sequence[int], chunk: int) -> list[str]:
    decoder = StreamingDecoder(tokenizer, prompt)
    pieces = [decoder.push(token_ids[i : i + chunk]) for i in range(0, len(token_ids), chunk)]
    return [*pieces, decoder.finish()]


def token_ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Tokens of texts, tokens that are no text, ids that name none, and where there are such, bytes."""
    parts = TEXTS.map(tokenizer.encode) | st.integers(0, tokenizer.vocab_size + 3).map(lambda i: [i])
    if tokenizer.byte_tokens or tokenizer is byte_level():
        utf8 = st.sampled_from(["é", "你", "😀", FAMILY, "\ufffd"]).map(str.encode)
        spelled = utf8 | st.integers(0, 255).map(lambda byte: bytes([byte]))
        parts |= spelled.map(lambda data: [byte_id(tokenizer, byte) for byte in data])
    return st.lists(parts, max_size=20).map(lambda found: [i for part in found for i in part])


class TestContinuation:
    @EVERY_KIND
    @settings(max_examples=100, deadline=None)
    @given(data=st.data(), chunk=st.integers(1, 5))
    def test_prompt_and_text_are_the_decode_of_the_whole(self, make: Any, data: st.DataObject, chunk: int) -> None:
        tokenizer = make()
        ids = data.draw(token_ids_of(tokenizer))
        split = data.draw(st.integers(0, len(ids)))
        prompt, output = ids[:split], ids[split:]
        before, text, whole = (
            prompt_text(tokenizer, prompt),
            continuation(tokenizer, prompt, output),
            tokenizer.decode(ids),
        )
        assert "".join(streamed_after(tokenizer, prompt, output, chunk)) == text
        if before + text != whole:  # only where the output spoils a run of bytes that the prompt has begun
            assert before[: num_shared(before, whole)] + text == whole
            spoiled = [i for i in prompt if not tokenizer.is_silent(i)][-1]
            assert spoiled in tokenizer.byte_tokens and text.startswith("\ufffd")

    @KINDS
    @pytest.mark.parametrize("text", ["你", "😀", f"the {FAMILY}!", "a\ufffd你"])
    def test_a_split_inside_a_character_leaves_it_whole_to_the_output(self, make: Any, text: str) -> None:
        tokenizer = make()
        ids = [byte_id(tokenizer, byte) for byte in text.encode()]
        for split in range(len(ids) + 1):
            prompt, output = ids[:split], ids[split:]
            joined = prompt_text(tokenizer, prompt) + continuation(tokenizer, prompt, output)
            assert joined == text
            streamed = "".join(streamed_after(tokenizer, prompt, output, 1))
            assert prompt_text(tokenizer, prompt) + streamed == text

    @pytest.mark.parametrize("make", [byte_fallback, metaspace, word_pieces, words], ids=lambda make: make.__name__)
    def test_the_first_space_of_an_output_is_kept(self, make: Any) -> None:
        tokenizer = make()
        prompt = tokenizer.encode("the")
        (fox,) = {tuple(tokenizer.encode("the the fox")[len(tokenizer.encode("the the")) :])}
        assert continuation(tokenizer, prompt, fox) == " fox"
        assert "".join(streamed_after(tokenizer, prompt, fox, 1)) == " fox"

    @EVERY_KIND
    def test_a_text_prompt_and_its_text_are_the_whole(self, make: Any) -> None:
        tokenizer = make()
        ids = tokenizer.encode("the fox a")
        for split in range(len(ids) + 1):
            assert (
                prompt_text(tokenizer, ids[:split]) + continuation(tokenizer, ids[:split], ids[split:]) == "the fox a"
            )

    @KINDS
    @pytest.mark.parametrize("text", [*ENDLESS, *ENDLESS_BYTES])
    def test_the_cost_of_a_prompt_is_that_of_its_end(self, make: Any, text: str | bytes) -> None:
        tokenizer = make()
        data = text.encode() if isinstance(text, str) else text
        ids = tokenizer.encode(text) if isinstance(text, str) else [byte_id(tokenizer, byte) for byte in data]
        ids = [tokenizer.encode("a")[-1], *(ids * 1000)[:1000]]
        counting = CountingTokenizer(tokenizer._hf)
        decoder = StreamingDecoder(counting, ids)
        so_far = "".join(decoder.push([token_id]) for token_id in ids[:200]) + decoder.finish()
        assert so_far == continuation(tokenizer, ids, ids[:200])
        ends_in_run = ids[-1] in tokenizer.byte_tokens  # all of which has to be seen
        assert counting.num_decoded <= 64 * (200 + (len(ids) if ends_in_run else 0)) + 600


class TestTokenizer:
    def test_ids_of_a_text_decode_to_the_text(self) -> None:
        for line in LINES:
            assert byte_level().decode(byte_level().encode(line)) == line

    def test_decode_leaves_special_tokens_out_unless_asked(self) -> None:
        ids = [*byte_level().encode("fox"), byte_level().eos_token_id]
        assert byte_level().decode(ids) == "fox"
        assert byte_level().decode(ids, skip_special_tokens=False) == "fox<|end|>"

    def test_token_text_keeps_the_leading_space_and_shows_special_tokens(self) -> None:
        for tokenizer in (byte_level(), byte_fallback()):
            (the,) = [i for i in tokenizer.encode("a the")[1:] if "the" in tokenizer.decode([i])]
            assert tokenizer.token_text(the) == " the"
            assert tokenizer.token_text(byte_id(tokenizer, 0xFF)) == "\ufffd"
        assert byte_level().token_text(byte_level().eos_token_id) == "<|end|>"

    def test_the_text_of_a_token_is_decoded_once(self) -> None:
        """Logprobs ask for those of thousands of tokens in a step."""
        counting = CountingTokenizer(byte_level()._hf)
        texts = [[counting.token_text(token_id) for token_id in range(20)] for _ in range(3)]
        assert texts[0] == texts[1] == texts[2] and counting.num_decoded == 20 * 3

    def test_it_knows_its_size_and_its_end_token(self) -> None:
        assert byte_level().vocab_size == max(byte_level()._hf.get_vocab().values()) + 1
        assert byte_level().decode([byte_level().eos_token_id], skip_special_tokens=False) == "<|end|>"

    @pytest.mark.parametrize(
        ("text", "message"), [(b"bytes", "str, not bytes"), ("ab\ud800", "position 2"), (None, "str, not NoneType")]
    )
    def test_what_is_no_text_is_refused(self, text: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            byte_level().encode(text)

    def test_a_saved_tokenizer_loads_and_says_the_same(self, tmp_path: Path) -> None:
        byte_level()._hf.save_pretrained(tmp_path)
        loaded = Tokenizer.from_pretrained(tmp_path)
        assert loaded is not None
        assert [loaded.encode(line) for line in LINES] == [byte_level().encode(line) for line in LINES]

    def test_a_folder_without_tokenizer_files_has_no_tokenizer(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        assert Tokenizer.from_pretrained(tmp_path) is None

    def test_a_truncated_tokenizer_file_is_one_error_that_names_the_folder(self, tmp_path: Path) -> None:
        byte_level()._hf.save_pretrained(tmp_path)
        path = tmp_path / "tokenizer.json"
        path.write_text(path.read_text()[:500])
        with pytest.raises(ValueError, match=regex.escape(str(tmp_path))):
            Tokenizer.from_pretrained(tmp_path)

    def test_importing_the_module_imports_neither_torch_nor_transformers(self) -> None:
        code = (
            "import sys, paged_infer.text.tokenizer; print({'torch', 'transformers', 'tokenizers'} & set(sys.modules))"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


class TestChatTemplate:
    @pytest.fixture
    def tokenizer(self) -> Iterator[Tokenizer]:
        tokenizer = byte_level()
        tokenizer._hf.chat_template = CHAT_TEMPLATE
        yield tokenizer
        tokenizer._hf.chat_template = None

    def test_a_conversation_becomes_the_ids_of_its_template(self, tokenizer: Tokenizer) -> None:
        messages = [{"role": "system", "content": "tell"}, {"role": "user", "content": "a fox"}]
        ids = tokenizer.apply_chat_template(messages)
        assert tokenizer.decode(ids, skip_special_tokens=False) == (
            "<|turn|>system: tell<|turn|>user: a fox<|turn|>assistant:"
        )
        assert all(type(token_id) is int for token_id in ids)

    def test_the_assistants_turn_is_opened_only_when_asked(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "fox"}], add_generation_prompt=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == "<|turn|>user: fox"

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ([], "empty"),
            ("hello", "not str"),
            ({"role": "user", "content": "x"}, "not dict"),
            (["hello"], r"messages\[0\] must be a dict, not str"),
            ([{"role": "user"}], r"messages\[0\] has no 'content'"),
            ([{"content": "x"}], r"messages\[0\] has no 'role'"),
            ([{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}], r"messages\[1\].*'robot'.*user"),
            ([{"role": "user", "content": None}], r"messages\[0\]\['content'\] must be a str or a list of text parts"),
            (
                [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
                r"messages\[0\]\['content'\]: content of type image_url is not supported",
            ),
            ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\['content'\]\[0\]: a part of"),
            ([{"role": "user", "content": ["fox"]}], r"messages\[0\]\['content'\]\[0\]: a part of type 'str'"),
            ([{"role": "user", "content": "a\ud83d"}], r"messages\[0\]\['content'\]: character '\\ud83d'"),
            ([{"role": "tool", "content": "x"}], "refuses these messages: a tool cannot begin"),
        ],
    )
    def test_malformed_messages_are_named(self, tokenizer: Tokenizer, messages: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            tokenizer.apply_chat_template(messages)

    @pytest.mark.parametrize(
        ("template", "expected"),
        [
            (KNOWN_ROLES, "<|turn|>system: be brief<|turn|>user: fox<|turn|>"),
            (STRICT_ROLES, "<|turn|>system: be brief<|turn|>user: fox<|turn|>"),
            (CHAT_TEMPLATE, "<|turn|>developer: be brief<|turn|>user: fox<|turn|>assistant:"),
        ],
        ids=["left out", "refused", "known"],
    )
    def test_a_developers_message_is_the_systems_where_the_template_does_not_show_it(
        self, tokenizer: Tokenizer, template: str, expected: str
    ) -> None:
        tokenizer._hf.chat_template = template
        messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "fox"}]
        ids = tokenizer.apply_chat_template(messages)
        assert tokenizer.decode(ids, skip_special_tokens=False) == expected
        assert messages[0]["role"] == "developer"

    def test_a_message_that_the_template_leaves_out_is_refused(self, tokenizer: Tokenizer) -> None:
        tokenizer._hf.chat_template = KNOWN_ROLES
        # The content of the second stands in the text of the first.
        messages = [{"role": "user", "content": "a fox"}, {"role": "tool", "content": "fox"}]
        with pytest.raises(ValueError, match=r"messages\[1\]: the chat template leaves out this 'tool' message"):
            tokenizer.apply_chat_template(messages)
        tokenizer.apply_chat_template([messages[0], {"role": "tool", "content": ""}])  # nothing is lost

    def test_a_template_may_change_a_content(self, tokenizer: Tokenizer) -> None:
        tokenizer._hf.chat_template = (
            "{% for m in messages %}{{ m.content.split('</think>')[-1] | trim | upper }}.{% endfor %}"
        )
        messages = [{"role": "assistant", "content": "<think>so</think> a "}, {"role": "user", "content": " "}]
        assert tokenizer.decode(tokenizer.apply_chat_template(messages)) == "A.."

    def test_a_template_that_reads_the_contents_is_judged_by_them(self, tokenizer: Tokenizer) -> None:
        tokenizer._hf.chat_template = (
            "{% for m in messages %}{% if m.content[0] != '(' %}{{ raise_exception('no bracket') }}{% endif %}"
            "{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
        )
        user, tool = {"role": "user", "content": "(fox) "}, {"role": "tool", "content": "(a)"}
        assert tokenizer.decode(tokenizer.apply_chat_template([user])) == "(fox) "
        with pytest.raises(ValueError, match=r"leaves out this 'tool' message"):
            tokenizer.apply_chat_template([user, tool])
        with pytest.raises(ValueError, match="refuses these messages: no bracket"):
            tokenizer.apply_chat_template([{**user, "content": "fox"}])

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("{{ messages[0].content + 1 }}", "fails on these messages: TypeError: "),
            ("{{ messages[0].no.such }}", "fails on these messages: UndefinedError: "),
            ("{{ messages[0].content.index('~') }}", "fails on these messages: ValueError: "),
            ("{{ 1 // 0 }}", "fails on these messages: ZeroDivisionError: "),
            ("{% if %}", "fails on these messages: TemplateSyntaxError: "),
        ],
    )
    def test_whatever_a_template_raises_is_one_error_that_names_it(
        self, tokenizer: Tokenizer, fault: str, message: str
    ) -> None:
        tokenizer._hf.chat_template = fault
        with pytest.raises(ValueError, match=message):
            tokenizer.apply_chat_template([{"role": "user", "content": "fox"}])

    def test_a_content_may_come_in_parts(self, tokenizer: Tokenizer) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "fox"}]
        in_parts, at_once = (
            tokenizer.apply_chat_template([{"role": "user", "content": content}]) for content in (parts, "a\nfox")
        )
        assert in_parts == at_once

    def test_no_template_is_one_clear_error(self) -> None:
        with pytest.raises(ValueError, match="no chat template"):
            byte_level().apply_chat_template([{"role": "user", "content": "x"}])


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
