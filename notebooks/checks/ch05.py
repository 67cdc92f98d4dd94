"""Checkers of chapter 05, prefill, decode and the roofline."""

from __future__ import annotations

import math

from my_engine import Decoder

from checks import checker, device, expect
from paged_infer import storyteller


def _number(found, asked: str) -> float:
    expect(found is not None, f"{asked} gives None: is the `return` missing?")
    return float(found)


class Clocked(Decoder):
    """The storyteller under a clock that its steps move on, by 1 s and by 0.1 s for each token."""

    def __init__(self) -> None:
        super().__init__(storyteller.PATH, device)
        self.now_s = 100.0

    def __call__(self, token_ids, positions, cache):
        self.now_s += 1 + len(token_ids) / 10
        return super().__call__(token_ids, positions, cache)


@checker
def serve_timed(answer):
    """TTFT and TPOT of each prompt, and the throughput of the run, by my_engine's decoder."""
    decoder = Clocked()
    prompts = [decoder.tokenizer.encode(text).ids for text in ("Once upon a time", "One day, Tom and his dog went to")]
    found = answer(decoder, [list(prompt) for prompt in prompts], 4, lambda: decoder.now_s)
    expect(found is not None, "serve_timed gives None: is the `return` missing?")
    expect(isinstance(found, tuple) and len(found) == 2, "serve_timed has to give two things, the clocks and a rate")
    clocks, rate = [tuple(map(float, pair)) for pair in found[0]], float(found[1])
    expect(len(clocks) == 2, f"two prompts have two pairs of TTFT and TPOT, and {len(clocks)} came")
    first_s, second_s = (1 + len(prompt) / 10 for prompt in prompts)  # of a prefill; a decode step takes 1.1 s
    run_s = first_s + second_s + 2 * 3 * 1.1
    lasted = decoder.now_s - 100
    expect(lasted < run_s + 0.5, f"the steps took {lasted:.1f} s; with a cache, and none after the last token, {run_s}")

    def is_near(value, other):
        return math.isclose(value, other, rel_tol=1e-6)

    (ttft, tpot), (late, _) = clocks
    expect(not is_near(ttft, 100 + first_s), "the clock shows 100 s when the prompts arrive: subtract the arrival")
    expect(is_near(ttft, first_s), f"the first prompt's TTFT is its prefill, {first_s} s, and yours gives {ttft:.4f}")
    expect(not is_near(tpot, 3.3 / 4), "TPOT is divided by the tokens: 4 tokens have 3 gaps")
    expect(is_near(tpot, 1.1), f"the first prompt's TPOT is a decode step, 1.1 s, and yours gives {tpot:.4f}")
    waited = first_s + 3.3 + second_s
    expect(not is_near(late, second_s), "the second prompt arrived with the first: its wait belongs to its TTFT")
    expect(is_near(late, waited), f"the second prompt's TTFT is {waited} s with its wait, and yours gives {late:.4f}")
    expect(is_near(clocks[1][1], 1.1), f"the second prompt's TPOT is 1.1 s, and yours gives {clocks[1][1]:.4f}")
    expect(not is_near(rate, 4 / run_s), "throughput counts the tokens of all requests, and this counts one's")
    expect(not is_near(rate, sum(map(len, prompts), 8) / run_s), "throughput counts output tokens, without the prompts")
    expect(is_near(rate, 8 / run_s), f"8 tokens in {run_s} s are {8 / run_s:.4f} a second, and yours gives {rate:.4f}")


@checker
def step_floor_s(answer):
    """Roofline of a mixed step: seconds."""
    pieces, parameters, weight_bytes, kv, bandwidth = [(100, 1), (300, 1), (0, 8)], 1000, 2000, 5, 100.0

    def ask(peak):
        found = answer(list(pieces), parameters, weight_bytes, kv, bandwidth, peak)
        return _number(found, "step_floor_s of three pieces")

    reading = (2000 + 5 * 400) / 100.0
    bound = ask(1e9)  # computing costs nothing: bandwidth-bound

    def is_near(value, found=bound):
        return math.isclose(found, value, rel_tol=1e-6)

    expect(not is_near((3 * 2000 + 5 * 400) / 100), "each text reads the weights for itself: a step reads them once")
    expect(not is_near(2000 / 100), "the caches are not read: the pieces have 400 tokens before them")
    expect(is_near(reading), f"reading 2,000 + 5 * 400 bytes at 100 a second is 40, and yours gives {bound:.4f}")
    balanced, compute = ask(1000.0), ask(100.0)
    expect(
        not is_near(60.0, balanced),
        "reading and computing are added up; they go on at the same time, and the longer one counts",
    )
    expect(is_near(40.0, balanced), f"40 s of reading and 20 s of computing take 40, and yours gives {balanced:.4f}")
    expect(not is_near(100.0, compute), "a multiply-add is two operations: 2 * parameters for each token")
    expect(not is_near(60.0, compute), "operations are counted for each text; 8 tokens of a piece are 8 times one")
    expect(not is_near(40.0, compute), "with a slow multiplier the step is compute-bound, and yours gives 40 still")
    expect(is_near(200.0, compute), f"2 * 1,000 * 10 operations at 100 a second take 200; yours gives {compute:.4f}")


@checker
def largest_batch(answer):
    """The most texts that fit memory and TPOT, as an int."""

    def ask(memory, tpot, weights=1000):
        found = answer(memory, weights, 2, 50, 100.0, tpot)  # a text's cache: 100 bytes
        return _number(found, "largest_batch")

    by_memory = ask(1550, 1e6)
    expect(by_memory != 15, "the weights need memory, too: 1,550 bytes less 1,000 leave room for 5 texts of 100")
    expect(by_memory != 6, "5.5 texts fit, and half a text cannot be served: round down")
    expect(by_memory != 999_990, "memory_bytes is ignored: the caches must fit in memory")
    expect(by_memory == int(by_memory), f"{by_memory} is not a whole number of texts")
    expect(by_memory == 5, f"1,550 bytes hold weights of 1,000 and 5 texts of 100, and yours gives {by_memory:g}")
    by_time = ask(10_000, 13.0)
    expect(by_time != 90, "tpot_s is ignored: reading 10,000 bytes at 100 a second takes 100 s, not 13")
    expect(by_time != 13, "the weights are read in every step, too: of 1,300 bytes in 13 s, 1,000 are theirs")
    expect(by_time == 3, f"in 13 s, 1,300 bytes are read: 1,000 of weights and 3 texts; yours gives {by_time:g}")
    for memory, tpot in ((900, 1e6), (10_000, 5.0)):
        found = ask(memory, tpot)
        expect(found >= 0, f"{found:g} texts: where not even the weights fit, the answer is 0")
        expect(found == 0, f"memory {memory} and TPOT {tpot:g} s have room for no text, and yours gives {found:g}")


@checker
def honest_tpot(answer):
    """The mean of the visible gaps, from a TPOT that was divided by all of them."""
    token_s = [1.0, 2.0, 4.0, 7.0, 11.0]
    reported = (11.0 - 4.0) / 4  # two hidden
    found = _number(answer(reported, 5, 2), "honest_tpot of 5 tokens, 2 hidden")

    def is_near(value):
        return math.isclose(found, value, rel_tol=1e-6)

    expect(not is_near(reported), "this is the reported one: it was divided by 4 gaps, of which 2 were seen")
    expect(not is_near(reported * 5 / 3), "5 tokens have 4 gaps and 3 visible tokens have 2: gaps, not tokens")
    expect(not is_near(reported * 2 / 4), "the wrong way round: fewer gaps in the same time are longer ones")
    expect(not is_near((11.0 - 1.0) / 4), "the hidden gaps cannot be known from this; only those that were seen")
    right = (token_s[-1] - token_s[2]) / 2
    expect(is_near(right), f"7 s and 2 gaps are 3.5 s each, and yours gives {found:.4f}")
    same = _number(answer(0.25, 9, 0), "honest_tpot with nothing hidden")
    expect(math.isclose(same, 0.25), f"nothing hidden changes nothing: 0.25, and yours gives {same:.4f}")
    try:
        last = answer(0.0, 5, 4)
    except ZeroDivisionError:
        last = "a division by zero"
    expect(last is None, f"with 4 of 5 tokens hidden one is visible and there is no gap: None, and this gives {last}")
