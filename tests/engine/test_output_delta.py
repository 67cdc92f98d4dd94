"""Outputs sent as differences are the outputs that were sent."""

from __future__ import annotations

import pickle
from dataclasses import fields

from hypothesis import given
from hypothesis import strategies as st

from paged_infer.control.request import Request
from paged_infer.engine.output_delta import OutputDecoder, OutputEncoder
from paged_infer.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from paged_infer.params import SamplingParams


def logprobs_of(token_ids: list[int]) -> list[dict[int, Logprob]]:
    return [{token: Logprob(-float(token), 1, str(token))} for token in token_ids]


@st.composite
def streams(draw: st.DrawFn) -> list[list[CompletionOutput]]:
    """The growing samples of one request; the last step may take text and tokens back, as a stop string does."""
    num_samples, has_logprobs = draw(st.integers(1, 3)), draw(st.booleans())
    texts, ids = [""] * num_samples, [list[int]() for _ in range(num_samples)]
    steps = []
    for is_last in [*[False] * draw(st.integers(0, 4)), True]:
        for i in range(num_samples):
            texts[i] += draw(st.text(max_size=3))
            ids[i] = ids[i] + draw(st.lists(st.integers(0, 9), max_size=3))
            if is_last:
                texts[i] = texts[i][: draw(st.integers(0, len(texts[i])))] + draw(st.sampled_from(["", "?"]))
                ids[i] = ids[i][: draw(st.integers(0, len(ids[i])))]
        reason = "stop" if is_last else None
        steps.append(
            [
                CompletionOutput(i, texts[i], ids[i], reason, logprobs=logprobs_of(ids[i]) if has_logprobs else None)
                for i in range(num_samples)
            ]
        )
    return steps


@given(st.lists(streams(), min_size=1, max_size=3))
def test_what_is_built_is_what_was_sent_whatever_else_is_sent_between(requests: list[list[list[CompletionOutput]]]):
    encoder = OutputEncoder()
    decoder = OutputDecoder()
    for i in range(len(requests)):
        decoder.add(Request(f"r{i}", "a prompt", [5, 6], SamplingParams(), 1.0))
    for step in range(max(map(len, requests))):
        for i, samples in enumerate(requests):
            if step < len(samples):
                finished = step == len(samples) - 1
                metrics, known = RequestMetrics(1.0, num_generation_tokens=step), [None, *logprobs_of([6])]
                output = RequestOutput(f"r{i}", "a prompt", [5, 6], samples[step], metrics, finished, known)
                delta = pickle.loads(pickle.dumps(encoder.encode(output)))
                assert decoder.decode(delta) == output
    assert not encoder._sent and not decoder


def test_what_was_built_is_kept_when_the_engine_ends() -> None:
    request = Request("r", "a prompt", [5], SamplingParams(n=2), 1.0)
    encoder, decoder = OutputEncoder(), OutputDecoder()
    decoder.add(request)
    outputs = [CompletionOutput(0, "one", [1], "stop"), CompletionOutput(1, "tw", [2])]
    decoder.decode(encoder.encode(RequestOutput("r", "a prompt", [5], outputs, RequestMetrics(1.0))))
    (failed,) = decoder.fail("killed")
    assert failed.finished and failed.outputs == [
        outputs[0], CompletionOutput(1, "tw", [2], "error", error="killed")
    ]  # fmt: skip


def test_of_one_id_the_aborted_request_gets_its_end_before_its_successor() -> None:
    decoder, requests = OutputDecoder(), [Request("r", None, [prompt], SamplingParams(), 1.0) for prompt in (5, 6)]
    for request in requests:
        decoder.add(request)
    for request in requests:
        end = RequestOutput(
            "r", None, request.prompt_token_ids, [CompletionOutput(0, "", [])], RequestMetrics(1.0), True
        )
        assert decoder.decode(OutputEncoder().encode(end)) == end
    assert not decoder


def test_every_time_that_the_engine_takes_is_put_on_our_clock() -> None:
    decoder, names = OutputDecoder(), [one.name for one in fields(RequestMetrics) if one.name.endswith("_time_s")]
    decoder.add(Request("r", None, [5], SamplingParams(), 2.0))
    decoder.clock_offset_s = 100.0
    metrics = RequestMetrics(**dict.fromkeys(names, 2.0))
    sent = OutputEncoder().encode(RequestOutput("r", None, [5], [CompletionOutput(0, "", [])], metrics))
    decoded = decoder.decode(sent).metrics
    times = {name: getattr(decoded, name) for name in names}
    assert times == {name: 2.0 if name == "arrival_time_s" else 102.0 for name in names}


def test_a_long_answer_costs_no_more_for_each_token() -> None:
    encoder, sizes = OutputEncoder(), []
    for length in range(1, 500):
        one = CompletionOutput(0, "word " * length, [1] * length)
        output = RequestOutput("r", None, [5], [one], RequestMetrics(1.0))
        sizes.append(len(pickle.dumps(encoder.encode(output))))
    assert sizes[-1] <= sizes[0] + 16
