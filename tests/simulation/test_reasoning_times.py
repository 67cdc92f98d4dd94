"""The clocks of an answer with reasoning, and what a client sees that is sent the content alone."""

from __future__ import annotations

import pytest

from paged_infer.simulation.times import TokenTimes, without_reasoning

# Arrived at 1 s, first token at 1.5 s, then one each 0.1 s: 20 of reasoning, 5 of content.
ANSWER = TokenTimes(1.0, 7, [1.5 + 0.1 * n for n in range(25)], reasoned_s=3.4, content_s=3.5)


def test_three_clocks_begin_at_the_arrival() -> None:
    assert (ANSWER.ttft_s, ANSWER.reasoning_s, ANSWER.ttfc_s) == pytest.approx((0.5, 2.4, 2.5))
    plain = TokenTimes(1.0, 7, [1.5, 1.6])
    assert (plain.reasoning_s, plain.ttfc_s) == (None, None)


def test_a_client_without_the_reasoning_sees_a_worse_ttft_a_better_tpot_and_the_same_end() -> None:
    seen = without_reasoning(ANSWER)
    assert seen.ttft_s == ANSWER.ttfc_s and seen.ttft_s > ANSWER.ttft_s
    assert seen.latency_s == ANSWER.latency_s and seen.num_tokens == ANSWER.num_tokens
    assert seen.tpot_s is not None and ANSWER.tpot_s is not None
    assert (ANSWER.tpot_s, seen.tpot_s) == pytest.approx((0.1, 0.1 * 4 / 24))  # 4 gaps over all 24: no token was faster
    with pytest.raises(ValueError, match="no content has come"):
        without_reasoning(TokenTimes(1.0, 7, [1.5, 1.6]))
