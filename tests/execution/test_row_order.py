"""The rows of a step: single tokens before chunks, each longest first; results return to their sequences."""

from __future__ import annotations

from typing import Any

import pytest
from captured import call_again, with_graphs

from paged_infer import LLM, SamplingParams

PROMPTS = [[5 + i] * (1 + 7 * i % 31) for i in range(6)]  # 1, 8, 15, 22, 29, 5 tokens
PARAMS = [
    SamplingParams(
        temperature=0.7, seed=i, max_tokens=8 + i, ignore_eos=True, logprobs=1 if i == 2 else None, n=1 + i % 2
    )
    for i in range(6)
]


def samples_of(outputs: list[Any]) -> list[Any]:
    return [
        [(one.token_ids, [[*at] for at in one.logprobs or ()]) for one in output.outputs]
        for output in sorted(outputs, key=lambda output: output.request_id)
    ]


@pytest.fixture(scope="module")
def expected(make_llm) -> list[Any]:
    """What each request gets alone."""
    llm: LLM = make_llm()
    alone = zip(PROMPTS, PARAMS, strict=True)
    return [samples_of(llm.generate([prompt], [params], use_tqdm=False))[0] for prompt, params in alone]


@pytest.mark.parametrize("ahead", [False, True], ids=["one-by-one", "ahead"])
@pytest.mark.parametrize(("has_graphs", "backend"), [(False, "auto"), (False, "sdpa"), (True, "torch")])
def test_rows_are_longest_first_and_results_return_to_their_sequences(
    has_graphs: bool, ahead: bool, backend: str, make_llm, expected, monkeypatch
) -> None:
    options = {"max_num_seqs": 12, "max_num_batched_tokens": 16, "async_scheduling": ahead}
    llm: LLM = make_llm(attention_backend=backend, **options)
    if has_graphs:
        with_graphs(llm, call_again)
    decoder, steps = llm.engine.decoder, []
    forward = decoder.forward

    def watched(token_ids, cache, meta):
        query_lens = meta.query_start_loc.diff().tolist()
        steps.append(list(zip(query_lens, meta.seq_lens.tolist(), strict=True)))
        return forward(token_ids, cache, meta)

    monkeypatch.setattr(decoder, "forward", watched)
    outputs = []
    for i, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):  # they arrive shortest first, nearly
        llm.engine.add_request(str(i), prompt, params)
        outputs += llm.engine.step().outputs
    while llm.engine.has_unfinished_requests:
        outputs += llm.engine.step().outputs
    assert samples_of(outputs) == expected
    for rows in steps:
        decodes = [length for num_tokens, length in rows if num_tokens == 1]
        chunks = [length for num_tokens, length in rows if num_tokens > 1]
        assert [length for _, length in rows] == sorted(decodes, reverse=True) + sorted(chunks, reverse=True)
    assert sum(len({length for _, length in rows}) > 3 for rows in steps) > 5
    assert not has_graphs or llm.engine.executor.runner.graphs.num_replays > 5
