"""Logprobs: the chosen token first, then the best, ranks shared by equals, whatever else is computed beside them."""

from __future__ import annotations

import torch

from paged_infer.sampling.logprobs import token_logprobs


def test_the_chosen_token_is_not_listed_twice_and_equals_share_a_rank() -> None:
    found = token_logprobs(torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0]]), [3], [4])[0]
    assert list(found) == [3, 1, 2, 4]
    assert [logprob.rank for logprob in found.values()] == [1, 1, 3, 3]


def test_a_tie_with_the_last_of_the_top_ones_takes_its_place() -> None:
    tied = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]])
    assert [list(token_logprobs(tied, [3], [n])[0]) for n in range(5)] == [[3], [3, 0], [3, 0], [3, 0, 1], [3, 0, 1, 2]]
    assert [len(token_logprobs(torch.zeros(1, 9), [8], [n])[0]) for n in (0, 1, 2, 9)] == [1, 1, 2, 9]


def test_more_logprobs_than_tokens_is_all_tokens() -> None:
    assert len(token_logprobs(torch.zeros(1, 5), [0], [99])[0]) == 5


def test_logprobs_of_a_long_prompt_equal_those_of_its_rows() -> None:
    """2,000 x 3,000 logits are more than one slice."""
    logits = torch.randn(2000, 3000, generator=torch.Generator().manual_seed(0))
    token_ids, num_top = list(range(2000)), [i % 3 for i in range(2000)]
    found = token_logprobs(logits, token_ids, num_top)
    for i in (0, 1397, 1398, 1399, 1999):
        assert found[i] == token_logprobs(logits[i : i + 1], [i], [num_top[i]])[0]


# -------------------------------------------------------------------------------- errors
