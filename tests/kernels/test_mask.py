"""dense_attention and its mask: the definition that everything else is held to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from paged_infer.kernels.reference import causal_mask, dense_attention


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


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_dense_attention_is_that_of_torch(num_heads: int, num_kv_heads: int) -> None:
    q, k, v = torch.randn(9, num_heads, 8), torch.randn(9, num_kv_heads, 8), torch.randn(9, num_kv_heads, 8)
    out = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True, scale=0.3
    )
    torch.testing.assert_close(dense_attention(q, k, v, scale=0.3), out[0].transpose(0, 1))
