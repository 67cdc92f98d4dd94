"""Checkers of chapter 13, speculation."""

from __future__ import annotations

import random

import torch

from checks import checker, expect


def _is_ids(found, asked: str) -> None:
    expect(found is not None, f"{asked} gives None: is the `return` missing?")
    expect(isinstance(found, list), f"{asked} gives a {type(found).__name__}, and a list of ids is asked for")


@checker
def take(answer):
    """Accepted drafts and the draw after them, up to a stop token and as far as there is room."""
    found = answer([4, 5, 6], [4, 8, 6, 9], 0, 10)
    asked = "drafts 4 5 6 and draws 4 8 6 9"
    _is_ids(found, asked)
    expect(found != [4], f"{asked}: the draw after the last accepted draft, 8, is a token of the text, too")
    expect(found != [4, 5], f"{asked}: a draft that differs from the draw is not kept; the draw, 8, is")
    expect(
        6 not in found,
        f"{asked}: the 6 was drawn after a 5 that was rejected; what follows a wrong draft does not count",
    )
    expect(found == [4, 8], f"{asked} give [4, 8], and yours gives {found}")
    found = answer([4, 5], [4, 5, 9], 0, 10)
    expect(found != [4, 5], "drafts 4 5, both accepted: the third draw, 9, is the bonus token")
    expect(found == [4, 5, 9], f"drafts 4 5 and draws 4 5 9 give [4, 5, 9], and yours gives {found}")
    found = answer([4, 5], [4, 5, 9], 4, 10)
    expect(found != [4, 5, 9], "the text ended with the stop token 4: nothing follows it")
    expect(found != [], "the stop token itself belongs to the text")
    expect(found == [4], f"drafts 4 5, draws 4 5 9 and stop token 4 give [4], and yours gives {found}")
    found = answer([4, 5], [4, 5, 9], 0, 2)
    expect(found == [4, 5], f"draws 4 5 9, all accepted, with room for 2 give [4, 5], and yours gives {found}")
    found = answer([], [7], 0, 1)
    expect(found == [7], f"no drafts and the draw 7 give [7], and yours gives {found}")
    found = answer([4], [7, 8], 7, 5)
    expect(found == [7], f"draft 4, draws 7 8 and stop token 7 give [7], and yours gives {found}")


def _latest(token_ids, most, size):
    for at in reversed(range(len(token_ids) - size)):
        if token_ids[at : at + size] == token_ids[-size:]:
            return token_ids[at + size : at + size + most]
    return []


@checker
def lookup_latest(answer):
    """What followed the ending where it stood last before."""
    text = [7, 3, 9, 4, 7, 3, 5, 6, 8, 7, 3]
    found = answer(list(text), 2, 2)
    _is_ids(found, "the ending 7 3 of 7 3 9 4 7 3 5 6 8 7 3")
    expect(found != [], "7 3 stands twice before the end; only the ending itself is followed by nothing")
    expect(found != [9, 4], "9 4 followed the first 7 3, and the latest before the end is asked for")
    expect(found != [7, 3], "7 3 is what was looked for; drafts are what came behind it")
    expect(found != [5, 6, 8, 7, 3], "two drafts are wanted, and these are all that followed")
    expect(found == [5, 6], f"behind the latest 7 3 came 5 6, and yours gives {found}")
    found = answer([1, 1, 1], 4, 2)
    expect(found != [], "1 1 stands at place 0 of 1 1 1, too: it may overlap with the ending")
    expect(found == [1], f"1 1 1 and size 2: what followed at place 0 is [1], and yours gives {found}")
    for text in ([1, 2, 3], [4]):
        found = answer(list(text), 3, 2)
        expect(found == [], f"the end of {text} stood nowhere before: [] is asked for, and yours gives {found}")
    dice = random.Random(0)
    for _ in range(300):
        text = [dice.randrange(3) for _ in range(dice.randrange(1, 14))]
        most, size = dice.randrange(1, 5), dice.randrange(1, 4)
        found, right = answer(list(text), most, size), _latest(text, most, size)
        expect(found == right, f"{text}, most={most}, size={size} give {found}, not {right}")


@checker
def keep_or_redraw(answer):
    """Keep a draft with min(1, p/q), else draw from the rest of p."""
    p, q = torch.tensor([0.4, 0.4, 0.1, 0.1]), torch.tensor([0.1, 0.2, 0.3, 0.4])

    def kept(draft, u, v):
        return answer(p.clone(), q.clone(), draft, u, v)

    found = kept(0, 0.9, 0.9)
    expect(found is not None, "keep_or_redraw gives None: is the `return` missing?")
    expect(found == 0, "p is above q for token 0 (0.4 against 0.1): it is always kept. Is the ratio q / p?")
    found = kept(2, 0.3, 0.99)
    expect(found == 2, f"p/q of token 2 is a third and u = 0.3 is below: kept; yours gives {found}")
    found = kept(3, 0.9, 0.35)
    expect(found != 3, "p/q of token 3 is a quarter and u = 0.9 is not below it: it is not kept")
    expect(
        found != 1, "what is left, 0.3, 0.2, 0, 0, adds up to 0.5, so v = 0.35 falls into token 0. Is it normalised?"
    )
    expect(found == 0, f"what is left is 0.3, 0.2, 0, 0, and v = 0.35 falls into token 0; yours gives {found}")
    found = kept(2, 0.5, 0.95)
    expect(found != 2, "p/q of token 2 is a third and u = 0.5 is not below it: it is not kept")
    expect(found != 3, "this redraws from p; q has had its share, and max(p - q, 0) is what is left")
    expect(found == 1, f"what is left is 0.3, 0.2, 0, 0, and v = 0.95 falls into token 1; yours gives {found}")
    counts = torch.zeros(4)
    grid = [(n + 0.5) / 40 for n in range(40)]
    for draft in range(4):
        for u in grid:
            for v in grid:
                counts[int(kept(draft, u, v))] += q[draft] / 1600
    close = torch.allclose(counts, p, atol=0.02)
    expect(close, f"over all u and v the tokens come as {[round(x, 2) for x in counts.tolist()]}, not as p")


@checker
def best_k(answer):
    """The number of drafts with the greatest speed-up of Leviathan et al."""

    def right(alpha, cost, most):
        return max(range(most + 1), key=lambda k: sum(alpha**n for n in range(k + 1)) / (1 + k * cost))

    try:
        found = answer(1.0, 0.1, 6)
    except ZeroDivisionError:
        found = "a division by 0"
    expect(found is not None, "best_k gives None: is the `return` missing?")
    expect(found != "a division by 0", "alpha = 1 divides by 0 in the closed form: all k + 1 tokens are given then")
    expect(found == 6, f"drafts that are always right and cost 0.1: as many as allowed, 6; yours gives {found}")
    found = answer(0.2, 0.5, 8)
    expect(found != 1, "alpha 0.2 at cost 0.5: one draft gives 1.2 tokens for 1.5 passes, so no drafts is better")
    expect(found == 0, f"alpha 0.2 at cost 0.5 is best without drafts, k = 0, and yours gives {found}")
    found = answer(0.8, 0.1, 20)
    expect(found != 20, "tokens a step always grow with k: what a draft costs must be divided by, and was forgotten")
    expect(found != 21, "this counts the tokens of a step and not the drafts")
    expect(found == right(0.8, 0.1, 20), f"alpha 0.8 at cost 0.1: k = 5 is best, and yours gives {found}")
    found = answer(0.0, 0.0, 5)
    expect(found == 0, f"drafts that are never right and cost nothing: all k are equal, so 0; not {found}")
    for alpha, cost in ((0.9, 0.05), (0.6, 0.02), (0.5, 0.3), (0.95, 0.2)):
        found = answer(alpha, cost, 10)
        expect(found == right(alpha, cost, 10), f"alpha {alpha} at cost {cost} gives {found}")
