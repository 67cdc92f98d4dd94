"""Which keys a query sees."""

from __future__ import annotations

import torch

from paged_infer.kernels.attention.mask import causal_mask


def test_the_causal_diagonal_ends_in_the_last_key() -> None:
    assert causal_mask(2, 4, None, torch.device("cpu")).tolist() == [
        [True, True, True, False],
        [True, True, True, True],
    ]


def test_a_window_counts_the_token_itself() -> None:
    assert causal_mask(2, 4, 2, torch.device("cpu")).tolist() == [
        [False, True, True, False],
        [False, False, True, True],
    ]
