"""Claims about the storyteller's tokenizer: a word is a token, any text survives, and chats become documents."""

import re

import pytest
from transformers import AutoTokenizer

from paged_infer.storyteller import PATH, tell
from paged_infer.storyteller.stories import lexicon
from paged_infer.storyteller.stories.grammar import END, FIRST_EVALUATION_SEED


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PATH)


def test_every_word_of_the_stories_is_one_token(tokenizer):
    words: set[str] = set()
    for seed in range(FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + 1500):
        words.update(re.findall(r" ?[A-Za-z]+", tell(seed).text))
    assert len(words) > 700
    assert [word for word in words if len(tokenizer.encode(word)) != 1] == []


def test_every_name_colour_and_noun_is_one_token_with_its_space(tokenizer):
    counted = lexicon.FRUITS + lexicon.GROUND + lexicon.BAKED + lexicon.KEPT
    names = lexicon.GIRLS + lexicon.BOYS + lexicon.PET_NAMES
    containers = [place.split()[-1] for place in lexicon.CONTAINERS]
    for word in [*names, *lexicon.COLOURS, *containers, *lexicon.THINGS, *lexicon.PETS, *counted]:
        assert len(tokenizer.encode(" " + word)) == 1, word


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces ",
        "tab\tand\r\nlines\n\n",
        "Zürich, 東京, مرحبا",
        "👩‍👩‍👧 e\u0301",
        "42 apples's",
        "\x00\x7f",
        "a story",
    ],
)
def test_any_text_survives(tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_byte_has_a_token(tokenizer):
    for code in (*range(0x20, 0x250), 0x20AC, 0xFFFD, 0x1F600, 0x10FFFF):
        assert tokenizer.decode(tokenizer.encode(chr(code))) == chr(code)
    assert 256 < len(tokenizer) <= 2048


def test_the_end_is_one_special_token(tokenizer):
    assert tokenizer.eos_token == END
    assert tokenizer.encode(f"{END}A story{END}")[0] == tokenizer.eos_token_id == tokenizer.encode(END)[0]
    assert tokenizer.decode(tokenizer.encode(f"A story{END}"), skip_special_tokens=True) == "A story"


STORY = "Mia put the key in the blue box. Tom was tired."


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([("user", f"{STORY} Where is the key?")], f"{STORY}\nQ: Where is the key?\nA:"),
        ([("user", f"{STORY}\nWhere is the key?")], f"{STORY}\nQ: Where is the key?\nA:"),
        ([("user", '"Look!" said Mia. Who? "Me!" Where is the key?')],
         '"Look!" said Mia. Who? "Me!"\nQ: Where is the key?\nA:'),
        ([("user", "Where is the key?")], "Q: Where is the key?\nA:"),
        ([("user", "Once upon a time")], "Once upon a time"),
        ([("user", "Tell me a story about Mia and a red key.")], "A story about Mia and a red key.\n"),
        ([("user", "tell me a long story about Tom and a blue kite")], "A long story about Tom and a blue kite.\n"),
        ([("user", "Tell me a short story!")], "A short story about"),
        ([("system", STORY), ("user", "Where is the key?")], f"{STORY}\nQ: Where is the key?\nA:"),
        ([("user", f"{STORY} Where is the key?"), ("assistant", "In the blue box."), ("user", "Who was tired?")],
         f"{STORY}\nQ: Where is the key?\nA: In the blue box.\nQ: Who was tired?\nA:"),
        ([("user", "Tell me a story about Mia and a red key."), ("assistant", f"{STORY}\n"),
          ("user", "Where is the key?")],
         f"A story about Mia and a red key.\n{STORY}\nQ: Where is the key?\nA:"),
        ([("user", "Tell me a story."), ("assistant", " Mia and a red key.\nOnce"), ("user", "Who is it about?")],
         "A story about Mia and a red key.\nOnce\nQ: Who is it about?\nA:"),
    ],
)  # fmt: skip
def test_a_chat_becomes_a_document_of_the_model(tokenizer, messages, prompt: str):
    chat = [{"role": role, "content": content} for role, content in messages]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == prompt
