"""Each field of OpenAI's and vLLM's requests is served, or changes nothing, or is refused; the README lists them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from serving import CHAT, PROMPT, error_of, serving

from paged_infer import SamplingParams
from paged_infer.server.openai import field_table
from paged_infer.server.openai.fields import ACCEPTED
from paged_infer.server.openai.json_stream import FILLED
from paged_infer.server.openai.protocol import ChatCompletionRequest, CompletionRequest, StreamOptions

BODY: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
TALK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me a story about Mia and a red key."}],
    "max_tokens": 12,
    "temperature": 0,
}
BOTH = [("/v1/completions", BODY), ("/v1/chat/completions", TALK)]

VLLM = (  # of vLLM's CompletionRequest and ChatCompletionRequest, beside OpenAI's own
    "add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt chat_template "
    "chat_template_kwargs continue_final_message documents ec_transfer_params echo ignore_eos include_reasoning "
    "include_stop_str_in_output kv_transfer_params length_penalty logprob_token_ids media_io_kwargs min_p min_tokens "
    "mm_processor_kwargs priority prompt_embeds prompt_logprobs repetition_detection repetition_penalty request_id "
    "response_format return_mm_kwargs return_prompt_text return_token_ids return_token_offsets "
    "return_tokens_as_token_ids routed_experts_prompt_start session_id skip_special_tokens "
    "spaces_between_special_tokens stop_token_ids stream_interval structured_outputs thinking_token_budget top_k "
    "truncate_prompt_tokens truncation_side use_beam_search vllm_xargs watermarking"
).split()


def pieces(served, path: str, **body: Any) -> list[dict[str, Any]]:
    lines = served.post(path, **body, stream=True).text.split("\n\n")
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def text_of(choice: dict[str, Any]) -> str:
    return choice["text"] if "text" in choice else choice.get("message", choice.get("delta", {})).get("content", "")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (completion_create_params.CompletionCreateParamsStreaming, CompletionRequest),
        (chat_create_params.CompletionCreateParamsStreaming, ChatCompletionRequest),
    ],
)
def test_every_field_of_openais_client_and_of_vllm_is_known(theirs: Any, ours: Any) -> None:
    known = set(ours.model_fields) | set(ours.refused_by_name)
    assert set(theirs.__annotations__) - known == set(VLLM) - known == set()


def test_every_stream_option_of_openais_client_and_of_vllm_is_known() -> None:
    theirs = {*ChatCompletionStreamOptionsParam.__annotations__, "include_usage", "continuous_usage_stats"}
    assert set(StreamOptions.model_fields) == theirs


def test_the_readme_lists_the_fields_as_they_are() -> None:
    """Else: python -m paged_infer.server.openai.field_table"""
    text = field_table.README.read_text()
    assert text.count(field_table.BEGIN + field_table.table() + field_table.END) == 1


HARMLESS: dict[str, Any] = {
    "metadata": {"a": "b"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit", "ttl": "30m"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "me",
    "service_tier": "auto",
    "session_id": "s",
    "store": False,
    "user": "me",
}


@pytest.mark.parametrize(("path", "body"), BOTH)
def test_what_is_accepted_changes_nothing(served, path: str, body: Any) -> None:
    assert set(HARMLESS) == set(ACCEPTED)
    with_all = served.post(path, **body, **HARMLESS)
    assert with_all.status_code == 200, with_all.text
    assert with_all.json()["choices"] == served.post(path, **body).json()["choices"]


@pytest.mark.parametrize(("path", "body"), BOTH)
def test_continuous_usage_stats_are_in_every_piece(served, path: str, body: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    told_usages = [piece["usage"] for piece in pieces(served, path, **body, stream_options=options)]
    whole = served.post(path, **body).json()["usage"]
    counts = [usage["completion_tokens"] for usage in told_usages]
    assert counts == sorted(counts) and counts[0] >= 1
    assert counts[-2:] == [whole["completion_tokens"]] * 2  # of the last piece of text, and of the end
    assert {usage["prompt_tokens"] for usage in told_usages} == {whole["prompt_tokens"]}
    alone = pieces(served, path, **body, stream_options={"continuous_usage_stats": True})
    assert not [piece for piece in alone if "usage" in piece]  # as in vLLM: include_usage asks for any


def test_continuous_usage_stats_of_several_prompts_are_each_its_own(served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**BODY, "prompt": ["Once upon a time", "Mia"]}
    told_pieces = pieces(served, "/v1/completions", **body, stream_options=options)
    newest = {piece["choices"][0]["index"]: piece["usage"] for piece in told_pieces if piece["choices"]}
    assert [newest[index]["completion_tokens"] for index in (0, 1)] == [12, 12]
    assert told_pieces[-1]["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize(("path", "body"), BOTH)
def test_obfuscated_pieces_have_like_sizes_and_the_same_text(served, path: str, body: Any) -> None:
    plain = pieces(served, path, **body)
    response = served.post(path, **body, stream=True, stream_options={"include_obfuscation": True})
    events = [line for line in response.text.split("\n\n") if '"finish_reason"' in line]
    assert {(len(line) - len("data: ")) % FILLED for line in events if "obfuscation" in line} == {0}
    found = [json.loads(line[6:]) for line in events]
    assert any(piece.get("obfuscation") for piece in found)
    texts = ["".join(text_of(piece["choices"][0]) for piece in some) for some in (plain, found)]
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("n", [None, 2])
def test_best_of_as_many_as_n_is_n(served, n: int | None) -> None:
    body = {**BODY, "temperature": 1.0, "seed": 3, "n": n}
    choices = served.complete(**body, best_of=n or 1)["choices"]
    assert choices == served.complete(**body)["choices"] and len(choices) == (n or 1)
    assert "best_of=3" in error_of(served.post("/v1/completions", **body, best_of=3), 400)["message"]


def test_prompt_logprobs_are_those_of_the_offline_engine(served, storyteller) -> None:
    output = storyteller.generate(BODY["prompt"], SamplingParams(max_tokens=1, prompt_logprobs=2), use_tqdm=False)[0]
    rows = served.complete(prompt=BODY["prompt"], max_tokens=1, prompt_logprobs=2)["choices"][0]["prompt_logprobs"]
    assert rows[0] is None and output.prompt_logprobs[0] is None and len(rows) == len(output.prompt_token_ids)
    for row, expected in zip(rows[1:], output.prompt_logprobs[1:], strict=True):
        assert set(row) == {str(token_id) for token_id in expected}
        for token_id, entry in expected.items():
            assert row[str(token_id)]["logprob"] == pytest.approx(entry.logprob, abs=1e-4)
            assert row[str(token_id)]["decoded_token"] == entry.decoded_token


def test_a_chat_has_the_logprobs_and_the_tokens_of_its_prompt_beside_its_choices(served) -> None:
    answer = served.post("/v1/chat/completions", **CHAT, prompt_logprobs=0, return_token_ids=True).json()
    assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]
    assert [str(i) in row for i, row in zip(answer["prompt_token_ids"], answer["prompt_logprobs"], strict=True) if row]
    assert len(answer["choices"][0]["token_ids"]) == answer["usage"]["completion_tokens"]


def test_prompt_logprobs_are_refused_where_they_cannot_be_told(served) -> None:
    for more in ({"stream": True}, {"echo": True, "logprobs": 2}, {"use_beam_search": True}):
        body = {**PROMPT, "prompt_logprobs": 1, **more}
        assert error_of(served.post("/v1/completions", **body), 400)["param"] == "prompt_logprobs"
    assert served.complete(**PROMPT, prompt_logprobs=2, logprobs=2, echo=True)


@pytest.mark.parametrize(("path", "body", "prefix"), [(*BOTH[0], "cmpl"), (*BOTH[1], "chatcmpl")])
def test_a_request_id_is_the_end_of_the_answers_id(served, path: str, body: Any, prefix: str) -> None:
    assert served.post(path, **body, request_id="mine/1").json()["id"] == f"{prefix}-mine/1"
    assert {piece["id"] for piece in pieces(served, path, **body, request_id="m")} == {f"{prefix}-m"}
    error_of(served.post("/generate", **PROMPT, request_id="guessable"), 400)  # a job's id opens its answer


@pytest.mark.parametrize(("path", "body"), BOTH)
def test_token_ids_are_returned_whole_and_in_pieces(served, storyteller, path: str, body: Any) -> None:
    whole = served.post(path, **body, return_token_ids=True).json()
    choice = whole["choices"][0]
    assert len(choice["token_ids"]) == whole["usage"]["completion_tokens"]
    assert storyteller.tokenizer.decode(choice["token_ids"]).startswith(text_of(choice))
    prompt_ids = whole.get("prompt_token_ids") or choice["prompt_token_ids"]
    assert len(prompt_ids) == whole["usage"]["prompt_tokens"]
    told_pieces = pieces(served, path, **body, return_token_ids=True)
    streamed = [piece["choices"][0].get("token_ids", []) for piece in told_pieces]
    assert [i for ids in streamed for i in ids] == choice["token_ids"] and len(streamed) > 1
    prompts = [piece.get("prompt_token_ids") or piece["choices"][0].get("prompt_token_ids") for piece in told_pieces]
    assert prompts == [prompt_ids] + [None] * (len(prompts) - 1)  # in the first piece only
    assert "token_ids" not in served.post(path, **body).json()["choices"][0]


def test_an_echo_alone_has_no_token_ids_of_an_answer(served) -> None:
    choice = served.complete(prompt="Once", max_tokens=0, echo=True, return_token_ids=True)["choices"][0]
    assert choice["token_ids"] == [] and choice["prompt_token_ids"]


def test_tokens_are_named_by_their_ids_where_that_is_asked_for(served) -> None:
    body = {**BODY, "logprobs": 2, "echo": True, "return_token_ids": True}
    named = served.complete(**body, return_tokens_as_token_ids=True)["choices"][0]
    by_text = served.complete(**body)["choices"][0]["logprobs"]
    ids = named["prompt_token_ids"] + named["token_ids"]
    assert named["logprobs"]["tokens"] == [f"token_id:{i}" for i in ids]
    assert named["logprobs"]["text_offset"] == by_text["text_offset"]
    for token, row in zip(named["logprobs"]["tokens"], named["logprobs"]["top_logprobs"], strict=True):
        assert row is None or (token in row and all(name.startswith("token_id:") for name in row))
    chat = {**TALK, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    choice = served.post("/v1/chat/completions", **chat, return_tokens_as_token_ids=True).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == [f"token_id:{i}" for i in choice["token_ids"]]
    assert all(top["token"].startswith("token_id:") for entry in entries for top in entry["top_logprobs"])


def test_the_name_of_a_message_reaches_the_chat_template(tmp_path, text_checkpoint) -> None:
    from shutil import copytree

    folder = copytree(text_checkpoint, tmp_path / "named")
    for old in folder.glob("chat_template*"):
        old.unlink()
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.name if m.name is defined else m.role }} {{ m.content }}{% endfor %}"
    )
    with serving(model=folder, num_blocks=32) as served:

        def prompt_of(**message: Any) -> list[int]:
            answer = served.post(
                "/v1/chat/completions", messages=[{"content": "ab", **message}], max_tokens=1, return_token_ids=True
            )
            return answer.json()["prompt_token_ids"]

        tokenizer = served.engine.tokenizer
        assert tokenizer is not None
        assert tokenizer.decode(prompt_of(role="user", name="Bob")) == "Bob ab"
        assert tokenizer.decode(prompt_of(role="user")) == "user ab"
