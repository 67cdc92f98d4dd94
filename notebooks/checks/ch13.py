"""Checkers of chapter 13, speculation."""

from __future__ import annotations

import random
from functools import cache

import torch
from my_engine import Engine, SamplingParams

from checks import checker, expect
from paged_infer import storyteller


def _is_ids(found, asked: str) -> None:
    expect(found is not None, f"{asked} gives None: is the `return` missing?")
    expect(isinstance(found, list), f"{asked} gives a {type(found).__name__}, and a list of ids is asked for")


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
    expect(found != [7, 3], "7 3 is what was looked for; drafts are what followed it")
    expect(found != [5, 6, 8, 7, 3], "two drafts are wanted, and these are all that followed")
    expect(found == [5, 6], f"5 6 followed the latest 7 3, and yours gives {found}")
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
def keep_or_recover(answer):
    """Keep a draft that has no distribution with p, else draw from the rest of p."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])

    def kept(draft, u, v):
        return answer(p.clone(), draft, u, v)

    found = kept(1, 0.2, 0.9)
    expect(found is not None, "keep_or_recover gives None: is the `return` missing?")
    expect(found == 1, f"p of the draft 1 is 0.3 and u = 0.2 is below: accepted; yours gives {found}")
    found = kept(0, 0.3, 0.99)
    expect(found == 0, f"p of the draft 0 is 0.4 and u = 0.3 is below: accepted; yours gives {found}")
    found = kept(3, 0.5, 0.05)
    expect(found != 3, "p of the draft 3 is 0.1 and u = 0.5 is not below it: it is not accepted")
    found = kept(0, 0.5, 0.1)
    expect(found != 0, "this draws from p, and the draft has had its share: what is left of p has 0 for it")
    expect(found == 1, f"what is left is 0, 0.3, 0.2, 0.1, and v = 0.1 falls into token 1; yours gives {found}")
    found = kept(0, 0.5, 0.55)
    expect(found != 3, "what is left adds up to 0.6, so v = 0.55 falls into token 2. Is it divided by its sum?")
    expect(found == 2, f"what is left is 0, 0.3, 0.2, 0.1, and v = 0.55 falls into token 2; yours gives {found}")
    counts, grid = torch.zeros(4), [(n + 0.5) / 40 for n in range(40)]
    for draft in range(4):  # whatever is drafted, the tokens come as p
        for u in grid:
            for v in grid:
                counts[int(kept(draft, u, v))] += 1 / 6400
    close = torch.allclose(counts, p, atol=0.02)
    expect(close, f"over all drafts, u and v the tokens come as {[round(x, 2) for x in counts.tolist()]}, not as p")


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


OPENINGS = ["Once upon a time", "A story about Mia and a red key. Mia found", "One day, Tom and his dog"]


def _engine(num_blocks=64, block_size=4):
    return Engine(storyteller.PATH, num_blocks=num_blocks, block_size=block_size)


def _params(temperature=0.0, **options):
    return [SamplingParams(temperature=temperature, max_tokens=n, seed=n, **options) for n in (18, 5, 11)]


@cache
def _texts(temperature, ignore_eos):
    sequences = _engine().generate(OPENINGS, _params(temperature, ignore_eos=ignore_eos))
    return [sequence.token_ids for sequence in sequences], [sequence.finish_reason for sequence in sequences]


def _from_texts(texts, wrong_every=0):
    """Drafts that continue one of the texts, with every so many tokens wrong; () where no text begins so."""

    def propose(token_ids, most):
        for text in texts:
            if text[: len(token_ids)] == token_ids:
                places = range(len(token_ids), len(token_ids) + most)
                right = [text[at] if at < len(text) else 7 for at in places]
                is_wrong = [wrong_every and at % wrong_every == 0 for at in places]
                return [token + 1 if off else token for token, off in zip(right, is_wrong, strict=True)]
        return []

    return propose


def _run(answer, engine, params, propose, most=4):
    """Sequences, and the number of steps, until all are finished."""
    sequences, steps = engine.add_requests(OPENINGS, params), 0
    while not all(sequence.finish_reason for sequence in sequences):
        answer(engine, propose, most)
        steps += 1
        expect(steps < 100, "100 steps, and the requests are not finished: does each sequence get its own token?")
    return sequences, steps


def _expect_true_names(engine, sequences):
    """Every block in the prefix cache holds the keys of the tokens for which it is named."""
    manager, size = engine.scheduler.manager, engine.cache.block_size
    names = set(manager.block_of)
    for sequence in sequences:
        chain = type(manager).hashes(manager, _Fresh(sequence.token_ids))
        names -= set(chain[: (len(sequence.token_ids) - 1) // size])
    expect(
        not names, "a block is named in the prefix cache for tokens that no text has: rejected drafts were published"
    )


class _Fresh:
    def __init__(self, token_ids):
        self.token_ids, self.block_hashes = token_ids, []


@checker
def speculative_step(answer):
    """``Engine.step`` with drafts: the same tokens in fewer steps, and a prefix cache without rejected ones."""
    for temperature in (0.0, 1.2):
        texts, _ = _texts(temperature, True)
        for kind, propose in (
            ("no drafts", lambda token_ids, most: []),
            ("drafts that are all right", _from_texts(texts)),
            ("drafts with every third token wrong", _from_texts(texts, 3)),
            ("drafts that are all wrong", _from_texts(texts, 1)),
        ):
            engine = _engine()
            sequences, steps = _run(answer, engine, _params(temperature, ignore_eos=True), propose)
            asked = f"{kind}, temperature {temperature:g}"
            for right, sequence in zip(texts, sequences, strict=True):
                expect(
                    len(sequence.token_ids) <= len(right),
                    f"{asked}: a sequence has more tokens than its max_tokens allow: do its drafts still stand in it?",
                )
                expect(sequence.token_ids == right, f"{asked}: {sequence.token_ids} are not the tokens of Engine.step")
            expect(
                kind != "drafts that are all right" or steps <= 5,
                f"{asked}: 18 tokens take {steps} steps, and 1 + 4 are enough: a step gives what is accepted and one",
            )
            _expect_true_names(engine, sequences)
            free = engine.scheduler.manager.free_blocks
            expect(len(set(free)) == len(free) == 64, f"{asked}: {len(set(free))} of 64 blocks are free in the end")
    texts, reasons = _texts(1.2, False)
    sequences, _ = _run(answer, _engine(), _params(1.2), _from_texts(texts))
    expect(
        [s.token_ids for s in sequences] == texts and [s.finish_reason for s in sequences] == reasons,
        "a sequence ends with its end token, even if drafts after it agree",
    )
    texts, _ = _texts(0.0, True)
    engine = _engine(num_blocks=14)
    sequences, _ = _run(answer, engine, _params(ignore_eos=True), _from_texts(texts, 5))
    expect([s.token_ids for s in sequences] == texts, "a pool of 14 blocks: other tokens than Engine.step gives")
    found: list[int] = []

    def note(token_ids, most):
        found.append(most)
        return []

    _run(answer, _engine(), _params(ignore_eos=True), note, most=6)
    expect(max(found, default=0) == 6, "up to `most` drafts are asked for where max_tokens leave room for them")
