"""Sample the next token of every row on the device: temperature, noise, argmax. Probabilities are never written.

    logits [R, V]     tile 0        tile 1        tile 2                    one program per tile
                    [ ........ ]  [ ........ ]  [ ...... ]
                        |             |             |
                    largest, best p/E and its token id      [R, tiles]      launch 1
                        +-------------+-------------+
                                      |
                               winner of the row            [R]             launch 2: one program per row

Token i of probability p_i gets noise E_i from (seed, sample index, position, i), and argmax(p_i / E_i) is an exact
sample (``noise.py`` explains why). The sum of the softmax cancels in the argmax, so a tile only needs its own largest
logit, to keep exp in range; launch 2 brings the tiles to one scale. The integers of the noise equal those of
``noise.py``, so the sampled tokens are the same, except for a few units in the last place of log and exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paged_infer.kernels.checks import FLOATS, INDICES, layouts, on_one_device, shapes
from paged_infer.kernels.fused.noise import noise, row_keys
from paged_infer.kernels.triton_runtime import launch, tl, triton

SMALLEST, LARGEST = 1e-20, 1e20  # temperatures are clamped to this range, as in sampling/sampler.py
FLOAT32_MAX = torch.finfo(torch.float32).max
TILE = 2048  # tokens


def sample(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    sample_indices: Tensor,
    positions: Tensor,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one token per row from softmax(logits / temperature); at temperature 0 take the most probable.

    Args:
        logits: [R, V] in float32, float16 or bfloat16, with any row stride.
        temperatures: [R] float32; 0 is greedy (of equals, the lowest id), others are clamped to 1e-20..1e20.
        seeds: [R] int64, any.
        sample_indices: [R] int64 or int32, within [0, 2^31).
        positions: [R] int64 or int32, within [0, 2^32): the index that the new token will have in its sequence.
        masks: [R, ceil(V / 32)] int32: bit i % 32 of word i // 32 is 1 if token i may be sampled; the others count as
            logits of -inf. None: all may.

    Returns:
        token_ids [R] int64: -1 where a row cannot be sampled (NaN, only -inf or, at temperature > 0, +inf).
        scores [R] float32, the winner's score: (logit - the row's largest) / temperature - log E, or at temperature 0
        its logit, clamped to float32's largest number; not finite where the token is -1.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check(logits, temperatures, seeds, sample_indices, positions)
    if masks is not None:
        check_masks(logits, masks)
    num_rows, vocab_size = logits.shape
    tile = min(triton.next_power_of_2(vocab_size), TILE)
    num_tiles = triton.cdiv(vocab_size, tile)
    largest, best = logits.new_empty(2, num_rows, num_tiles, dtype=torch.float32).unbind()
    winners = logits.new_empty(num_rows, num_tiles, dtype=torch.int32)
    token_ids = logits.new_empty(num_rows, dtype=torch.int64)
    scores = logits.new_empty(num_rows, dtype=torch.float32)
    launch(
        _race_kernel,
        (num_rows, num_tiles),
        *(logits, temperatures, seeds, sample_indices, positions, masks, largest, best, winners),
        *(logits.stride(0), vocab_size, num_tiles, 0 if masks is None else masks.shape[1]),
        SMALLEST=SMALLEST,
        LARGEST=LARGEST,
        FLOAT32_MAX=FLOAT32_MAX,
        TILE=tile,
        num_warps=max(1, tile // 256),
    )
    launch(
        _final_kernel,
        (num_rows,),
        *(largest, best, winners, temperatures, token_ids, scores, num_tiles),
        SMALLEST=SMALLEST,
        LARGEST=LARGEST,
        TILES=triton.next_power_of_2(num_tiles),
        num_warps=1,
    )
    return token_ids, scores


def sample_reference(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    sample_indices: Tensor,
    positions: Tensor,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``sample`` in plain torch: the race over the whole row at once."""
    if logits.shape[0] == 0:
        return seeds.clone(), temperatures.clone()
    if masks is not None:
        logits = mask_logits_reference(logits, masks)
    keys = row_keys(seeds.tolist(), sample_indices.tolist(), positions.tolist()).to(logits.device)
    ids = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    highest, greedy = logits.float().max(1)
    apart = (logits.float() - highest.unsqueeze(1)) / temperatures.clamp(SMALLEST, LARGEST).unsqueeze(1)  # [R, V]
    best, drawn = (apart.exp() / noise(keys, ids)).max(1)
    scores = torch.where(temperatures == 0, highest.clamp_max(FLOAT32_MAX), best.log())
    tokens = torch.where(temperatures == 0, greedy, drawn)
    return tokens.where(scores.isfinite(), -1), scores


def mask_logits_reference(logits: Tensor, masks: Tensor) -> Tensor:
    """logits [R, V] with -inf at the tokens whose bits in ``masks`` are 0; see ``sample``. A copy."""
    bits = masks.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=masks.device) & 1  # [R, words, 32]
    return logits.masked_fill(bits.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)


def argmax_reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy sampling by itself: the largest logit of each row and its token id, of equals the lowest id.

    [R, V] -> values [R], int64 token ids [R]. NaN counts as the largest: such a row cannot be sampled.
    """
    values, token_ids = logits.max(dim=1)
    return values, token_ids


@triton.jit
def _race_kernel(
    logits, temperatures, seeds, sample_indices, positions, masks, largest, best, winners,
    logits_stride, vocab_size, num_tiles, num_words,
    SMALLEST: tl.constexpr, LARGEST: tl.constexpr, FLOAT32_MAX: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # One program: one tile of one row. Scores are relative to the largest logit of the tile, so finite logits overflow
    # at no temperature: exp((x - largest) / temperature) / E.
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row * logits_stride + token, mask=token < vocab_size, other=float("-inf"))
    x = x.to(tl.float32)
    if masks is not None:
        word = tl.load(masks + row * num_words + token // 32, mask=token < vocab_size, other=0)
        x = tl.where(((word >> (token % 32)) & 1) == 1, x, float("-inf"))
    temperature = tl.load(temperatures + row)
    if temperature == 0.0:
        top = 0.0
        # NaN becomes +inf, which wins, and the row fails.
        score = tl.where(x == x, tl.minimum(x, FLOAT32_MAX), float("inf"))
    else:
        temperature = tl.minimum(tl.maximum(temperature, SMALLEST), LARGEST)
        is_sound = x < float("inf")  # neither NaN nor +inf
        top = tl.max(tl.where(is_sound, x, float("-inf")), 0)
        base = tl.where(top > float("-inf"), top, 0.0)
        keys = _row_keys(tl.load(seeds + row), tl.load(sample_indices + row), tl.load(positions + row))
        time = _exponential(_mix(keys[0], keys[1], token))
        score = tl.where(is_sound, tl.exp(tl.div_rn(x - base, temperature)) / time, float("inf"))
    value, place = tl.max(score, 0, return_indices=True)  # of equals, the first
    at = row * num_tiles + tile
    tl.store(largest + at, top)
    tl.store(best + at, value)
    tl.store(winners + at, tile * TILE + place)


@triton.jit
def _final_kernel(
    largest, best, winners, temperatures, token_ids, scores, num_tiles,
    SMALLEST: tl.constexpr, LARGEST: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # One program: one row. The scores of all tiles are made relative to the largest logit of the row; the best wins.
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    at = row * num_tiles + tile
    top = tl.load(largest + at, mask=tile < num_tiles, other=float("-inf"))
    value = tl.load(best + at, mask=tile < num_tiles, other=float("-inf"))
    of_row = tl.max(top, 0)
    temperature = tl.load(temperatures + row)
    apart = top - tl.where(of_row > float("-inf"), of_row, 0.0)
    if temperature != 0.0:
        apart = tl.div_rn(apart, tl.minimum(tl.maximum(temperature, SMALLEST), LARGEST))
    scale = tl.exp(apart)
    is_finite = tl.abs(value) < float("inf")  # an infinite value is kept: infinity times 0 would be NaN
    value = tl.where(is_finite, tl.where(is_finite, value, 0.0) * scale, value)
    score, place = tl.max(value, 0, return_indices=True)
    if temperature != 0.0:
        score = tl.log(score)
    winner = tl.load(winners + row * num_tiles + place).to(tl.int64)
    tl.store(token_ids + row, tl.where(tl.abs(score) < float("inf"), winner, -1))
    tl.store(scores + row, score)


# -- The integer arithmetic of noise.py, copied literally -------------------------------------------------------------


@triton.jit
def _splitmix64(x):  # uint64, wrapping
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _row_keys(seed, sample_index, position):  # integers -> two int32 within [0, 2^31)
    place = (sample_index.to(tl.uint64) << 32) + position.to(tl.uint64)
    x = _splitmix64(_splitmix64(seed.to(tl.uint64) + 0x9E3779B97F4A7C15) ^ place)
    return (x & 0x7FFFFFFF).to(tl.int32), ((x >> 32) & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _mix(first_key, second_key, token):  # int32 -> int32 within [0, 2^31)
    x = token ^ first_key
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D + second_key) & 0x7FFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x046CA68B) & 0x7FFFFFFF
    return x ^ (x >> 16)


@triton.jit
def _exponential(x):  # int32 within [0, 2^31) -> -log1p(-u), u = (x + 1/2) / 2^31 as noise.py rounds it
    u = (x.to(tl.float32) + 0.5) * 4.6566125955216364e-10  # noise.SCALE
    rest = 1.0 - u
    # The subtraction rounds u. The lost part, exactly u - (1 - rest), is so small that log is linear over it: adding it
    # back is exact to the last place. This is log1p with one log and no division.
    return (u - (1.0 - rest)) - tl.log(rest)


def check_masks(logits: Tensor, masks: Tensor) -> None:
    """Raises ValueError unless ``masks`` fits ``logits`` [R, V]."""
    expected = logits.shape[0], -(-logits.shape[1] // 32)
    if masks.shape != expected or masks.dtype != torch.int32 or not masks.is_contiguous():
        raise ValueError(f"masks must be dense int32 {list(expected)}; got " + layouts(logits=logits, masks=masks))
    if not on_one_device(logits=logits, masks=masks):
        raise ValueError("masks must be on the device of the logits; got " + layouts(logits=logits, masks=masks))


def _check(logits: Tensor, temperatures: Tensor, seeds: Tensor, sample_indices: Tensor, positions: Tensor) -> None:
    rows = {"temperatures": temperatures, "seeds": seeds, "sample_indices": sample_indices, "positions": positions}
    tensors = {"logits": logits, **rows}
    if logits.dim() != 2 or logits.shape[1] == 0 or any(x.shape != logits.shape[:1] for x in rows.values()):
        raise ValueError(
            "sample expects logits [R, V] of at least one token, and the other tensors [R]; got " + shapes(**tensors)
        )
    kinds = logits.dtype in FLOATS and temperatures.dtype == torch.float32 and seeds.dtype == torch.int64
    kinds = kinds and {sample_indices.dtype, positions.dtype} <= {*INDICES}
    dense = logits.stride(1) == 1 and all(x.is_contiguous() for x in rows.values())
    if not (kinds and dense and on_one_device(**tensors)):
        raise ValueError(
            "sample expects one device, float32, float16 or bfloat16 logits with stride 1 in a row, float32 "
            "temperatures, int64 seeds, int64 or int32 sample_indices and positions; got " + layouts(**tensors)
        )
