"""Checkers of chapter 04, the KV cache."""

from __future__ import annotations

import torch
from my_engine import Decoder, generate_cached

from checks import checker, device, expect, expect_tensor
from paged_infer import storyteller


def _expect_pair(found, asked: str, parts: str) -> tuple:
    expect(found is not None, f"{asked} gives None: is the `return` missing?")
    expect(isinstance(found, tuple) and len(found) == 2, f"{asked} has to give two things, {parts}")
    return found


@checker
def rows_computed(answer):
    """Rows through a token-wise operation: [(prompt, output), ...] -> (without a cache, with one)."""
    naive, cached = _expect_pair(answer([(3, 3)]), "rows_computed of [(3, 3)]", "rows without and with a cache")
    expect(cached != 6, "with a cache, (3, 3) computes 5 rows and not 6: the last token is never fed back")
    expect(naive != 15, "the naive steps have 3, 4 and 5 tokens, not 4, 5 and 6: the first sees the prompt alone")
    expect(naive != 18, "not every naive step has all 6 tokens: they have 3, 4 and 5")
    expect(naive == 12, f"without a cache, (3, 3) computes 3 + 4 + 5 = 12 rows, and yours gives {naive}")
    expect(cached == 5, f"with a cache, (3, 3) computes 3 + 1 + 1 = 5 rows, and yours gives {cached}")
    expect(
        answer([(7, 1)]) == (7, 7),
        f"a single output costs the prompt either way, 7 rows, and yours gives {answer([(7, 1)])}",
    )
    several = [(3, 3), (10, 4), (1, 6)]
    right = (sum(p + i for p, n in several for i in range(n)), sum(p + n - 1 for p, n in several))
    found = answer(list(several))
    expect(found != answer([(14, 13)]), "requests are independent: their lengths cannot be added up first")
    expect(found == right, f"{several} give {found} instead of {right}")


@checker
def attend_chunk(answer):
    """Causal attention of the last T of S tokens, one head: q [T, D], keys and values [S, D] -> [T, D]."""
    rng = torch.Generator().manual_seed(3)
    q, keys, values = (torch.randn(n, 4, generator=rng) for n in (3, 7, 7))

    def attention(seen, scale=0.5):
        weights = (q @ keys.T * scale).masked_fill(~seen, -torch.inf).softmax(dim=-1)
        return weights @ values

    found = answer(q.clone(), keys.clone(), values.clone())
    expect_tensor(found, q, "attend_chunk of q [3, 4] and keys [7, 4]")

    def is_near(wrong):
        return torch.allclose(found, wrong, atol=1e-4)

    all_seen, last = torch.ones(3, 7).bool(), torch.ones(3, 7).tril(diagonal=4).bool()
    expect(
        not is_near(attention(torch.ones(3, 7).tril().bool())),
        "the triangle lies at the top left: the first query sees one key, and it stands at place 4, so it sees five",
    )
    expect(not is_near(attention(all_seen)), "there is no mask: the first query sees keys of tokens after it")
    expect(not is_near(attention(last, scale=1.0)), "the scores are not divided by the root of D")
    expect(
        not is_near(attention(torch.ones(3, 7).tril(diagonal=3).bool())), "a token does not see itself: one key too few"
    )
    expect(not is_near(attention(torch.ones(3, 7).tril(diagonal=5).bool())), "each query sees one key after its own")
    right = attention(last)
    for row in range(3):
        expect(torch.allclose(found[row], right[row], atol=1e-4), f"query {row} of 3 should see keys 0 to {4 + row}")
    one = answer(q[:1].clone(), keys.clone(), values.clone())
    expect(torch.allclose(one, attention(all_seen)[:1], atol=1e-4), "a single query, a decode step, sees all 7 keys")
    square = answer(q.clone(), keys[:3].clone(), values[:3].clone())
    first = square[0] if isinstance(square, torch.Tensor) else None
    expect(
        first is not None and torch.allclose(first, values[0], atol=1e-4),
        "with T = S, a whole prompt, the first token sees itself alone and gets its own value",
    )


@checker
def left_padding(answer):
    """Positions [B, W] and mask [B, W, W] of a left-padded batch."""
    lengths = [2, 5, 4]
    found = _expect_pair(answer(list(lengths)), "left_padding of [2, 5, 4]", "positions and a mask")
    pads = torch.tensor([5 - n for n in lengths])
    columns = torch.arange(5)
    positions = (columns - pads[:, None]).clamp(min=0)
    causal = columns <= columns[:, None]
    real = columns >= pads[:, None]  # [B, W]
    own = torch.eye(5).bool()
    mask = (causal & real[:, None]) | own
    expect_tensor(found[0], positions, "the positions of left_padding of [2, 5, 4]")
    expect_tensor(found[1], mask, "the mask of left_padding of [2, 5, 4]")
    expect(not found[0].equal(columns.expand(3, 5)), "positions count columns: row 0 begins in column 3, at position 0")
    expect(bool((found[0] >= 0).all()), "positions of padding are negative, and a table of positions has no such row")
    right_pad = torch.stack([torch.where(columns < n, columns, 0) for n in lengths])
    expect(not found[0].equal(right_pad), "these are positions of rows padded on the right")
    expect(
        found[0].equal(positions),
        f"row 0, of 2 tokens, has positions {found[0][0].tolist()} instead of [0, 0, 0, 0, 1]",
    )
    expect(not (found[1] & ~causal).any(), "a query sees a key after its own: the mask is not causal")
    expect(bool(found[1].any(dim=-1).all()), "a padding query sees nothing, and a softmax over nothing is NaN")
    hidden = found[1] & real[:, :, None] & ~real[:, None]
    expect(not hidden.any(), "a real query sees padding: row 0's keys 0 to 2 are to be hidden from it")
    expect(not (found[1] & ~real[:, :, None] & ~own).any(), "a padding query sees more than itself")
    expect(found[1].equal(mask), "a real query does not see all real tokens up to its own")


class Recorded(Decoder):
    """The storyteller, which keeps the position of each token of each step and the caches that it is given."""

    def __init__(self) -> None:
        super().__init__(storyteller.PATH, device)
        self.steps: list[list[int]] = []
        self.caches: list[object] = []

    def __call__(self, token_ids, positions, cache):
        places = torch.as_tensor(positions).tolist()
        expect(len(token_ids) == len(places), f"a step brings {len(token_ids)} tokens, and positions for {len(places)}")
        expect(len(places) > 0, "a step brings no token at all")
        self.steps.append(places)
        self.caches.append(cache)
        return super().__call__(token_ids, positions, cache)


@checker
def generate_in_chunks(answer):
    """Greedy tokens of one text by my_engine's decoder, whose prompt comes in chunks."""
    decoder = Recorded()
    prompt = decoder.tokenizer.encode("A story about Mia and a red key. Mia found").ids
    right = generate_cached(decoder, [prompt], max_tokens=9, ignore_eos=True)[0].output_token_ids
    for chunk in (4, 1, 64):
        decoder.steps, decoder.caches = [], []
        asked = f"a prompt of {len(prompt)} tokens in chunks of {chunk}"
        found = answer(decoder, list(prompt), 9, chunk)
        expect(found is not None, "generate_in_chunks gives None: is the `return` missing?")
        found, widest = list(found), max(map(len, decoder.steps), default=0)
        expect(bool(decoder.steps), "the decoder was not called")
        expect(widest <= chunk, f"{asked}: a step brings {widest} tokens")
        placed = [place for step in decoder.steps for place in step]
        repeated = len(placed) - len(set(placed))
        expect(repeated == 0, f"{asked}: {repeated} positions come twice; each token is computed once")
        expect(placed == sorted(placed), f"{asked}: positions do not go up from step to step: {decoder.steps}")
        expect(placed[0] == 0, f"{asked}: the first position is {placed[0]} instead of 0")
        expect(len(set(map(id, decoder.caches))) == 1, f"{asked}: every step has another cache, which is empty")
        expect(found != prompt + right, "the prompt is returned as well; only the 9 new tokens are asked for")
        expect(len(found) == 9, f"{asked}: {len(found)} tokens instead of 9; only a step that ends the text gives one")
        last = len(prompt) + 8
        expect(len(placed) == last, f"{asked}: {len(placed)} tokens were computed instead of {last}")
        causes = "is `cache.start` set every time, and does only a step that reaches the text's end give a token?"
        expect(found == right, f"{asked}: the tokens are {found} instead of {right}; {causes}")
        most = -(-len(prompt) // chunk) + 8
        expect(
            len(decoder.steps) <= most, f"{asked}: {len(decoder.steps)} steps; {most} are enough, as chunks can be full"
        )
