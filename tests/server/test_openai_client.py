"""OpenAI's own Python client gets the offline engine's answers from the server."""

from __future__ import annotations

import asyncio

import openai
import pytest
from holding import Steps
from serving import LONG_BODY

from paged_infer import BeamSearchParams, SamplingParams

PROMPT = "Once upon a time"
STORY = [{"role": "user", "content": "Tell me a story about Mia and a red key."}]


def offline(llm, prompt, **params):
    return llm.generate(prompt, SamplingParams(**params), use_tqdm=False)[0]


def test_a_completion_is_what_the_offline_engine_says(served, storyteller) -> None:
    reference = offline(storyteller, PROMPT, temperature=0, max_tokens=20)
    answer = served.openai().completions.create(model="storyteller", prompt=PROMPT, temperature=0, max_tokens=20)
    assert answer.choices[0].text == reference.outputs[0].text
    assert answer.choices[0].finish_reason == reference.outputs[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(reference.prompt_token_ids), 20)
    assert answer.object == "text_completion" and answer.model == "storyteller"


def test_a_stream_joins_to_the_whole_answer(served) -> None:
    client = served.openai()
    body = {"model": "storyteller", "prompt": PROMPT, "temperature": 0, "max_tokens": 30}
    whole = client.completions.create(**body)
    with served.held() as steps:
        steps.allow(10)
        stream = client.completions.create(**body, stream=True)
        pieces = [next(stream)]
        steps.allow()
        pieces += stream
    assert len(pieces) > 1
    assert "".join(p.choices[0].text for p in pieces) == whole.choices[0].text
    assert [p.choices[0].finish_reason for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert len({p.id for p in pieces}) == 1 and all(p.usage is None for p in pieces)


def test_a_stream_ends_with_its_usage_when_asked_to(served) -> None:
    body = {"model": "storyteller", "prompt": PROMPT, "temperature": 0, "max_tokens": 7}
    whole = served.openai().completions.create(**body)
    *_, last = served.openai().completions.create(**body, stream=True, stream_options={"include_usage": True})
    *_, plain = served.openai().completions.create(**body, stream=True, stream_options={"include_usage": None})
    assert plain.usage is None and plain.choices[0].finish_reason == "length"
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (whole.usage.prompt_tokens, 7)


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_with_several_samples_are_numbered_through(served, storyteller, stream: bool) -> None:
    prompts, params = [PROMPT, "Mia"], {"n": 3, "seed": 5, "max_tokens": 9, "temperature": 1.0}
    reference = [one.text for p in prompts for one in offline(storyteller, p, **params).outputs]
    answer = served.openai().completions.create(model="storyteller", prompt=prompts, stream=stream, **params)
    texts = [""] * 6
    for piece in answer if stream else [answer]:
        for choice in piece.choices:
            texts[choice.index] += choice.text
    assert texts == reference and len(set(reference)) > 2


@pytest.mark.parametrize("several", [False, True])
def test_token_ids_are_prompts_too(served, storyteller, several: bool) -> None:
    ids = storyteller.tokenizer.encode(PROMPT)
    answer = served.openai().completions.create(
        model="storyteller", prompt=[ids, ids] if several else ids, temperature=0, max_tokens=8
    )
    reference = offline(storyteller, ids, temperature=0, max_tokens=8).outputs[0].text
    assert [choice.text for choice in answer.choices] == [reference] * (2 if several else 1)


def test_a_stop_string_ends_the_text_before_it(served, storyteller) -> None:
    stop = offline(storyteller, PROMPT, temperature=0, max_tokens=20).outputs[0].text[10:14]
    reference = offline(storyteller, PROMPT, temperature=0, max_tokens=20, stop=stop).outputs[0]
    body = {"model": "storyteller", "prompt": PROMPT, "temperature": 0, "max_tokens": 20, "stop": [stop]}
    whole = served.openai().completions.create(**body).choices[0]
    assert (whole.text, whole.finish_reason) == (reference.text, "stop")
    pieces = [p.choices[0] for p in served.openai().completions.create(**body, stream=True)]
    assert "".join(p.text for p in pieces) == reference.text and pieces[-1].finish_reason == "stop"


def test_a_seed_is_the_requests_own(served, storyteller) -> None:
    reference = offline(storyteller, PROMPT, seed=11, max_tokens=16).outputs[0].text
    answers = [
        served.openai().completions.create(model="storyteller", prompt=PROMPT, seed=seed, max_tokens=16)
        for seed in (11, 11, 12)
    ]
    texts = [answer.choices[0].text for answer in answers]
    assert texts[0] == texts[1] == reference != texts[2]


def test_echo_with_logprobs_tells_how_probable_the_prompt_is(served, storyteller) -> None:
    params = {"temperature": 0, "max_tokens": 2}
    reference = offline(storyteller, PROMPT, **params, logprobs=1, prompt_logprobs=1)
    answer = served.openai().completions.create(model="storyteller", prompt=PROMPT, echo=True, logprobs=1, **params)
    choice = answer.choices[0]
    assert choice.text == PROMPT + reference.outputs[0].text == "".join(choice.logprobs.tokens)
    rows = [*reference.prompt_logprobs, *reference.outputs[0].logprobs]
    ids = [*reference.prompt_token_ids, *reference.outputs[0].token_ids]
    expected = [None if row is None else pytest.approx(row[i].logprob) for i, row in zip(ids, rows, strict=True)]
    assert choice.logprobs.token_logprobs == expected and expected[0] is None
    starts = choice.logprobs.text_offset
    assert [choice.text[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)] == choice.logprobs.tokens


def test_the_prompt_alone_can_be_scored(served) -> None:
    answer = served.complete(prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
    assert answer["choices"][0]["text"] == PROMPT and answer["usage"]["completion_tokens"] == 0
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    stop = {"stop_token_ids": [65], "logit_bias": {"65": 100}}  # what is drawn behind it ends nothing
    for ended in (answer, served.complete(prompt=PROMPT, max_tokens=0, echo=True, **stop)):
        assert (ended["choices"][0]["finish_reason"], ended["choices"][0]["stop_reason"]) == ("length", None)


def test_streamed_logprobs_join_to_those_of_the_whole(served) -> None:
    body = {"model": "storyteller", "prompt": PROMPT, "temperature": 0, "max_tokens": 9, "logprobs": 2}
    whole = served.openai().completions.create(**body).choices[0].logprobs
    pieces = [p.choices[0].logprobs for p in served.openai().completions.create(**body, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for piece in pieces for x in getattr(piece, name)] == getattr(whole, name)
    assert all(len(top) == 2 for top in whole.top_logprobs)


def test_a_conversation_is_answered_as_offline(served, storyteller) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, stop="\nQ:")
    reference = storyteller.chat(STORY, params, use_tqdm=False)[0].outputs[0].text
    client = served.openai()
    body = {"model": "storyteller", "messages": STORY, "temperature": 0, "stop": "\nQ:"}
    whole = client.chat.completions.create(**body, max_completion_tokens=40)
    assert (whole.choices[0].message.role, whole.choices[0].message.content) == ("assistant", reference)
    pieces = [p.choices[0] for p in client.chat.completions.create(**body, max_tokens=40, stream=True)]
    assert pieces[0].delta.role == "assistant" and pieces[-1].finish_reason == whole.choices[0].finish_reason
    assert "".join(p.delta.content or "" for p in pieces) == reference


def test_an_answer_can_be_sent_back_as_it_came(served) -> None:
    chat = served.openai().chat.completions
    body = {"model": "storyteller", "temperature": 0, "max_tokens": 5}
    answer = chat.create(messages=STORY, **body).choices[0].message
    more = {"role": "user", "content": "And then?"}
    by_hand = {"role": "assistant", "content": answer.content}
    replies = [chat.create(messages=[*STORY, one, more], **body).choices for one in (answer, by_hand)]
    assert replies[0] == replies[1]


def test_content_may_come_in_parts(served) -> None:
    content = STORY[0]["content"]
    in_parts = [{"role": "user", "content": [{"type": "text", "text": content}]}]
    answers = [
        served.openai().chat.completions.create(model="storyteller", messages=messages, temperature=0, max_tokens=8)
        for messages in (STORY, in_parts)
    ]
    assert answers[0].choices == answers[1].choices


def test_chat_logprobs_name_each_token_and_its_rivals(served) -> None:
    answer = served.openai().chat.completions.create(
        model="storyteller", messages=STORY, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert "".join(one.token for one in content) == answer.choices[0].message.content
    for one in content:
        assert one.token == one.top_logprobs[0].token and bytes(one.bytes).decode() == one.token
        logprobs = [rival.logprob for rival in one.top_logprobs]
        assert len(logprobs) == 3 and logprobs == sorted(logprobs, reverse=True)


def test_a_chat_goes_on_to_the_end_of_the_context_unless_told_otherwise(served) -> None:
    answer = served.openai().chat.completions.create(
        model="storyteller", messages=STORY, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.total_tokens == served.engine.max_model_len
    assert answer.choices[0].finish_reason == "length"


def test_max_tokens_is_clamped_to_the_context(served) -> None:
    answer = served.complete(prompt=PROMPT, max_tokens=10**9, temperature=0, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == served.engine.max_model_len


def test_vllms_fields_work(served, storyteller) -> None:
    extra = {"top_k": 7, "min_p": 0.05, "repetition_penalty": 1.3, "min_tokens": 3, "ignore_eos": True}
    params = {"seed": 3, "max_tokens": 24, "temperature": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    reference = offline(storyteller, PROMPT, **params, **extra).outputs[0].text
    client = served.openai().completions
    answer = client.create(model="storyteller", prompt=PROMPT, **params, extra_body=extra)
    assert answer.choices[0].text == reference
    plain = client.create(model="storyteller", prompt=PROMPT, **params)
    assert plain.choices[0].text != reference


def test_stop_token_ids_logit_bias_and_truncation_work(served, storyteller) -> None:
    ids = storyteller.tokenizer.encode(PROMPT)
    params = {"logit_bias": {ids[0]: 100}, "stop_token_ids": [ids[0]], "truncate_prompt_tokens": 2}
    answer = served.complete(prompt=PROMPT, **{**params, "logit_bias": {str(ids[0]): 100}})
    reference = offline(storyteller, PROMPT, **params).outputs[0]
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["choices"][0]["stop_reason"] == ids[0]
    assert answer["choices"][0]["text"] == reference.text and answer["usage"]["prompt_tokens"] == 2


def test_a_cache_salt_keeps_beginnings_apart(served) -> None:
    body = {"prompt": "The river was wide and cold, " * 8, "max_tokens": 1, "temperature": 0}
    cached = [
        served.complete(**body, cache_salt=salt)["usage"]["prompt_tokens_details"]["cached_tokens"]
        for salt in ("mine", "mine", "yours")
    ]
    assert cached[0] == cached[2] == 0 < cached[1]


def test_a_beam_search_returns_its_beams_best_first(served, storyteller) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=8)
    reference = storyteller.beam_search(PROMPT, params, use_tqdm=False)[0].outputs
    choices = served.complete(prompt=PROMPT, n=3, max_tokens=8, use_beam_search=True)["choices"]
    assert [choice["text"] for choice in choices] == [one.text for one in reference]
    assert [choice["score"] for choice in choices] == pytest.approx([one.score for one in reference])


def test_the_models_are_listed(served) -> None:
    client = served.openai()
    assert [model.id for model in client.models.list()] == ["storyteller"]
    assert client.models.retrieve("storyteller").id == "storyteller"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no/such")


def test_errors_arrive_as_the_clients_own_exceptions(served) -> None:
    client = served.openai()
    with pytest.raises(openai.BadRequestError, match=r"temperature=-1") as bad:
        client.completions.create(model="storyteller", prompt=PROMPT, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="no-such-model") as unknown:
        client.completions.create(model="no-such-model", prompt=PROMPT)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="max_model_len=192") as long:
        client.completions.create(model="storyteller", prompt=[1] * 192)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="needs --enable-auto-tool-choice and --tool-call-parser"):
        client.chat.completions.create(
            model="storyteller", messages=STORY, tools=[{"type": "function", "function": {"name": "f"}}]
        )


def test_tools_without_a_place_in_the_chat_template_are_refused(served) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    for choice in ("none", "required", tool):
        with pytest.raises(openai.BadRequestError, match="the chat template has no place for tools") as bad:
            served.openai().chat.completions.create(
                model="storyteller", messages=STORY, tools=[tool], tool_choice=choice
            )
        assert bad.value.param == "tools"


def test_to_cancel_a_stream_frees_its_blocks(served) -> None:
    with served.held() as steps:
        steps.allow(20)
        stream = served.openai().completions.create(**LONG_BODY, stream=True)
        next(iter(stream))
        assert not served.is_idle()
        stream.close()
        served.check_idle()


def test_to_cancel_a_waiting_call_frees_its_blocks(served) -> None:
    async def main(steps: Steps) -> None:
        client = served.async_openai()
        task = asyncio.create_task(client.completions.create(**LONG_BODY))
        await asyncio.to_thread(served.until_queued, waiting=1)
        steps.run(1)
        assert not served.is_idle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.close()

    with served.held() as steps:
        asyncio.run(main(steps))
        served.check_idle()
