"""Checkers of chapter 01, tokens to text."""

from __future__ import annotations

import math

import torch

from checks import checker, expect, expect_tensor


@checker
def next_tokens(answer):
    """Greedy tokens of a right-padded batch: logits [B, T, V], lengths [B] -> int64 [B]."""
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1))  # B, T and V differ
    lengths = torch.tensor([2, 5, 4])
    found = answer(logits.clone(), lengths)
    expect_tensor(found, lengths, "next_tokens of logits [3, 5, 7]")
    right, padding, one_late = (
        torch.stack([row[place].argmax() for row, place in zip(logits, places, strict=True)])
        for places in (lengths - 1, torch.full((3,), 4), lengths.clamp(max=4))
    )
    expect(not found.equal(padding), "every row was read at its last column, which in rows 0 and 2 is padding")
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
    """exp of the mean surprise of each token but the first: logits [T, V], T token ids -> float."""
    logits = 2.0 * torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    token_ids = [4, 0, 8, 2, 2, 5]
    logprobs = logits.log_softmax(dim=-1)
    targets = torch.tensor(token_ids[1:])
    surprises = -logprobs[:-1].gather(1, targets[:, None])[:, 0]
    found = answer(logits.clone(), list(token_ids))
    expect(found is not None, "perplexity gives None: is the `return` missing?")
    found, right = float(found), float(surprises.mean().exp())
    unshifted = float((-logprobs.gather(1, torch.tensor(token_ids)[:, None])).mean().exp())

    def is_near(value):
        return math.isclose(found, value, rel_tol=1e-4)

    expect(not is_near(unshifted), "logits[t] were held against token t; they foretell token t + 1")
    expect(not is_near(math.log(right)), "this is the mean surprise itself: its exponential is still to be taken")
    expect(not is_near(float(surprises.sum().exp())), "the surprises were added up: take their mean")
    expect(not is_near(2 ** math.log(right)), "2 to the power of nats: either base 2 in both places, or e in both")
    expect(is_near(right), f"{found:.4f} instead of {right:.4f}")
    flat = float(answer(torch.zeros(4, 10), [1, 2, 3, 4]))
    expect(math.isclose(flat, 10.0, rel_tol=1e-4), f"ten equal logits have perplexity 10, and yours gives {flat:.4f}")


@checker
def draw(answer):
    """Inverse transform: weights [V], a uniform number u in [0, 1) -> the token in whose interval u lies."""
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0])  # of 4: token 1 has [0, 1/4), 3 has [1/4, 3/4), 4 the rest
    cases = {0.1: 1, 0.3: 3, 0.7: 3, 0.8: 4, 0.99: 4, 0.0: 1, 0.25: 3, 0.75: 4}
    found = {u: answer(weights.clone(), u) for u in cases}
    for u, token in found.items():
        expect(token is not None, "draw gives None: is the `return` missing?")
        found[u] = int(token)
    scaled = {u: int(answer(weights / weights.sum(), u)) for u in cases}
    if found != cases and scaled == cases:
        expect(False, "right for weights that add up to 1, but these add up to 4: scale u, or the weights")
    for u, token in found.items():
        expect(0 <= token < 5, f"u={u} gives token {token}, and there are tokens 0 to 4")
        expect(float(weights[token]) > 0, f"u={u} gives token {token}, whose weight is 0: it can never be drawn")
        expect(token == cases[u], f"u={u} gives token {token} instead of {cases[u]}: intervals hold their left end")
