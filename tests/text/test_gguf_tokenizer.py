"""The tokenizer built from a GGUF file's metadata: the ids and texts of the one that it was written from."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save_llama_tokenizer
from gguf_files import random_model, save_gguf
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import LINES, TEXTS
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from paged_infer.model.loading.gguf_file import GgufFile
from paged_infer.text.gguf_tokenizer import PRE_TOKENIZERS, gguf_tokenizer
from paged_infer.text.tokenizer import Tokenizer

CODE = "def f(x):\n    return x  # 1234567 + 3.14\n\n\n\tend  \r\n  'tis IT'S we'LL"
PRE_TOKENIZER_OF = {  # as each model's tokenizer.json has it
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    **{
        name: [
            pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        for name in ("llama-bpe", "qwen2")
    },
}
Fields = dict[str, Any]


def built(fields: Fields, architecture: str = "llama") -> Tokenizer:
    metadata = {f"tokenizer.{key}": value for key, value in fields.items()}
    return Tokenizer(
        gguf_tokenizer(GgufFile(Path("model.gguf"), {"general.architecture": architecture, **metadata}, {}))
    )


@cache
def trained(name: str) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZER_OF[name])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|turn|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator([*LINES, CODE] * 3, trainer)
    return backend


@cache
def byte_level_fields(name: str) -> Fields:
    model = json.loads(trained(name).to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "ggml.model": "gpt2",
        "ggml.pre": name,
        "ggml.tokens": tokens,
        "ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 0,
        "ggml.add_bos_token": False,
    }


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Fields]:
    """A tokenizer of Llama 2's kind, and what a GGUF file holds of it."""
    folder = tmp_path_factory.mktemp("llama")
    vocabulary = save_llama_tokenizer(folder)
    tokens = sorted(vocabulary, key=vocabulary.get)
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    fields = {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.token_type": [kinds.get(token, 6 if token.startswith("<0x") else 1) for token in tokens],
        "ggml.scores": [-float(index) for index in range(len(tokens))],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
    }
    return AutoTokenizer.from_pretrained(folder), fields


class TestByteLevel:
    @pytest.mark.parametrize("name", PRE_TOKENIZER_OF)
    @given(text=st.one_of(TEXTS, st.text(max_size=30)))
    def test_ids_and_texts_are_those_of_the_tokenizer_that_was_stored(self, name: str, text: str) -> None:
        found, expected = _same_pair(name)
        for each in (text, CODE, *LINES):
            ids = found.encode(each)
            if name != "qwen2" or text.isascii():  # it normalises first, see below
                assert ids == expected.encode(each).ids
                assert found.decode(ids) == each

    def test_every_named_pre_tokenizer_but_llama_cpp_s_default_is_compared_here(self) -> None:
        assert PRE_TOKENIZERS.keys() - PRE_TOKENIZER_OF.keys() == {"default"}

    def test_the_default_splits_punctuation_and_long_numbers(self) -> None:
        tokenizer = built({**byte_level_fields("gpt-2"), "ggml.pre": "default"})
        parts = tokenizer._hf.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a+b=12345 c's")
        assert [part for part, _ in parts] == ["a", "+", "b", "=", "123", "45", "Ġc", "'", "s"]

    def test_qwen2_composes_characters_as_its_tokenizer_json_does(self) -> None:
        tokenizer = built(byte_level_fields("qwen2"))
        assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")

    def test_llama_3_takes_a_word_of_its_vocabulary_that_no_merge_reaches(self) -> None:
        fields = byte_level_fields("llama-bpe")
        extended = {
            **fields,
            "ggml.tokens": [*fields["ggml.tokens"], "zqzq"],
            "ggml.token_type": [*fields["ggml.token_type"], 1],
        }
        assert built(extended).encode("zqzq") == [len(fields["ggml.tokens"])]

    def test_special_tokens_in_a_text_are_one_id_and_left_out_of_what_is_decoded(self) -> None:
        tokenizer = built(byte_level_fields("smollm"))
        ids = tokenizer.encode("<|turn|>fox<|end|>")
        assert (ids[0], ids[-1]) == (1, 0) and tokenizer.decode(ids) == "fox"
        assert tokenizer.decode(ids, skip_special_tokens=False) == "<|turn|>fox<|end|>"
        assert tokenizer.eos_token_id == 0 and tokenizer.special_tokens == {"<|end|>": 0, "<|turn|>": 1}

    def test_a_user_defined_token_is_whole_and_stays_in_the_text(self) -> None:
        fields = byte_level_fields("smollm")
        types = [*fields["ggml.token_type"], 4]
        tokenizer = built({**fields, "ggml.tokens": [*fields["ggml.tokens"], "<think> now"], "ggml.token_type": types})
        ids = tokenizer.encode("fox<think> now")
        assert ids[-1] == len(types) - 1 and tokenizer.decode(ids) == "fox<think> now"

    def test_padding_of_the_embedding_is_no_token(self) -> None:
        fields = byte_level_fields("smollm")
        size = len(fields["ggml.tokens"])
        padded = {
            "ggml.tokens": [*fields["ggml.tokens"], f"[PAD{size}]", f"[PAD{size + 1}]"],
            "ggml.token_type": [*fields["ggml.token_type"], 5, 5],
        }
        tokenizer = built({**fields, **padded})
        assert tokenizer.vocab_size == size and tokenizer.is_silent(size) and tokenizer.decode([size, 300]) != ""

    def test_llama_3_begins_each_text_with_its_bos_unless_the_file_denies_it(self) -> None:
        fields = byte_level_fields("llama-bpe")
        asked = {key: value for key, value in fields.items() if key != "ggml.add_bos_token"}
        assert built(asked).encode("fox")[0] == 1 and built(fields).encode("fox")[0] != 1
        both = built({**asked, "ggml.add_eos_token": True}).encode("fox")
        assert (both[0], both[-1]) == (1, 0)


@cache
def _same_pair(name: str) -> tuple[Tokenizer, Backend]:
    return built(byte_level_fields(name)), trained(name)


class TestSentencePiece:
    def test_ids_and_texts_are_those_of_the_tokenizer_that_was_stored(self, sentencepiece: tuple[Any, Fields]) -> None:
        expected, fields = sentencepiece
        found = built(fields)
        for text in (*LINES, CODE, "", " ", "  the  the", "the", "▁the", "你好 😀"):
            assert found.encode(text) == expected.encode(text)
            assert found.decode(found.encode(text)) == expected.decode(expected.encode(text), skip_special_tokens=True)
        assert found.byte_tokens and found.max_token_characters == Tokenizer(expected).max_token_characters

    def test_without_a_prefix_a_text_begins_as_it_is(self, sentencepiece: tuple[Any, Fields]) -> None:
        tokenizer = built({**sentencepiece[1], "ggml.add_space_prefix": False, "ggml.add_bos_token": False})
        for text in (*LINES, CODE, " the", "the"):
            assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_the_piece_of_the_higher_score_is_merged_first(self, sentencepiece: tuple[Any, Fields]) -> None:
        fields = {**sentencepiece[1], "ggml.add_space_prefix": False, "ggml.add_bos_token": False}
        tokens = [*fields["ggml.tokens"], "ab", "bc"]
        types, scores = [*fields["ggml.token_type"], 1, 1], fields["ggml.scores"]
        for best, last in (("ab", "c"), ("bc", "a")):
            more = [-500.0, -501.0] if best == "ab" else [-501.0, -500.0]
            changed = {**fields, "ggml.tokens": tokens, "ggml.token_type": types, "ggml.scores": [*scores, *more]}
            assert set(built(changed).encode("abc")) == {tokens.index(best), tokens.index(last)}

    def test_gemma_s_pieces_are_ranked_by_their_place(self, sentencepiece: tuple[Any, Fields]) -> None:
        fields = {**sentencepiece[1], "ggml.add_space_prefix": False, "ggml.add_bos_token": False}
        tokens = [*fields["ggml.tokens"], "ab", "bc"]
        scores = [*fields["ggml.scores"], -501.0, -500.0]
        changed = {
            **fields,
            "ggml.tokens": tokens,
            "ggml.token_type": [*fields["ggml.token_type"], 1, 1],
            "ggml.scores": scores,
        }
        assert tokens.index("ab") in built(changed, "gemma3").encode("abc")


class TestFile:
    def test_a_file_speaks_with_its_tokenizer_and_chat_template(self, tmp_path: Path) -> None:
        fields = {f"tokenizer.{key}".replace(".", "__"): v for key, v in byte_level_fields("smollm").items()}
        template = "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}"
        save_gguf(tmp_path / "m.gguf", random_model("qwen2"), **fields, tokenizer__chat_template=template)
        tokenizer = Tokenizer.from_pretrained(tmp_path / "m.gguf")
        assert tokenizer is not None
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "fox"}])
        assert tokenizer.decode(ids, skip_special_tokens=False) == "<|turn|>fox"

    def test_a_file_without_a_tokenizer_serves_token_ids(self, tmp_path: Path) -> None:
        save_gguf(tmp_path / "m.gguf", random_model("qwen2"))
        assert Tokenizer.from_pretrained(tmp_path / "m.gguf") is None

    def test_a_tokenizer_of_an_unknown_kind_is_refused_before_any_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from paged_infer import LLM
        from paged_infer.model.loading import load

        monkeypatch.setattr(load, "empty_decoder", lambda *args: pytest.fail("memory was allocated"))
        save_gguf(tmp_path / "m.gguf", random_model("qwen2"), tokenizer__ggml__model="rwkv")
        with pytest.raises(ValueError, match=r"m\.gguf: .*ggml\.model='rwkv': must be one of gpt2, llama"):
            LLM(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml.model": "t5"}, "tokenizer.ggml.model='t5': must be one of gpt2, llama"),
        ({"ggml.model": 7}, "tokenizer.ggml.model=7"),
        (
            {"ggml.pre": "tekken"},
            "tokenizer.ggml.pre='tekken': must be one of default, gpt-2, llama-bpe, qwen2, smollm",
        ),
        ({"ggml.tokens": None}, "lacks 'tokens'"),
        ({"ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens: must be a list of strings"),
        ({"ggml.merges": None}, "lacks 'merges'"),
        ({"ggml.merges": ["a b c"]}, "tokenizer.ggml.merges: 'a b c' is not two tokens"),
        ({"ggml.merges": ["never seen"]}, "never"),
        ({"ggml.token_type": [1, 2]}, "tokenizer.ggml.token_type: one number for each of"),
        ({"ggml.eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id=1000000: must be from 0 to"),
        ({"ggml.bos_token_id": None, "ggml.add_bos_token": True}, "lacks the id of the bos_token"),
        ({"ggml.precompiled_charsmap": [1]}, "tokenizer.ggml.precompiled_charsmap"),
        ({"ggml.model": "llama"}, "tokenizer.ggml.scores: one number for each of"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_refused_by_name(changes: Fields, message: str) -> None:
    fields = {**byte_level_fields("gpt-2"), **changes}
    with pytest.raises(ValueError) as error:
        built({key: value for key, value in fields.items() if value is not None})
    assert message in str(error.value)


def test_a_token_listed_twice_is_refused_with_its_ids() -> None:
    fields = byte_level_fields("gpt-2")
    tokens = [*fields["ggml.tokens"][:-1], fields["ggml.tokens"][5]]
    with pytest.raises(ValueError, match=rf"is both 5 and {len(tokens) - 1}"):
        built({**fields, "ggml.tokens": tokens})
