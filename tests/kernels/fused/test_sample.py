"""sample draws what the sampler draws: the same integers, the same tokens, the right shares."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paged_infer.control.step import SamplingRow
from paged_infer.kernels.fused.noise import MASK_31, mix, row_keys
from paged_infer.kernels.fused.sample import TILE, _exponential, _mix, _row_keys, sample, sample_reference
from paged_infer.kernels.triton_runtime import launch, tl, triton
from paged_infer.params import SamplingParams
from paged_infer.sampling.sampler import Sampler

Draw = tuple[Tensor, Tensor, Tensor, Tensor]  # temperatures, seeds, sample indices, positions
INT64 = st.integers(-(2**63), 2**63 - 1)
PLACES = st.tuples(INT64, st.integers(0, 2**31 - 1), st.integers(0, 2**32 - 1))


def draws(*rows: tuple[float, int, int, int]) -> Draw:
    """(temperature, seed, sample index, position) of each row, as ``sample`` expects them."""
    columns = zip(*rows, strict=True)
    return torch.tensor(next(columns), dtype=torch.float32), *(torch.tensor(list(c)) for c in columns)


def many_draws(num_rows: int, temperature: float) -> Draw:
    return draws(*((temperature, 7 + row % 3, row % 2, row) for row in range(num_rows)))


@triton.jit
def _noise_kernel(seeds, sample_indices, positions, keys, mixed, NUM_TOKENS: tl.constexpr):
    row = tl.program_id(0)
    first, second = _row_keys(tl.load(seeds + row), tl.load(sample_indices + row), tl.load(positions + row))
    tl.store(keys + 2 * row, first)
    tl.store(keys + 2 * row + 1, second)
    token = tl.arange(0, NUM_TOKENS)
    tl.store(mixed + row * NUM_TOKENS + token, _mix(first, second, token * 2003))


@triton.jit
def _exponential_kernel(x, out, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out + place, _exponential(tl.load(x + place)))


@given(st.lists(PLACES, min_size=1, max_size=6))
@settings(max_examples=30)
def test_keys_and_integers_are_those_of_the_noise_to_the_bit(places) -> None:
    seeds, samples, positions = (list(column) for column in zip(*places, strict=True))
    keys = torch.empty(len(places), 2, dtype=torch.int32)
    mixed = torch.empty(len(places), 64, dtype=torch.int32)
    columns = (torch.tensor(column) for column in (seeds, samples, positions))
    launch(_noise_kernel, (len(places),), *columns, keys, mixed, NUM_TOKENS=64)
    assert torch.equal(keys, row_keys(seeds, samples, positions))
    assert torch.equal(mixed, mix(keys, torch.arange(0, 64 * 2003, 2003, dtype=torch.int32)))


def test_the_exponential_keeps_its_precision_from_end_to_end() -> None:
    steps = torch.arange(0, 31).exp2().long()
    x = torch.cat((steps, steps - 1, MASK_31 - steps, torch.randint(0, MASK_31, (163,)))).to(torch.int32)
    out = torch.empty(256)
    launch(_exponential_kernel, (1,), x, out, BLOCK=256)
    rounded = (x.float() + 0.5).double() * (1 - 2.0**-24) * 2.0**-31  # noise.py: x becomes a float32
    torch.testing.assert_close(out.double(), -torch.log1p(-rounded), rtol=5e-7, atol=0.0)


@given(
    vocab_size=st.sampled_from([1, 2, 50, 700, 2 * TILE + 9]),
    rows=st.lists(st.tuples(st.sampled_from([0.0, 1e-30, 0.05, 0.8, 1.0, 30.0, 1e30]), PLACES), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 99),
)
@settings(max_examples=35)
def test_the_tokens_are_those_of_the_sampler_and_of_the_reference(vocab_size, rows, dtype, index_dtype, seed) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(len(rows), vocab_size + 3, generator=rng)).to(dtype)[:, :vocab_size]
    temperatures, seeds, samples, positions = draws(*((t, s, i, p % 2**31) for t, (s, i, p) in rows))
    tokens, scores = sample(logits, temperatures, seeds, samples.to(index_dtype), positions.to(index_dtype))
    expected = Sampler()(
        logits, [SamplingRow(SamplingParams(temperature=t), s, i, p % 2**31, 0) for t, (s, i, p) in rows]
    )
    assert tokens.tolist() == expected.token_ids and tokens.dtype == torch.int64
    reference_tokens, reference_scores = sample_reference(logits, temperatures, seeds, samples, positions)
    assert torch.equal(tokens, reference_tokens)
    torch.testing.assert_close(scores, reference_scores, rtol=1e-5, atol=1e-5)


def test_a_score_is_the_scaled_logit_counted_from_the_largest_less_the_log_of_the_noise() -> None:
    logits, (temperatures, seeds, samples, positions) = torch.randn(3, 40), many_draws(3, 0.5)
    tokens, scores = sample(logits, temperatures, seeds, samples, positions)
    bits = mix(row_keys(*(x.tolist() for x in (seeds, samples, positions))), torch.arange(40, dtype=torch.int32))
    times = -torch.log1p(-(bits.double() + 0.5) * 2.0**-31)
    expected = (logits.double() - logits.double().amax(1, keepdim=True)) / 0.5 - times.log()
    torch.testing.assert_close(scores.double(), expected.amax(1), rtol=1e-6, atol=1e-5)
    assert tokens.tolist() == expected.argmax(1).tolist()


def test_tokens_come_in_proportion_to_their_probabilities() -> None:
    num_rows = 300
    probabilities = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05, 0.0])
    logits = (0.7 * probabilities.log()).expand(num_rows, 6)
    tokens, _ = sample(logits, *many_draws(num_rows, 0.7))
    counts, expected = tokens.bincount(minlength=6), probabilities * num_rows
    assert counts[5] == 0
    chi_square = float(((counts - expected)[:5] ** 2 / expected[:5]).sum())
    assert chi_square < 18.5  # 4 degrees of freedom: once in a thousand


def test_equal_tokens_of_different_tiles_win_equally_often_however_cold_the_row() -> None:
    """At 1e-4 a scaled logit is so large that the noise would vanish in its last bit if it were added to it."""
    num_rows, rivals = 45, [3, TILE + 1, 2 * TILE + 5]
    logits = torch.zeros(1, 2 * TILE + 6)
    logits[:, rivals] = 30.0
    tokens, _ = sample(logits.expand(num_rows, -1), *many_draws(num_rows, 1e-4))
    counts = [int((tokens == token).sum()) for token in rivals]
    assert sum(counts) == num_rows and min(counts) > 6


def test_greedy_takes_the_lowest_of_equals_within_a_tile_and_across_tiles() -> None:
    logits = torch.full((3, 2 * TILE + 1), -1e-10)
    logits[0, [9, 4, 2 * TILE]] = 5.0
    logits[1, [TILE + 7, TILE + 3, 2 * TILE]] = 1e-10  # no other differs by more than exp(x) resolves
    tokens, scores = sample(logits, *many_draws(3, 0.0))
    assert tokens.tolist() == [4, TILE + 3, 0]
    assert torch.equal(scores, torch.tensor([5.0, 1e-10, -1e-10]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy remarks on log(0) and on NaN
@pytest.mark.parametrize("temperature", [0.0, 1e-20, 1.0, 1e20])
def test_a_row_that_cannot_be_drawn_from_is_minus_one_and_disturbs_no_other(temperature: float) -> None:
    vocab_size = TILE + 20
    logits = torch.randn(7, vocab_size)
    logits[0, 3], logits[1, TILE + 2], logits[2, 5] = math.nan, math.inf, -math.inf
    logits[3], logits[4] = -math.inf, -math.inf
    logits[4, TILE + 1] = -2.0  # one token can be drawn, and a tile without any
    logits[5], logits[5, TILE + 1] = -math.inf, math.nan
    for draw in (sample, sample_reference):
        tokens, scores = draw(logits, *many_draws(7, temperature))
        is_greedy = temperature == 0.0  # then +inf is the most probable token, as transformers has it
        assert (tokens == -1).tolist() == [True, not is_greedy, False, True, False, True, False]
        assert tokens[4] == TILE + 1 and tokens[2] != 5
        assert tokens[1] == (TILE + 2 if is_greedy else -1)
        assert torch.equal(scores.isfinite(), tokens >= 0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("temperature", [1e-30, 1e-20, 1e-5])
def test_no_temperature_makes_infinity_of_finite_logits(temperature: float) -> None:
    logits = torch.zeros(3, TILE + 20)
    logits[0, TILE + 3], logits[1, 7], logits[2, 5] = 1e30, torch.finfo(torch.float32).max, -1e30
    logits[2, TILE + 9] = 1e-3
    for draw in (sample, sample_reference):
        tokens, _ = draw(logits, *many_draws(3, temperature))
        assert tokens.tolist() == [TILE + 3, 7, TILE + 9]


def test_a_row_far_below_zero_is_drawn_like_any_other() -> None:
    logits = torch.randn(4, TILE + 50)
    there, _ = sample(logits - 5e3, *many_draws(4, 1.0))
    here, _ = sample((logits - 5e3) + 5e3, *many_draws(4, 1.0))
    assert torch.equal(there, here)


def test_no_rows_give_no_tokens() -> None:
    none = torch.empty(0)
    for draw in (sample, sample_reference):
        tokens, scores = draw(torch.empty(0, 9), none, none.long(), none.long(), none.long())
        assert (tokens.shape, tokens.dtype) == ((0,), torch.int64)
        assert (scores.shape, scores.dtype) == ((0,), torch.float32)


ZEROS = torch.zeros(2, dtype=torch.int64)
GOOD: dict[str, Any] = {
    "logits": torch.ones(2, 5),
    "temperatures": torch.ones(2),
    "seeds": ZEROS,
    "sample_indices": ZEROS,
    "positions": ZEROS,
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logits": torch.ones(5)}, r"logits \[5\]"),
        ({"logits": torch.ones(2, 0)}, r"logits \[2, 0\]"),
        ({"temperatures": torch.ones(3)}, r"temperatures \[3\]"),
        ({"positions": torch.zeros(2, 1, dtype=torch.int64)}, r"positions \[2, 1\]"),
        ({"logits": torch.ones(2, 5).double()}, "logits torch.float64"),
        ({"temperatures": torch.ones(2).half()}, "temperatures torch.float16"),
        ({"seeds": ZEROS.int()}, "seeds torch.int32"),
        ({"sample_indices": torch.ones(2)}, "sample_indices torch.float32"),
        ({"positions": ZEROS.to("meta")}, "positions torch.int64 on meta"),
        ({"logits": torch.ones(5, 2).mT}, r"strides \(1, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shape(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        sample(**{**GOOD, **wrong})


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy remarks on log(0) and on NaN
@pytest.mark.parametrize("vocab_size", [1, 33, 700, TILE + 9])
def test_tokens_without_their_bit_in_the_mask_are_never_sampled(vocab_size: int) -> None:
    rng = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(6, vocab_size, generator=rng)
    logits[4, 0] = math.nan  # which is not allowed below
    place = draws(*((t, row, 0, 7) for row, t in enumerate([0.0, 1.0, 1.0, 0.5, 1.0, 1.0])))
    masks = torch.randint(-(2**31), 2**31 - 1, (6, -(-vocab_size // 32)), generator=rng, dtype=torch.int32)
    masks[0] = masks[1] = -1
    masks[4, 0] &= ~1
    masks[5] = 0
    tokens, scores = sample(logits, *place, masks)
    expected, expected_scores = sample_reference(logits, *place, masks)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(scores[tokens >= 0], expected_scores[tokens >= 0], rtol=1e-5, atol=1e-5)
    free, free_scores = sample(logits, *place)
    assert torch.equal(tokens[:2], free[:2]) and torch.equal(scores[:2], free_scores[:2])  # to the bit
    assert tokens[5] == -1
    for row, token_id in enumerate(tokens.tolist()):
        assert token_id < 0 or int(masks[row, token_id // 32]) >> token_id % 32 & 1
    with pytest.raises(ValueError, match="masks must be dense int32"):
        sample(logits, *place, masks[:3])
