"""The noise is uniform, independent in each of its arguments, and the same wherever it is computed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paged_infer.kernels.fused.noise import MASK_31, SCALE, mix, noise, request_seed, row_keys

MASK_64 = (1 << 64) - 1


def chi_square(observed: Tensor, expected: Tensor) -> float:
    return float(((observed.double() - expected) ** 2 / expected).sum())


def chi_square_limit(degrees: int, z: float) -> float:
    """Quantile of chi-square at the normal quantile z (Wilson & Hilferty 1931); z = 4: once in 31,600."""
    spread = 2.0 / (9.0 * degrees)
    return float(degrees * (1.0 - spread + z * math.sqrt(spread)) ** 3)


def assert_uniform(bins: Tensor, num_bins: int) -> None:
    """Neither too uneven nor too even: the seeds are fixed, so this passes always or never."""
    observed = torch.bincount(bins.flatten().long(), minlength=num_bins)
    expected = torch.full((num_bins,), bins.numel() / num_bins, dtype=torch.float64)
    statistic = chi_square(observed, expected)
    assert chi_square_limit(num_bins - 1, -4) < statistic < chi_square_limit(num_bins - 1, 4)


COUNTERS = ("seed", "sample", "position", "token")


def draws(counter: str, count: int, start: int = 0) -> Tensor:
    """Values of ``mix`` for consecutive values of one counter, at 8 settings of the rest: [8, count]."""
    values = list(range(start, start + count))
    results = []
    for other in range(8):
        fixed = {"seed": 1234 + 77 * other, "sample": other % 3, "position": 500 + 11 * other, "token": 31 * other}
        if counter == "token":
            keys = row_keys([fixed["seed"]], [fixed["sample"]], [fixed["position"]])
            results.append(mix(keys, torch.tensor(values, dtype=torch.int32))[0])
        else:
            columns = [values if name == counter else [fixed[name]] * count for name in COUNTERS[:3]]
            results.append(mix(row_keys(*columns), torch.tensor([fixed["token"]], dtype=torch.int32))[:, 0])
    return torch.stack(results)


@pytest.mark.parametrize("counter", COUNTERS)
def test_consecutive_counters_give_uniform_values(counter: str) -> None:
    values = draws(counter, 1 << 15)
    assert_uniform(values >> 21, 1024)  # the highest bits
    assert_uniform(values & 1023, 1024)  # the lowest
    small = values[values < 1 << 25]  # 1 in 64: the tokens that win races; are they uniform among themselves?
    assert_uniform(small >> 19, 64)


@pytest.mark.parametrize("shift", [0, 5, 10, 16, 21])
def test_within_one_row_the_values_of_the_tokens_are_uniform_in_all_their_bits(shift: int) -> None:
    """A hash may be uniform over many rows and uneven within each: the statistic is summed over rows."""
    num_rows, num_tokens = 32, 1 << 15
    keys = row_keys(range(num_rows), [0] * num_rows, range(num_rows))
    values = (mix(keys, torch.arange(num_tokens, dtype=torch.int32)) >> shift) & 1023  # [R, V]
    bins = values + 1024 * torch.arange(num_rows).unsqueeze(1)
    observed = torch.bincount(bins.flatten(), minlength=1024 * num_rows)
    statistic = chi_square(observed, torch.tensor(num_tokens / 1024, dtype=torch.float64))
    degrees = 1023 * num_rows
    assert chi_square_limit(degrees, -4) < statistic < chi_square_limit(degrees, 4)


@pytest.mark.parametrize("lag", [1, 2, 64])
@pytest.mark.parametrize("counter", COUNTERS)
def test_neighbouring_counters_are_independent(counter: str, lag: int) -> None:
    values = draws(counter, 1 << 15) >> 26  # [8, count], 32 bins
    assert_uniform(values[:, :-lag] * 32 + values[:, lag:], 1024)


@pytest.mark.parametrize("counter", ["seed", "sample", "position"])
def test_two_rows_are_independent_token_by_token(counter: str) -> None:
    names = {"seed": [7, 8], "sample": [0, 1], "position": [41, 42]}
    columns = [values if name == counter else values[:1] * 2 for name, values in names.items()]
    values = mix(row_keys(*columns), torch.arange(1 << 17, dtype=torch.int32)) >> 26
    assert_uniform(values[0] * 32 + values[1], 1024)


def test_counters_do_not_stand_in_for_each_other() -> None:
    """A sample's next position, the next sample's position and the next seed's are all different rows."""
    seeds, samples, positions = zip(
        *((s, i, p) for s in range(-4, 8) for i in range(8) for p in range(64)), strict=True
    )
    keys = row_keys(seeds, samples, positions)
    assert len(set(map(tuple, keys.tolist()))) == len(seeds)


def test_a_flipped_bit_of_a_token_id_flips_every_bit_with_probability_one_half() -> None:
    trials = 1 << 14
    keys = row_keys(range(trials), [0] * trials, [9] * trials)
    token_ids = torch.randint(0, 1 << 18, (trials, 1), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    before = mix(keys, token_ids)
    output_bits = torch.arange(31, dtype=torch.int32)
    for input_bit in range(18):
        flipped = before ^ mix(keys, token_ids ^ (1 << input_bit))  # [trials, 1]
        share = ((flipped >> output_bits) & 1).double().mean(dim=0)  # [31]
        assert float((share - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(trials)


def test_no_two_tokens_of_a_row_share_a_value() -> None:
    values = mix(row_keys([3], [0], [17]), torch.arange(200_000, dtype=torch.int32))
    assert len(values.unique()) == 200_000
    assert int(values.min()) >= 0


def test_noise_is_exponential_of_mean_one_down_to_its_smallest_values() -> None:
    values = noise(row_keys([5], [0], [3]), torch.arange(1 << 20, dtype=torch.int32)).double()
    assert abs(float(values.mean()) - 1.0) < 4 / math.sqrt(1 << 20)
    assert abs(float(values.var()) - 1.0) < 4 * math.sqrt(8 / (1 << 20))  # an exponential's variance has variance 8 / N
    for exponent in (4, 8, 12):
        below = int((values < 2.0**-exponent).sum())
        expected = (1 << 20) * -math.expm1(-(2.0**-exponent))
        assert abs(below - expected) < 4 * math.sqrt(expected)


def test_noise_is_never_zero_nor_infinite() -> None:
    ends = torch.tensor([0, MASK_31], dtype=torch.int32).to(torch.float32)  # the least and the greatest of mix
    smallest, largest = ends.add_(0.5).mul_(-SCALE).log1p_().neg_().tolist()
    assert smallest == pytest.approx(2.0**-32, rel=1e-6)
    assert largest == pytest.approx(24 * math.log(2), rel=1e-6)


@settings(deadline=None, max_examples=50)
@given(
    seeds=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4),
    sample=st.integers(0, 2**31 - 1),
    position=st.integers(0, 2**32 - 1),
    candidates=st.lists(st.integers(0, 4999), min_size=1, max_size=40),
)
def test_a_tokens_noise_does_not_depend_on_what_is_computed_with_it(
    seeds: list[int], sample: int, position: int, candidates: list[int]
) -> None:
    count = len(seeds)
    keys = row_keys(seeds, [sample] * count, [position] * count)
    everything = noise(keys, torch.arange(5000, dtype=torch.int32))  # [R, V]
    ids = torch.tensor(candidates, dtype=torch.int32)
    assert torch.equal(noise(keys, ids), everything[:, candidates])
    assert torch.equal(noise(keys, ids.repeat(count, 1)), everything[:, candidates])
    assert torch.equal(noise(keys[-1:], ids), everything[-1:, candidates])


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    sample=st.integers(0, 2**31 - 1),
    position=st.integers(0, 2**32 - 1),
    token_id=st.integers(0, 2**31 - 1),
)
def test_the_tensors_compute_what_plain_integers_do(seed: int, sample: int, position: int, token_id: int) -> None:
    def splitmix64(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK_64
        x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK_64
        return x ^ x >> 31

    hashed = splitmix64(splitmix64((seed + 0x9E3779B97F4A7C15) & MASK_64) ^ (sample << 32) + position)
    first, second = hashed & MASK_31, hashed >> 32 & MASK_31
    x = token_id ^ first
    x = ((x ^ x >> 16) * 0x7FEB352D + second) & MASK_31
    x = (x ^ x >> 15) * 0x046CA68B & MASK_31
    x ^= x >> 16

    keys = row_keys([seed], [sample], [position])
    assert keys.tolist() == [[first, second]]
    assert mix(keys, torch.tensor([token_id], dtype=torch.int32)).tolist() == [[x]]
    exponential = noise(keys, torch.tensor([token_id], dtype=torch.int32)).item()
    # As probabilities: just below 1 they are rounded to float32, which the logarithm makes large.
    assert -math.expm1(-exponential) == pytest.approx((x + 0.5) * 2.0**-31, rel=1e-6)


def test_the_race_draws_in_proportion_to_the_probabilities_down_to_the_rare_tokens() -> None:
    probs = torch.tensor([0.5, 0.3, 0.12, 0.05, 0.02, 0.008, 0.0015, 4e-4, 7e-5, 3e-5], dtype=torch.float64)
    probs = torch.cat((probs, torch.zeros(2, dtype=torch.float64)))
    count = 1 << 19
    keys = row_keys([11] * count, [0] * count, range(count))
    tokens = (probs.float() / noise(keys, torch.arange(12, dtype=torch.int32))).argmax(dim=1)
    observed = torch.bincount(tokens, minlength=12)
    assert int(observed[10:].sum()) == 0
    assert chi_square(observed[:10], probs[:10] * count) < chi_square_limit(9, 4)


def test_request_seeds_differ_between_requests_and_between_engines() -> None:
    seeds = {request_seed(engine_seed, number) for engine_seed in range(-8, 8) for number in range(256)}
    assert len(seeds) == 16 * 256
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert request_seed(0, 5) == request_seed(0, 5)
