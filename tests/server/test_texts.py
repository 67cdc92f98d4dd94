"""What is served of texts where a decoder changes them: a tokenizer like Llama 2's, and a model with flat logits.

All logits of the model are equal, so a bias of 100 alone decides which tokens are drawn, and all logprobs are ties.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save_llama_tokenizer, save_random_checkpoint
from serving import Served, error_of, serving
from transformers import AutoModelForCausalLM

from paged_infer.server.openai.json_stream import chat_logprobs, token_names
from paged_infer.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role in ('system', 'user') %}{{ m.role }}: {{ m.content }} {% endif %}"
    "{% if m.content == 'fail' %}{{ m.content + 1 }}{% endif %}{% endfor %}"
)
PROMPT = "Once"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = save_random_checkpoint("llama2", tmp_path_factory.mktemp("random"))
    model = AutoModelForCausalLM.from_pretrained(random)
    model.lm_head.weight.data.zero_()
    path = tmp_path_factory.mktemp("flat")
    model.save_pretrained(path)
    save_llama_tokenizer(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def flat(folder: Path) -> Iterator[Served]:
    with serving(model=str(folder), max_num_seqs=8, num_blocks=64) as served:
        yield served


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    found = Tokenizer.from_pretrained(folder)
    assert found is not None
    return found


def drawn_from(tokenizer: Tokenizer, pieces: str) -> dict[str, Any]:
    """Fields that let only these pieces be drawn."""
    vocab = tokenizer._hf.get_vocab()
    ids = [vocab[piece] for piece in pieces.split()]
    return {"logit_bias": {str(i): 100 for i in ids}, "max_tokens": 24, "seed": 7, "ignore_eos": True}


def streamed(served: Served, **body: Any) -> list[dict[str, Any]]:
    response = served.post("/v1/completions", **body, stream=True)
    assert response.status_code == 200, response.text
    return [json.loads(line.removeprefix("data: "))["choices"][0] for line in response.text.split("\n\n")[:-2]]


@pytest.mark.parametrize("prompt", [PROMPT, [1, 271, 3 + 0xE4]], ids=["text", "begun character"])
def test_prompt_and_text_are_the_decode_of_the_whole(flat, tokenizer, prompt) -> None:
    body = {"prompt": prompt, **drawn_from(tokenizer, "▁ ▁the B o <0xE4> <0xBD> <0xA0>"), "n": 3}
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    names = flat.complete(**body, logprobs=0)["choices"]
    id_of = {tokenizer.token_text(i): i for i in range(3, len(tokenizer._hf))}
    id_of |= {f"bytes:\\x{byte:02x}": i for i, byte in tokenizer.byte_tokens.items()}
    wholes = [tokenizer.decode([*ids, *(id_of[n] for n in one["logprobs"]["tokens"])]) for one in names]
    assert [one["text"] for one in flat.complete(**body, echo=True)["choices"]] == wholes
    texts = ["", "", ""]
    for one in streamed(flat, **body, echo=True):
        texts[one["index"]] += one["text"]
    assert texts == wholes
    if isinstance(prompt, str):
        assert [prompt + one["text"] for one in names] == wholes


def test_a_first_space_can_stop_the_text(flat, tokenizer) -> None:
    body = {"prompt": PROMPT, **drawn_from(tokenizer, "▁the")}
    (choice,) = flat.complete(**body, stop=" th")["choices"]
    assert (choice["text"], choice["stop_reason"]) == ("", " th")
    assert flat.complete(**body)["choices"][0]["text"] == " the" * 24


@pytest.mark.parametrize("echo", [False, True])
def test_an_offset_is_the_place_of_its_token_in_the_text(flat, tokenizer, echo) -> None:
    body = {"prompt": PROMPT, "echo": echo, "logprobs": 0, **drawn_from(tokenizer, "▁ ▁the B </s> <0x42>")}
    (choice,) = flat.complete(**body)["choices"]
    tokens, offsets = (choice["logprobs"][name] for name in ("tokens", "text_offset"))
    assert {" the", "B", "</s>"} <= set(tokens) and offsets[0] == 0
    joined = choice["text"]
    for token, offset in zip(tokens, offsets, strict=True):
        is_silent, is_first = token in ("<s>", "</s>"), echo and offset == 0
        assert is_silent or joined.startswith(token.lstrip() if is_first else token, offset), (token, offset)
    ends = [*offsets[1:], len(joined)]
    spoken = [joined[a:b] for a, b in zip(offsets, ends, strict=True)]
    assert "".join(spoken) == joined
    pieces = [one["logprobs"] for one in streamed(flat, **body)]
    assert [offset for piece in pieces for offset in piece["text_offset"]] == offsets


def test_a_part_of_a_character_has_its_own_bytes(flat, tokenizer) -> None:
    bias = drawn_from(tokenizer, "<0xE4> <0xBD> <0xA0>")
    body = {"messages": [{"role": "user", "content": "?"}], "logprobs": True, "top_logprobs": 20, **bias}
    content = flat.post("/v1/chat/completions", **body).json()["choices"][0]["logprobs"]["content"]
    assert {tuple(one["bytes"]) for one in content} == {(0xE4,), (0xBD,), (0xA0,)}
    (choice,) = flat.complete(prompt=PROMPT, **bias, logprobs=20)["choices"]
    assert set(choice["logprobs"]["tokens"]) == {"bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0"}


def test_ties_make_no_top_logprobs_more_than_were_asked_for(flat, tokenizer) -> None:
    """All 1003 tokens are equal, and what is drawn is none of the first."""
    bias = drawn_from(tokenizer, "B o")
    body = {"messages": [{"role": "user", "content": "?"}], "logprobs": True, **bias}
    for num_top in (0, 1, 3):
        answer = flat.post("/v1/chat/completions", **body, top_logprobs=num_top).json()
        for one in answer["choices"][0]["logprobs"]["content"]:
            assert len(one["top_logprobs"]) == num_top
            assert not num_top or one["top_logprobs"][0]["token"] == one["token"]
        (choice,) = flat.complete(prompt=PROMPT, **bias, logprobs=num_top)["choices"]
        assert all(len(top) == max(1, num_top) for top in choice["logprobs"]["top_logprobs"])


@pytest.mark.parametrize("num_top", [1, 5, 20])
def test_every_token_is_the_key_of_its_logprob_and_no_entry_is_lost(flat, tokenizer, num_top) -> None:
    body = {"prompt": PROMPT, **drawn_from(tokenizer, "B <0x42> ▁ <0x20> <0xE4>"), "echo": True}
    (choice,) = flat.complete(**body, logprobs=num_top)["choices"]
    found = choice["logprobs"]
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    rows = zip(found["tokens"][1:], found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True)
    for token, logprob, top in rows:
        assert top[token] == logprob and len(top) == num_top


def test_tokens_of_one_text_have_names_of_their_own(tokenizer) -> None:
    vocab = tokenizer._hf.get_vocab()
    upper, spelled, lead = vocab["B"], vocab["<0x42>"], vocab["<0xE4>"]
    assert token_names([spelled, upper, lead, 1000], tokenizer) == {
        spelled: "B",
        upper: f"token_id:{upper}",
        lead: "bytes:\\xe4",
        1000: "token_id:1000",
    }
    assert token_names([5, 6], None) == {5: "token_id:5", 6: "token_id:6"}
    assert chat_logprobs([], [], 3, None) == {"content": [], "refusal": None}


@pytest.mark.parametrize("stream", [False, True])
def test_a_special_token_as_a_stop_string_ends_the_text(flat, tokenizer, stream) -> None:
    body = {"prompt": PROMPT, **drawn_from(tokenizer, "B </s>"), "max_tokens": 200, "stop": ["</s>"]}
    pieces = streamed(flat, **body) if stream else flat.complete(**body)["choices"]
    text = "".join(piece["text"] for piece in pieces)
    assert (pieces[-1]["finish_reason"], pieces[-1]["stop_reason"]) == ("stop", "</s>")
    assert text == "B" * len(text) and len(text) < 200


def test_a_developers_message_is_read(flat, tokenizer) -> None:
    prompts = [
        flat.post("/v1/chat/completions", messages=[{"role": role, "content": "be brief"}], max_tokens=1).json()[
            "usage"
        ]["prompt_tokens"]
        for role in ("system", "developer")
    ]
    assert prompts[0] == prompts[1] > 8


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "tool", "content": "42"}, "leaves out this 'tool' message"),
        ({"role": "user", "content": "fail"}, "fails on these messages: TypeError"),
    ],
)
def test_what_a_template_cannot_take_is_a_400_that_says_why(flat, message, words) -> None:
    error = error_of(flat.post("/v1/chat/completions", messages=[message], max_tokens=1), 400)
    assert words in error["message"] and error["param"] == "messages"
