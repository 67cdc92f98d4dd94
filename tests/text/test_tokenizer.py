"""Tokenizer: ids, texts and conversations, and one clear error for what is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import regex
from small_tokenizers import LINES, CountingTokenizer, byte_fallback, byte_id, byte_level

from paged_infer.text.tokenizer import Tokenizer

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
            ([{"role": "tool", "content": "x"}], "rejects these messages: a tool cannot begin"),
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
        with pytest.raises(ValueError, match="rejects these messages: no bracket"):
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
