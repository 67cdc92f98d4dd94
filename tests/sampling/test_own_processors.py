"""Logits processors of the caller's own: each sees its own row, and can harm no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from paged_infer import LLM, SamplingParams, StructuredOutputsParams
from paged_infer.control.step import SamplingRow
from paged_infer.kernels.fused.sample import sample_reference
from paged_infer.sampling.own_processors import apply_own_processors
from paged_infer.sampling.sampler import Sampler

PROMPT, OTHER = [7, 91, 400, 12, 5], [8, 650, 33]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def with_processors(*processors: Any, **options: Any) -> SamplingParams:
    options = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, **options}
    return SamplingParams(logits_processors=processors, **options)


def only(token: int) -> Any:
    """Allows one token."""

    def processor(token_ids: list[int], logits: Tensor) -> Tensor:
        allowed = logits[token].clone()
        logits.fill_(-torch.inf)  # in place: the row is a copy
        logits[token] = allowed
        return logits

    return processor


def tokens(llm: LLM, prompts: list[Any], params: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def test_a_processor_gets_the_output_so_far_and_decides(llm) -> None:
    seen: list[list[int]] = []

    def count_up(token_ids: list[int], logits: Tensor) -> Tensor:
        seen.append(token_ids)
        assert logits.shape == (1003,) and logits.dtype is torch.float32
        return only(100 + len(token_ids))(token_ids, logits)

    assert tokens(llm, [PROMPT], with_processors(count_up)) == [[*range(100, 108)]]
    assert seen == [[*range(100, 100 + n)] for n in range(8)]


def test_it_gets_the_bits_that_inspect_computes_again(make_llm) -> None:
    engine, last = make_llm().engine, dict[int, Tensor]()

    def record(token_ids: list[int], logits: Tensor) -> Tensor:
        last[len(token_ids)] = logits.clone()
        return logits

    for index in range(3):  # in company
        engine.add_request(str(index), [*PROMPT, index], GREEDY if index else with_processors(record))
    for num_tokens in range(1, 8):
        engine.step()
        assert engine.inspect("0").logits.equal(last[num_tokens - 1])


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "seed": 3, "top_k": 5}])
def test_neighbours_get_the_tokens_that_they_get_alone(options: dict[str, Any], make_llm) -> None:
    plain = SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, **options})
    alone = tokens(make_llm(), [OTHER], plain)

    def poison(token_ids: list[int], logits: Tensor) -> Tensor:
        return logits.fill_(torch.nan)

    def fail(token_ids: list[int], logits: Tensor) -> Tensor:
        raise KeyError("my mistake")

    llm = make_llm()
    params = [with_processors(one, **options) for one in (poison, fail, only(9))]
    outputs = llm.generate([PROMPT, PROMPT, PROMPT, OTHER], [*params, plain], use_tqdm=False)
    assert [one.outputs[0].finish_reason for one in outputs] == ["error", "error", "length", "length"]
    assert "its logits cannot be sampled: they contain NaN" in str(outputs[0].outputs[0].error)
    assert "its logits processor failed: KeyError: 'my mistake'" in str(outputs[1].outputs[0].error)
    assert outputs[2].outputs[0].token_ids == [9] * 8 and [outputs[3].outputs[0].token_ids] == alone
    llm.check_integrity()


@pytest.mark.parametrize(
    ("returned", "found"),
    [(None, "NoneType"), ([1.0], "list"), (torch.zeros(2), r"\(2,\)"), (torch.zeros(1, 1003), "1003")],
)
def test_what_is_no_row_of_logits_ends_the_request_with_an_error(returned: Any, found: str, llm) -> None:
    (output,) = llm.generate([PROMPT], with_processors(lambda token_ids, logits: returned), use_tqdm=False)
    pattern = rf"it must return logits of shape \(1003,\), not .*{found}"
    with pytest.raises(RuntimeError, match=pattern):
        raise RuntimeError(output.outputs[0].error)


def test_tokens_do_not_depend_on_chunks_the_pool_or_drafts(make_llm) -> None:
    def no_repeats(token_ids: list[int], logits: Tensor) -> Tensor:
        logits[token_ids] = -torch.inf
        return logits

    params, prompts = with_processors(no_repeats, max_tokens=12), [PROMPT * 4, OTHER * 5, PROMPT]
    expected = tokens(make_llm(), prompts, params)
    assert all(len({*one}) == 12 for one in expected)
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 2}
    for options in (
        {"max_num_batched_tokens": 7, "block_size": 4},
        {"num_blocks": 14, "block_size": 4},
        {"speculative_config": ngram},
        {"async_scheduling": True},
    ):
        assert tokens(make_llm(**options), prompts, params) == expected, options


def test_penalties_biases_and_grammars_come_after_it(text_llm) -> None:
    grammar = StructuredOutputsParams(choice=["the cat", "the dog"])
    params = SamplingParams(temperature=0, structured_outputs=grammar, logits_processors=lambda ids, logits: -logits)
    (output,) = text_llm.generate(["the"], params, use_tqdm=False)
    assert output.outputs[0].text in ("the cat", "the dog")
    params = with_processors(lambda ids, logits: torch.zeros_like(logits), logit_bias={77: 1.0})
    assert tokens(text_llm, ["the"], params) == [[77] * 8]


def test_a_sampling_kernel_leaves_such_rows_to_the_sampler() -> None:
    rows = [SamplingRow(with_processors(only(token), temperature=t), 1, 0, 5, 0) for token, t in ((4, 0), (6, 1.0))]
    rows.append(SamplingRow(GREEDY, 1, 0, 5, 0))
    logits = torch.arange(20.0).expand(3, -1)
    for sampler in (Sampler(), Sampler(kernel=sample_reference)):
        assert not sampler.is_kernel_enough(rows, 20) and sampler.is_kernel_enough(rows[2:], 20) == (
            sampler._kernel is not None
        )
        assert sampler(logits, rows).token_ids == [4, 6, 19]
    assert apply_own_processors(logits, rows[2:])[0] is logits


def test_functions_are_refused_where_they_would_be_sent_to_another_process(llm, monkeypatch) -> None:
    monkeypatch.setattr(llm.engine.input_processor, "_is_sent", True)
    with pytest.raises(ValueError, match=r"logits_processors=.*functions are not sent to another process"):
        llm.generate([PROMPT], with_processors(only(3)), use_tqdm=False)
    assert len(tokens(llm, [OTHER], GREEDY)[0]) == 8


@pytest.mark.parametrize("given", [5, "abc", [5], [None]])
def test_what_is_no_function_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"logits_processors=.*: must be"):
        SamplingParams(logits_processors=given)
    assert SamplingParams(logits_processors=None).logits_processors == ()  # type: ignore[arg-type]
