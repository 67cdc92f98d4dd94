"""A head's dimensions in our order give the same scores; a norm of an output is the sublayer's last step."""

from __future__ import annotations

import pytest
import torch

from paged_infer.model.config import ModelConfig
from paged_infer.model.layers import RotaryEmbedding, rotary_order
from paged_infer.model.rope_config import RopeConfig


def rotated_by_the_paper(x: torch.Tensor, rope: RopeConfig, positions: torch.Tensor) -> torch.Tensor:
    """Su 2021, equation 13, pair by pair: x [T, D], rotated in float64."""
    out = x.double().clone()
    for pair in range(rope.rotary_dim // 2):
        angle = positions.double() * rope.theta ** (-2 * pair / rope.rotary_dim)
        first, second = (2 * pair, 2 * pair + 1) if rope.interleaved else (pair, pair + rope.rotary_dim // 2)
        a, b, factor = x[:, first].double(), x[:, second].double(), rope.attention_factor
        out[:, first] = factor * (a * angle.cos() - b * angle.sin())
        out[:, second] = factor * (b * angle.cos() + a * angle.sin())
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 8), (24, 18), (24, 2), (6, 4)])
@pytest.mark.parametrize("attention_factor", [1.0, 1.3])
def test_partial_and_interleaved_rotary_are_an_order_of_rows(
    head_dim: int, rotary_dim: int, interleaved: bool, attention_factor: float
) -> None:
    rope = RopeConfig(rotary_dim=rotary_dim, theta=50.0, interleaved=interleaved, attention_factor=attention_factor)
    config = ModelConfig(
        family="llama", vocab_size=9, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=head_dim, max_position_embeddings=64, ropes=(rope,),
    )  # fmt: skip
    x, positions = torch.randn(5, head_dim), torch.arange(5) * 7
    order = torch.tensor(rotary_order(rope, head_dim))
    assert order.sort().values.tolist() == list(range(head_dim))
    cos, signed_sin = RotaryEmbedding(rope, config)(positions, torch.float32)
    ours = x[:, order] * cos[:, 0] + x[:, order].roll(head_dim // 2, -1) * signed_sin[:, 0]
    expected = rotated_by_the_paper(x, rope, positions)[:, order]
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_whole_head_in_halves_needs_no_order() -> None:
    assert rotary_order(RopeConfig(rotary_dim=6), 6) == (0, 1, 2, 3, 4, 5)
