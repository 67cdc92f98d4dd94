"""Every path of the sampler draws what the readable reference draws; a rule in the wrong place does not pass."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paged_infer.control.guided.token_mask import TokenMask
from paged_infer.control.step import SamplingRow
from paged_infer.kernels.op_sets import C_OPS, TORCH_OPS, TRITON_OPS, Ops
from paged_infer.params import SamplingParams
from paged_infer.sampling import sampler as sampler_module
from paged_infer.sampling.logits_processors import apply_logits_processors
from paged_infer.sampling.reference import sample_token, token_distribution
from paged_infer.sampling.sampler import Sampler

VOCAB = 300  # more than the 128 candidates that top_p starts with
INF = math.inf
Rule = Callable[[Tensor], Tensor]  # logits [R, V] -> [R, V]


@st.composite
def sampling_rows(draw: st.DrawFn) -> SamplingRow:
    def maybe(values: list[Any], otherwise: Any) -> Any:
        return draw(st.sampled_from([otherwise, *values]))

    output = tuple(draw(st.lists(st.integers(0, VOCAB - 1), max_size=5)))
    params = SamplingParams(
        # Hotter still, float32 makes equals of unlike tokens, and a nucleus may end with either.
        temperature=draw(st.sampled_from([0.0, 1e-30, 0.3, 1.0, 1.7, 30.0])),
        top_k=maybe([1, 2, 40, 130, VOCAB - 1, VOCAB, VOCAB + 9], 0),
        top_p=maybe([0.05, 0.5, 0.9, 0.999], 1.0),
        min_p=maybe([0.02, 0.3, 1.0], 0.0),
        presence_penalty=maybe([1.5], 0.0),
        logit_bias=maybe([{3: 2.5, 7: -100.0}], {}),
        max_tokens=None,
    )
    seed = draw(st.integers(-(2**63), 2**63 - 1))
    place = draw(st.integers(0, 3)), draw(st.integers(0, 5000))
    return SamplingRow(params, seed, *place, len(output), (), (), output, draw(token_masks()))


class Fixed:
    """A matcher that always allows the same tokens."""

    def __init__(self, bits: bytes) -> None:
        self.mask = lambda: bits
        self.rollback = lambda num_tokens: None


@st.composite
def token_masks(draw: st.DrawFn) -> TokenMask | None:
    """Often none; of all tokens, some, one or no token at all."""
    rng = random.Random(draw(st.integers(0, 10**6)))
    share = draw(st.sampled_from([None, None, 1.0, 0.5, 0.03, 0.0]))
    if share is None:
        return None
    allowed = sum(1 << i for i in range(VOCAB) if rng.random() < share)
    return TokenMask(Fixed((allowed).to_bytes(40, "little")))  # type: ignore[arg-type]


@st.composite
def some_logits(draw: st.DrawFn, num_rows: int) -> Tensor:
    """Of any spread, with ties or without, some tokens or none at -inf, and now and then a row that is unsound."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    logits = torch.randn(num_rows, VOCAB, generator=rng) * draw(st.sampled_from([0.2, 1.0, 4.0]))
    step = draw(st.sampled_from([0.0, 0.5, 100.0]))  # 0: no ties; 100: a row of equals
    logits = (logits / step).round() * step if step else logits
    share = draw(st.sampled_from([0.0, 0.3, 0.99, 1.0]))
    logits[torch.rand(num_rows, VOCAB, generator=rng) < share] = -INF
    if draw(st.integers(0, 4)) == 0:
        logits[0, draw(st.integers(0, VOCAB - 1))] = draw(st.sampled_from([math.nan, INF]))
    return logits


def hold_to_the_reference(ops: Ops, logits: Tensor, rows: list[SamplingRow], rule: Rule = lambda x: x) -> None:
    """``rule`` is one more processor, which the reference applies to the whole row."""
    processed = rule(apply_logits_processors(logits, rows))
    expected = [sample_token(of_row, row) for of_row, row in zip(processed, rows, strict=True)]
    assert Sampler(ops.sample, ops.argmax, ops.mask_logits)(logits, rows).token_ids == expected


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy remarks on log(0) and on NaN
@pytest.mark.parametrize("ops", [TORCH_OPS, C_OPS, TRITON_OPS], ids=["torch", "c", "triton"])
def test_every_path_draws_what_the_reference_draws(ops: Ops) -> None:
    @settings(deadline=None, max_examples=40 if ops is TRITON_OPS else 150)
    @given(rows=st.lists(sampling_rows(), min_size=1, max_size=6), data=st.data())
    def check(rows: list[SamplingRow], data: st.DataObject) -> None:
        hold_to_the_reference(ops, data.draw(some_logits(len(rows))), rows)

    check()


@pytest.mark.parametrize("ops", [TORCH_OPS, C_OPS, TRITON_OPS], ids=["torch", "c", "triton"])
def test_a_mask_changes_neither_the_noise_of_its_row_nor_any_other_row(ops: Ops) -> None:
    """The token with the best score among those allowed, and where all are, the token without a mask."""
    sampler = Sampler(ops.sample, ops.argmax, ops.mask_logits)
    params = [{}, {"temperature": 0}, {"top_k": 50}, {"top_p": 0.9}] * 3
    rows = [SamplingRow(SamplingParams(**options), seed, 0, 5, 0) for seed, options in enumerate(params)]
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(1))
    free = sampler(logits, rows).token_ids
    everything, without = (1 << VOCAB) - 1, [(1 << VOCAB) - 1 - (1 << token_id) for token_id in free]

    def masked(allowed: int) -> TokenMask:
        return TokenMask(Fixed(allowed.to_bytes(40, "little")))  # type: ignore[arg-type]

    assert sampler(logits, [replace(row, mask=masked(everything)) for row in rows]).token_ids == free
    some = [replace(row, mask=masked(without[i])) if i % 2 else row for i, row in enumerate(rows)]
    mixed = sampler(logits, some).token_ids
    assert mixed[::2] == free[::2] and all(a != b for a, b in zip(mixed[1::2], free[1::2], strict=True))


def test_a_grammar_that_fails_fails_its_row_and_keeps_the_reason() -> None:
    def fail() -> bytes:
        raise RuntimeError("the grammar broke")

    matcher = Fixed(b"")
    matcher.mask = fail
    mask = TokenMask(matcher)  # type: ignore[arg-type]
    rows = [SamplingRow(SamplingParams(), 0, 0, 5, 0, mask=mask), SamplingRow(SamplingParams(), 0, 0, 5, 0)]
    failed, other = Sampler()(torch.randn(2, VOCAB), rows).token_ids
    assert failed == -1 and other >= 0 and mask.error == "the grammar broke"
    copied = pickle.loads(pickle.dumps(mask))
    assert (copied.bits, copied.error) == (b"", "the grammar broke")


def test_the_distribution_by_hand() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.1, 0.2]).log()

    def kept(**options: Any) -> list[float]:
        probs = token_distribution(logits, SamplingParams(**options))
        return [round(float(p), 4) for p in probs / probs.sum()]

    assert kept() == [0.1, 0.4, 0.2, 0.1, 0.2]
    assert kept(temperature=0) == [0, 1, 0, 0, 0]
    assert kept(temperature=0.5) == [0.0385, 0.6154, 0.1538, 0.0385, 0.1538]
    assert kept(top_k=2) == [0, 0.5, 0.25, 0, 0.25]  # the second place is shared
    assert kept(top_p=0.5) == [0, 0.6667, 0.3333, 0, 0]  # of equals, the lower id
    assert kept(min_p=0.4) == [0, 0.5, 0.25, 0, 0.25]
    assert kept(top_k=2, top_p=0.5) == [0, 1, 0, 0, 0]  # a share of what top_k left


# -------------------------------------------------------------------------------- where a new rule goes


def top_n_sigma(logits: Tensor, n: float = 1.0) -> Tensor:
    """Keep what lies within n standard deviations of the largest logit (Tang et al. 2024): needs the whole row."""
    limit = logits.amax(dim=1, keepdim=True) - n * logits.std(dim=1, keepdim=True)
    return logits.masked_fill(logits < limit, -INF)


def rows_with(**options: Any) -> list[SamplingRow]:
    return [SamplingRow(SamplingParams(**options), seed, 0, 5, 0) for seed in range(64)]


CUTS = [{}, {"top_p": 0.95}, {"min_p": 0.01}, {"top_k": 40}, {"top_k": 40, "top_p": 0.95}]
LOGITS = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_rule_of_the_whole_row_passes_among_the_logits_processors(cut: dict[str, Any], monkeypatch) -> None:
    with pytest.raises(AssertionError):  # the rule does decide what is drawn
        hold_to_the_reference(TORCH_OPS, LOGITS, rows_with(**cut), top_n_sigma)
    processors = apply_logits_processors
    monkeypatch.setattr(
        sampler_module, "apply_logits_processors", lambda logits, rows: top_n_sigma(processors(logits, rows))
    )
    hold_to_the_reference(TORCH_OPS, LOGITS, rows_with(**cut), top_n_sigma)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_same_rule_beside_min_p_is_caught_where_only_candidates_are_looked_at(
    cut: dict[str, Any], monkeypatch
) -> None:
    """Without top_k ``_probs`` sees the whole row and the rule seems to work; with it, tokens outside are drawn."""
    plain = sampler_module._probs

    def probs_with_the_rule(logits: Tensor, rows: list[SamplingRow]) -> Tensor:
        return plain(logits, rows).masked_fill_(top_n_sigma(logits.float()).isneginf(), 0.0)

    monkeypatch.setattr(sampler_module, "_probs", probs_with_the_rule)
    if "top_k" not in cut:
        hold_to_the_reference(TORCH_OPS, LOGITS, rows_with(**cut), top_n_sigma)
        return
    with pytest.raises(AssertionError):
        hold_to_the_reference(TORCH_OPS, LOGITS, rows_with(**cut), top_n_sigma)
