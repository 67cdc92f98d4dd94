"""Checkers of chapter 01, tokens to text."""

from __future__ import annotations

import math

import torch
from my_engine import SamplingParams
from my_engine.sampler import sample

from checks import checker, expect, expect_tensor


@checker
def next_tokens(answer):
    """Greedy tokens of a right-padded batch: logits [B, T, V], lengths [B] -> int64 [B]."""
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1))  # B, T and V differ
    lengths = torch.tensor([2, 4, 3])  # none fills its row: one column late is still a column
    found = answer(logits.clone(), lengths)
    expect_tensor(found, lengths, "next_tokens of logits [3, 5, 7]")
    right, padding, one_late = (
        torch.stack([row[place].argmax() for row, place in zip(logits, places, strict=True)])
        for places in (lengths - 1, torch.full((3,), 4), lengths)
    )
    expect(not found.equal(padding), "every row was read at its last column, which is padding")
    expect(not found.equal(one_late), "every row was read one column late: the last token stands at lengths - 1")
    for row in range(3):
        expect(
            int(found[row]) == int(right[row]),
            f"row {row}, of length {int(lengths[row])}, gives {int(found[row])} instead of {int(right[row])}",
        )


@checker
def keep_top_p_rows(answer):
    """The nucleus of every row: probs [R, V], top_p [R] -> bool [R, V]."""
    probs = torch.tensor([[0.05, 0.5, 0.1, 0.2, 0.15], [0.4, 0.1, 0.1, 0.1, 0.3], [0.1, 0.1, 0.7, 0.06, 0.04]])
    limits = torch.tensor([0.8, 0.35, 1.0])
    right = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    found = answer(probs.clone(), limits)
    expect_tensor(found, right, "keep_top_p_rows of probs [3, 5]")
    expect(bool(found[1].any()), "row 1 keeps nothing: the most probable token always stays, even above top_p")
    in_order = right.gather(1, probs.sort(dim=1, descending=True).indices)
    expect(not found.equal(in_order), "the mask is in sorted order: it has to go back to the order of the tokens")
    expect(int(found[0].sum()) != 2, "row 0 loses the token that crosses top_p: 0.5 + 0.2 is not yet 0.8")
    for row in range(3):
        limit, kept = float(limits[row]), found[row].nonzero().flatten().tolist()
        wanted = right[row].nonzero().flatten().tolist()
        expect(kept == wanted, f"row {row}, with top_p {limit:.2f}, keeps tokens {kept} instead of {wanted}")


@checker
def perplexity(answer):
    """exp of the mean NLL of each token but the first: logits [T, V], T token ids -> float."""
    logits = 2.0 * torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    token_ids = [4, 0, 8, 2, 2, 5]
    logprobs = logits.log_softmax(dim=-1)
    targets = torch.tensor(token_ids[1:])
    nlls = -logprobs[:-1].gather(1, targets[:, None])[:, 0]
    found = answer(logits.clone(), list(token_ids))
    expect(found is not None, "perplexity gives None: is the `return` missing?")
    found, right = float(found), float(nlls.mean().exp())
    unshifted = float((-logprobs.gather(1, torch.tensor(token_ids)[:, None])).mean().exp())

    def is_near(value):
        return math.isclose(found, value, rel_tol=1e-4)

    expect(not is_near(unshifted), "logits[t] were compared with token t; they predict token t + 1")
    expect(not is_near(math.log(right)), "this is the cross-entropy itself: its exponential is still to be taken")
    expect(not is_near(float(nlls.sum().exp())), "the NLLs were added up: take their mean")
    expect(not is_near(2 ** math.log(right)), "2 to the power of nats: either base 2 in both places, or e in both")
    expect(is_near(right), f"{found:.4f} instead of {right:.4f}")
    flat = float(answer(torch.zeros(4, 10), [1, 2, 3, 4]))
    expect(math.isclose(flat, 10.0, rel_tol=1e-4), f"ten equal logits have perplexity 10, and yours gives {flat:.4f}")


@checker
def sample_top_n_sigma(answer):
    """my_engine's sampler with one rule more: logits [V], params, position, n -> a token id."""
    logits = 3.0 * torch.randn(60, generator=torch.Generator().manual_seed(4))
    deviations_below = (logits.max() - logits) / logits.std()
    kept = deviations_below <= 1.0
    params = SamplingParams(temperature=2.0, seed=5)

    def drawn(cut, params=params):
        return [sample(cut, params, position) for position in range(200)]

    given = logits.clone()
    first = answer(given, params, 0, 1.0)
    expect(first is not None, "sample_top_n_sigma gives None: is the `return` missing?")
    expect(given.equal(logits), "the logits that were given have changed: work on a copy, they are needed for logprobs")
    found = [int(answer(logits.clone(), params, position, 1.0)) for position in range(200)]
    zeroed = drawn(logits.where(kept, 0.0))
    expect(found != zeroed, "a token that is cut has logit 0, which is a score like any other: make it -inf")
    expect(found != drawn(logits), "nothing is cut: the tokens are those of my_engine's sampler without the rule")
    for position, (token, right) in enumerate(zip(found, drawn(logits.masked_fill(~kept, -torch.inf)), strict=True)):
        case = f"position {position}, n=1: token {token}"
        expect(0 <= token < 60, f"{case}, and there are tokens 0 to 59")
        below = float(deviations_below[token])
        expect(bool(kept[token]), f"{case} lies {below:.1f} standard deviations below the largest, and is to be cut")
        expect(
            token == right,
            f"{case} instead of {right}: it may be drawn, but my_engine's sampler draws another once the rest is -inf",
        )
    greedy = {int(answer(logits.clone(), SamplingParams(), position, 1.0)) for position in range(9)}
    expect(
        greedy == {int(logits.argmax())},
        "with temperature 0 the most probable token is to be taken: the other options of params stay as they are",
    )
    two = SamplingParams(temperature=2.0, seed=5, top_k=2)
    expect(
        [int(answer(logits.clone(), two, position, 5.0)) for position in range(200)] == drawn(logits, two),
        "with top_k=2 a third token is drawn: the other options of params stay as they are",
    )
