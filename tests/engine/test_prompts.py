"""Prompts in every form that callers have them in."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from paged_infer import AsyncLLM, BeamSearchParams, LLMEngine, SamplingParams
from paged_infer.engine.prompts import list_prompts, pair_prompts, plain_prompt

GREEDY = SamplingParams(temperature=0, max_tokens=4)
FORMS: list[Any] = [
    [5, 6, 7],
    np.array([5, 6, 7]),
    torch.tensor([5, 6, 7]),
    [np.int64(5), torch.tensor(6), 7],
    (5, 6, 7),
    {"prompt_token_ids": [5, 6, 7]},
    {"prompt_token_ids": torch.tensor([5, 6, 7])},
    {"prompt_token_ids": [np.int32(5), 6, 7], "prompt": None},
]


def test_one_prompt_is_the_same_in_every_form_alone_and_in_a_list(llm) -> None:
    (expected,) = llm.generate([5, 6, 7], GREEDY, use_tqdm=False)
    outputs = [llm.generate(form, GREEDY, use_tqdm=False)[0] for form in FORMS]
    outputs += llm.generate(FORMS, GREEDY, use_tqdm=False)
    outputs += [list(llm.stream(form, GREEDY))[-1] for form in FORMS[-2:]]
    for output in outputs:
        assert [type(t) for t in output.prompt_token_ids] == [int] * 3
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids


def test_a_dict_has_a_text_or_token_ids(text_llm) -> None:
    text, ids = "the cat sat", text_llm.get_tokenizer().encode("the cat sat")
    outputs = text_llm.generate([{"prompt": text}, {"prompt_token_ids": ids}, text], GREEDY, use_tqdm=False)
    assert [one.prompt for one in outputs] == [text, None, text]
    assert len({tuple(one.outputs[0].token_ids) for one in outputs}) == 1


def test_an_async_llm_and_an_engine_take_the_same_prompts(text_checkpoint) -> None:
    async def generate() -> list[str]:
        async with AsyncLLM(text_checkpoint, num_blocks=64, device="cpu") as engine:
            prompts: list[Any] = ["the cat", {"prompt": "the cat"}]
            return [
                [one async for one in engine.generate(p, GREEDY, stream=False)][-1].outputs[0].text for p in prompts
            ]

    engine = LLMEngine(text_checkpoint, num_blocks=64, device="cpu")
    engine.add_request("mine", {"prompt": "the cat"}, GREEDY)
    texts = asyncio.run(generate())
    while engine.has_unfinished_requests:
        texts += [output.outputs[0].text for output in engine.step().outputs]
    assert len(texts) == 3 and len({*texts}) == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"promt": "a"}, r"the unknown key promt \(did you mean prompt\?\); known: prompt, prompt_token_ids"),
        ({"prompt": "a", "multi_modal_data": {}}, "the unknown key multi_modal_data; known:"),
        ({}, "either prompt or prompt_token_ids, not none"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "not prompt and prompt_token_ids"),
        ({"prompt": 5}, "prompt=5: must be a str"),
        ({"prompt": [5]}, r"prompt=\[5\]: must be a str"),
        ({"prompt_token_ids": "a"}, "prompt_token_ids='a': must be a list of token ids"),
    ],
)
def test_a_dict_of_another_form_is_refused_with_what_is_allowed(prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain_prompt(prompt)


def test_what_is_no_prompt_is_refused(llm) -> None:
    for prompts in (5, None, b"abc", {5}):
        with pytest.raises(ValueError, match=f"a list of these, not {type(prompts).__name__}"):
            list_prompts(prompts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"prompt 1: prompt=5: must be a str"):
        llm.generate([[5], {"prompt": 5}], use_tqdm=False)
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        pair_prompts({"prompt": "a"}, [GREEDY, GREEDY], SamplingParams)
    with pytest.raises(ValueError, match=r"must be SamplingParams, .*; beam_search\(\) takes BeamSearchParams"):
        llm.generate("a", BeamSearchParams(2, 5))  # type: ignore[arg-type]
