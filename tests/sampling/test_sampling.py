"""The sampler against a plain one, what each parameter keeps, and that a row is its own affair."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paged_infer.control.step import SamplingRow
from paged_infer.kernels.fused.noise import noise, row_keys
from paged_infer.params import SamplingParams
from paged_infer.sampling.sampler import Sampler

INF = math.inf


def a_row(*, seed: int = 0, position: int = 0, sample_index: int = 0, **options: Any) -> SamplingRow:
    row_options = {
        name: options.pop(name)
        for name in ("num_output_tokens", "end_token_ids", "prompt_token_ids", "output_token_ids")
        if name in options
    }
    row_options.setdefault("num_output_tokens", len(row_options.get("output_token_ids", ())))
    return SamplingRow(SamplingParams(**options), seed, sample_index, position, **row_options)


def rows_at(positions: range, **options: Any) -> list[SamplingRow]:
    row = a_row(**options)
    rest = (row.num_output_tokens, row.end_token_ids, row.prompt_token_ids, row.output_token_ids)
    return [SamplingRow(row.params, row.seed, row.sample_index, position, *rest) for position in positions]


def draw_many(logits: list[float], count: int, **options: Any) -> list[int]:
    """Tokens of one row of logits at ``count`` positions."""
    rows = rows_at(range(count), **options)
    return Sampler()(torch.tensor([logits]).expand(count, -1), rows).token_ids


def drawn(probs: list[float], count: int = 2000, **options: Any) -> set[int]:
    """Which tokens ever come of a distribution, if each kept one is likely to in ``count`` draws."""
    return set(draw_many([math.log(p) if p else -INF for p in probs], count, **options))


def chi_square_limit(degrees: int) -> float:
    """Quantile that chance exceeds once in 31,600 (Wilson & Hilferty 1931, at 4 standard deviations)."""
    spread = 2.0 / (9.0 * degrees)
    return float(degrees * (1.0 - spread + 4.0 * math.sqrt(spread)) ** 3)


def plain_sampler(logits: list[float], row: SamplingRow) -> int:
    """What SamplingParams promises, one token at a time, in double precision."""
    params, vocab_size, logits = row.params, len(logits), list(logits)
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if row.num_output_tokens < params.min_tokens:
        for token in row.end_token_ids:
            logits[token] = -INF
    for token in {*row.prompt_token_ids, *row.output_token_ids}:
        penalty = params.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token in set(row.output_token_ids):
        logits[token] -= params.presence_penalty + params.frequency_penalty * list(row.output_token_ids).count(token)
    if params.temperature == 0:
        return logits.index(max(logits))
    best = max(logits)
    weights = [math.exp((logit - best) / params.temperature) for logit in logits]
    order = sorted(range(vocab_size), key=lambda token: (-weights[token], token))
    kept = [token for token in order if weights[token] >= params.min_p]
    if 0 < params.top_k < len(kept):
        kept = [token for token in kept if logits[token] >= logits[kept[params.top_k - 1]]]
    nucleus, before, total = [], 0.0, sum(weights[token] for token in kept)
    for token in kept:
        if params.top_p == 1 or before < params.top_p * total:
            nucleus.append(token)
        before += weights[token]
    keys = row_keys([row.seed], [row.sample_index], [row.position])
    race = noise(keys, torch.arange(vocab_size, dtype=torch.int32))[0].tolist()
    return max(nucleus, key=lambda token: weights[token] / race[token])


VOCAB = 300  # more than the 128 candidates that top_p starts with
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=12)


@st.composite
def sample_rows(draw: st.DrawFn) -> SamplingRow:
    def maybe(values: st.SearchStrategy[Any], otherwise: Any) -> Any:
        return draw(st.one_of(st.just(otherwise), values))

    return a_row(
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        sample_index=draw(st.integers(0, 3)),
        position=draw(st.integers(0, 5000)),
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
        top_k=maybe(st.integers(1, VOCAB + 10), 0),
        top_p=maybe(st.sampled_from([0.05, 0.5, 0.9, 0.99]), 1.0),
        min_p=maybe(st.sampled_from([0.02, 0.3]), 0.0),
        repetition_penalty=maybe(st.sampled_from([0.7, 1.3]), 1.0),
        presence_penalty=maybe(st.sampled_from([-0.5, 1.5]), 0.0),
        frequency_penalty=maybe(st.sampled_from([-0.5, 0.8]), 0.0),
        logit_bias=maybe(st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.0, 2.5])), {}),
        min_tokens=draw(st.sampled_from([0, 8])),
        max_tokens=None,
        end_token_ids=tuple(draw(TOKENS)),
        prompt_token_ids=draw(TOKENS),
        output_token_ids=draw(TOKENS),
    )


def some_logits(num_rows: int, seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


# -------------------------------------------------------------------------------- against the plain sampler


@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(sample_rows(), min_size=1, max_size=6),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.2, 1.0, 4.0]),
)
def test_any_mix_of_parameters_draws_what_the_plain_sampler_draws(
    rows: list[SamplingRow], seed: int, spread: float
) -> None:
    logits = some_logits(len(rows), seed, spread)
    before = logits.clone()
    expected = [plain_sampler(of_row, row) for of_row, row in zip(logits.tolist(), rows, strict=True)]
    assert Sampler()(logits, rows).token_ids == expected
    assert torch.equal(logits, before)


@settings(deadline=None, max_examples=25)
@given(rows=st.lists(sample_rows(), min_size=1, max_size=8), seed=st.integers(0, 10**6), data=st.data())
def test_a_rows_token_does_not_depend_on_its_neighbours_nor_on_their_order(
    rows: list[SamplingRow], seed: int, data: st.DataObject
) -> None:
    logits = some_logits(len(rows), seed, spread=1.0)
    together = Sampler()(logits, rows).token_ids
    assert Sampler()(logits, rows).token_ids == together
    alone = [Sampler()(logits[i : i + 1], [row]).token_ids[0] for i, row in enumerate(rows)]
    assert alone == together
    order = data.draw(st.permutations(range(len(rows))))
    shuffled = Sampler()(logits[order], [rows[i] for i in order]).token_ids
    assert shuffled == [together[i] for i in order]


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0}])
def test_a_batch_too_large_for_one_slice_draws_the_same(options: dict[str, Any]) -> None:
    num_rows = 2 * (torch.get_num_threads() << 16) // VOCAB
    logits = some_logits(num_rows, 3)
    rows = [a_row(seed=i, **options) for i in range(num_rows)]
    tokens = Sampler()(logits, rows).token_ids
    some = range(0, num_rows, 37)
    assert [tokens[i] for i in some] == Sampler()(logits[list(some)], [rows[i] for i in some]).token_ids


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0}, {"logit_bias": {3: 2.0}}])
def test_every_float_type_is_drawn_from_as_float32_would_be(dtype: torch.dtype, options: dict[str, Any]) -> None:
    logits = some_logits(8, 5).to(dtype)
    rows = [a_row(seed=i, **options) for i in range(8)]
    assert Sampler()(logits, rows).token_ids == Sampler()(logits.float(), rows).token_ids


# -------------------------------------------------------------------------------- what each parameter keeps


def test_top_p_keeps_the_token_that_crosses_the_boundary() -> None:
    assert drawn([0.4, 0.3, 0.2, 0.1], top_p=0.41) == {0, 1}
    assert drawn([0.4, 0.3, 0.2, 0.1], top_p=0.39) == {0}


def test_top_p_reached_exactly_keeps_no_more() -> None:
    assert drawn([0.25] * 4, top_p=0.5) == {0, 1}
    assert drawn([0.25] * 4, top_p=0.51) == {0, 1, 2}


def test_of_equally_probable_tokens_top_p_keeps_the_lower_ids() -> None:
    assert drawn([1 / 512] * 512, count=6000, top_p=3 / 512) == {0, 1, 2}
    assert drawn([1 / 512] * 512, count=2000, top_p=200 / 512) <= set(range(200))


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    # of 0.4, 0.3, 0.2 the first two hold 0.78; of all four, 0.7
    assert drawn([0.4, 0.3, 0.2, 0.1], top_k=3, top_p=0.75) == {0, 1}
    assert drawn([0.4, 0.3, 0.2, 0.1], top_p=0.75) == {0, 1, 2}


def test_top_p_reaches_beyond_its_first_candidates_where_the_distribution_is_flat() -> None:
    logits = some_logits(1, 8, spread=0.01).expand(400, -1)
    rows = [a_row(position=i, top_p=0.95) for i in range(400)]
    tokens = Sampler()(logits, rows).token_ids
    assert tokens == [plain_sampler(logits[0].tolist(), row) for row in rows]
    assert len(set(tokens)) > 128


def test_top_k_keeps_all_that_tie_with_the_kth() -> None:
    assert drawn([0.4, 0.2, 0.2, 0.2], top_k=2) == {0, 1, 2, 3}
    assert drawn([0.3, 0.3, 0.2, 0.2], top_k=2) == {0, 1}
    # more ties than there are candidates: the k-th place is shared by 200 of 201
    assert len(drawn([0.2] + [0.004] * 200, count=6000, top_k=2)) == 201


def test_top_k_of_one_is_greedy_where_nothing_ties() -> None:
    logits = some_logits(16, 1)
    greedy = Sampler()(logits, [a_row(temperature=0)] * 16).token_ids
    assert Sampler()(logits, [a_row(seed=i, top_k=1, temperature=1.5) for i in range(16)]).token_ids == greedy


@pytest.mark.parametrize("top_k", [-1, 0, 4, 1000])
def test_top_k_off_or_beyond_the_vocabulary_keeps_all(top_k: int) -> None:
    assert drawn([0.4, 0.3, 0.2, 0.1], top_k=top_k) == {0, 1, 2, 3}


def test_min_p_is_a_share_of_the_most_probable_token() -> None:
    assert drawn([0.5, 0.26, 0.14, 0.1], min_p=0.5) == {0, 1}
    assert drawn([0.5, 0.26, 0.14, 0.1], min_p=1.0) == {0}
    assert drawn([0.5, 0.26, 0.14, 0.1], min_p=0.25, top_p=0.9) == {0, 1, 2}


def test_dropping_tokens_does_not_move_the_noise_of_the_others() -> None:
    logits = some_logits(200, 2, spread=1.0)
    rows = [a_row(seed=i) for i in range(200)]
    free = Sampler()(logits, rows).token_ids
    for options in ({"top_k": 60}, {"top_p": 0.7}, {"min_p": 0.1}):
        kept = Sampler()(logits, [a_row(seed=i, **options) for i in range(200)]).token_ids
        ranks = [int((row > row[token]).sum()) for row, token in zip(logits, free, strict=True)]
        agreeing = [a == b for a, b, rank in zip(free, kept, ranks, strict=True) if rank < 5]
        assert agreeing and all(agreeing)


@pytest.mark.parametrize("temperature", [1e-300, 1e-9])
def test_a_temperature_near_zero_is_nearly_greedy(temperature: float) -> None:
    logits = some_logits(16, 4)
    greedy = Sampler()(logits, [a_row(temperature=0)] * 16).token_ids
    for options in ({}, {"top_k": 5}, {"top_p": 0.9}):
        rows = [a_row(seed=i, temperature=temperature, **options) for i in range(16)]
        assert Sampler()(logits, rows).token_ids == greedy


def test_an_endless_temperature_is_uniform_and_still_draws_no_masked_token() -> None:
    assert drawn([0.999, 0.001, 0.0], temperature=1e300) == {0, 1}


def test_greedy_takes_the_lower_of_two_equal_tokens() -> None:
    assert draw_many([1.0, 3.0, 3.0], 1, temperature=0) == [1]


# -------------------------------------------------------------------------------- edits


def test_end_tokens_are_not_drawn_before_min_tokens_even_with_a_bias_towards_them() -> None:
    options = {"min_tokens": 3, "logit_bias": {1: 100.0}, "end_token_ids": (1, 2), "temperature": 0}
    assert draw_many([1.0, 2.0, 3.0], 1, num_output_tokens=2, **options) == [0]
    assert draw_many([1.0, 2.0, 3.0], 1, num_output_tokens=3, **options) == [1]


def test_presence_and_frequency_look_at_the_output_alone_and_repetition_at_the_prompt_too() -> None:
    seen_in_prompt = {"prompt_token_ids": [0], "output_token_ids": [], "temperature": 0}
    assert draw_many([3.0, 2.0], 1, presence_penalty=2.0, frequency_penalty=2.0, **seen_in_prompt) == [0]
    assert draw_many([3.0, 2.0], 1, repetition_penalty=2.0, **seen_in_prompt) == [1]


def test_repetition_makes_negative_logits_more_negative() -> None:
    assert draw_many([-1.0, -1.5], 1, repetition_penalty=2.0, prompt_token_ids=[0], temperature=0) == [1]


def test_frequency_counts_and_presence_does_not() -> None:
    output = {"output_token_ids": [0, 0, 0], "temperature": 0}
    assert draw_many([3.0, 2.0], 1, presence_penalty=0.5, **output) == [0]
    assert draw_many([3.0, 2.0], 1, frequency_penalty=0.5, **output) == [1]


# -------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("options", [{}, {"top_p": 0.999999}, {"top_k": 9}])
def test_drawn_tokens_follow_the_softmax_down_to_the_rare_ones(options: dict[str, Any]) -> None:
    probs = [0.6, 0.25, 0.1, 0.04, 0.008, 0.0015, 3e-4, 1e-4, 1e-4]
    count = 40_000
    tokens = torch.tensor(draw_many([math.log(p) for p in probs] + [-40.0], count, **options))
    observed = torch.bincount(tokens, minlength=10).double()
    expected = torch.tensor(probs, dtype=torch.float64) * count
    assert observed[9] == 0
    assert float(((observed[:9] - expected) ** 2 / expected).sum()) < chi_square_limit(8)


@pytest.mark.parametrize("counter", ["position", "seed", "sample_index"])
def test_tokens_of_neighbouring_rows_are_independent(counter: str) -> None:
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
    count, params = 20_000, SamplingParams()
    counters = [{"seed": 0, "sample_index": 0, "position": 0} | {counter: i} for i in range(count)]
    rows = [SamplingRow(params=params, num_output_tokens=0, **counts) for counts in counters]
    tokens = torch.tensor(Sampler()(probs.log().float().expand(count, -1), rows).token_ids)
    observed = torch.bincount(tokens[:-1] * 4 + tokens[1:], minlength=16).double()
    expected = torch.outer(probs, probs).flatten() * (count - 1)
    assert float(((observed - expected) ** 2 / expected).sum()) < chi_square_limit(15)


# -------------------------------------------------------------------------------- logprobs


def test_logprobs_are_of_the_raw_distribution_whatever_the_parameters() -> None:
    logits = some_logits(3, 6)
    exact = logits.double().log_softmax(dim=1)
    rows = [
        a_row(seed=1, logprobs=4, temperature=0.5, top_k=3, logit_bias={7: 50.0}),
        a_row(seed=2),
        a_row(temperature=0, logprobs=0),
    ]
    result = Sampler()(logits, rows)
    assert result.logprobs[1] is None
    first, last = result.logprobs[0], result.logprobs[2]
    assert first is not None and last is not None
    assert list(first) == [7, *exact[0].topk(4).indices.tolist()]
    assert list(last) == [int(logits[2].argmax())]
    for index, found in ((0, first), (2, last)):
        for token, logprob in found.items():
            assert logprob.logprob == pytest.approx(float(exact[index, token]), abs=1e-5)
            assert logprob.rank == 1 + int((logits[index] > logits[index, token]).sum())
            assert logprob.decoded_token is None


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
@pytest.mark.parametrize("bad", [[0.0, math.nan, 1.0], [-INF, -INF, -INF], [0.0, INF, 1.0]])
def test_a_row_that_cannot_be_drawn_from_is_minus_one_and_changes_no_other(
    options: dict[str, Any], bad: list[float]
) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], bad, [2.0, 1.0, -INF]])
    rows = [a_row(**options, logprobs=1)] * 3
    drawn, without = Sampler()(logits, rows), Sampler()(logits[[0, 2]], rows[:2])
    assert [drawn.token_ids[0], drawn.token_ids[2]] == without.token_ids
    assert [drawn.logprobs[0], drawn.logprobs[2]] == without.logprobs
    if math.inf in bad and options == {"temperature": 0}:  # as transformers has it
        assert drawn.token_ids[1] == 1 and drawn.logprobs[1][1].logprob == 0.0
    else:
        assert drawn.token_ids[1] == -1
        assert drawn.logprobs[1] is None or math.inf in bad


@pytest.mark.parametrize("cut", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}])
@pytest.mark.parametrize("temperature", [1e-20, 1e-19, 1e-300, 1e300])
@pytest.mark.parametrize("repetition_penalty", [1e-20, 1e-19, 1e-300, 1e20, 1e300])
def test_no_temperature_and_penalty_together_overflow(cut, temperature, repetition_penalty) -> None:
    """Each is within its limits; their product is beyond float32's."""
    params = {**cut, "temperature": temperature, "repetition_penalty": repetition_penalty}
    row = SamplingRow(SamplingParams(**params), 0, 0, 3, 1, (), (1, 2), (3,))
    for logits in ([3.0, 2.0, -2.0, 1.0], [-3.0, -2.0, 2.0, -1.0], [3e4, -3e4, 3e38, -3e38]):
        (token_id,) = Sampler()(torch.tensor([logits]), [row]).token_ids
        penalised = [x if i == 0 else x / p if x > 0 else x * p for i, x in enumerate(logits) for p in [
            min(max(repetition_penalty, 1e-20), 1e20)
        ]]  # fmt: skip
        assert token_id >= 0
        if temperature < 1 and max(penalised) < 1e38:
            assert token_id == penalised.index(max(penalised))


def test_a_masked_token_stays_masked_whatever_the_penalty() -> None:
    params = SamplingParams(temperature=0, min_tokens=3, repetition_penalty=1e-20)
    row = SamplingRow(params, 0, 0, 3, 1, (0, 1, 2), (0, 1), (2,))
    assert Sampler()(torch.zeros(1, 3), [row]).token_ids == [-1]


def test_rows_and_logits_of_unequal_number_are_refused_and_none_is_nothing() -> None:
    with pytest.raises(ValueError, match="2 rows"):
        Sampler()(torch.zeros(3, 4), [a_row()] * 2)
    assert Sampler()(torch.zeros(0, 4), []).token_ids == []


# -------------------------------------------------------------------------------- against transformers


def test_the_kept_tokens_are_those_of_transformers_processors() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = some_logits(1, 9, spread=1.0)[:, :24]
    no_ids = torch.zeros(1, 0, dtype=torch.int64)
    for options, warper in (
        ({"top_k": 7}, processors.TopKLogitsWarper(7)),
        ({"top_p": 0.8}, processors.TopPLogitsWarper(0.8)),
        ({"min_p": 0.2}, processors.MinPLogitsWarper(0.2)),
    ):
        kept = set(warper(no_ids, logits)[0].isfinite().nonzero().flatten().tolist())
        assert set(draw_many(logits[0].tolist(), 3000, **options)) == kept


def test_repetition_and_temperature_are_those_of_transformers() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = some_logits(1, 10)
    prompt = [*logits[0].topk(30).indices.tolist(), 0, 0, 5]
    scores = processors.RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([prompt]), logits.clone())
    scores = processors.TemperatureLogitsWarper(0.6)(torch.tensor([prompt]), scores)
    count = 200
    theirs = draw_many(scores[0].tolist(), count)
    ours = draw_many(logits[0].tolist(), count, temperature=0.6, repetition_penalty=1.4, prompt_token_ids=prompt)
    assert ours == theirs
