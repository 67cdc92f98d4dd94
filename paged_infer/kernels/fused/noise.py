"""Random numbers without a generator: the noise of each token is a function of its position.

**Why a race.** To draw token i with probability p_i, let every token run a race: its finishing time is
``E_i / p_i``, where the E_i are independent exponential variables of mean 1, and the first to arrive is
drawn. The minimum of exponentials of rates p_i belongs to i with probability ``p_i / sum(p)``, so
``argmax(p_i / E_i)`` is an exact draw, and p need not be normalised (Efraimidis & Spirakis 2006, "Weighted
random sampling with a reservoir"). Taking logarithms gives ``argmax(log p_i - log E_i)``, and ``-log E_i``
has the Gumbel distribution: the same race is known as the Gumbel-max trick (Maddison, Tarlow & Minka 2014,
"A* sampling"). A token that is masked has p = 0 and cannot win. No sum over the vocabulary is needed, and
dropping tokens never moves the noise of the others.

**Why counters.** A generator has a state: the numbers depend on how many were drawn before, so on the batch,
on a preemption, on speculation. Here the noise is a function of (seed, sample index, position, token id)
alone, in the way of counter-based generators (Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as
easy as 1, 2, 3"): a counter, scrambled until nothing of its order is left. Any part can be computed anywhere,
in any order, again.

Two steps, because the vocabulary is long and the rows are few::

    (seed, sample, position) --splitmix64, once a row--> two 31-bit keys
    (keys, token id) --31-bit mix, once a token--> x in [0, 2^31) --> u = (x + 1/2) / 2^31 --> E = -log1p(-u)

The 31-bit mix uses int32 arithmetic only (xor, shift, add, wrapping multiply, and), so a GPU kernel can copy
it literally. Its state stays non-negative, which makes the arithmetic right shift a logical one. It is a
bijection of [0, 2^31) for any keys: no two tokens of a row share a value.
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MASK_31 = 0x7FFFFFFF

# "lowbias32" (Wellons, hash-prospector: shifts 16, 15, 16; multipliers 0x7feb352d, 0x846ca68b) modulo 2^31,
# the second key added after the first multiplication. Measured: one flipped bit of a token id or of the first
# key flips each output bit with probability 1/2 to within the resolution of 2^19 trials; over the first 2^16
# token ids the chi-square of high, middle and low bits, 64 rows each, is that of chance. (The author's later
# multipliers, 0x21f0aaad and 0xd35a2d97, are not as good modulo 2^31: the low bits fail that test.)
SHIFT_1, SHIFT_2, SHIFT_3 = 16, 15, 16
MULTIPLIER_1, MULTIPLIER_2 = 0x7FEB352D, 0x046CA68B

# One below 2^-31 in float32. Rounding x to float32 can give 2^31, and u = 1 would make E infinite: 2^31 times
# this is the float32 just below 1. The relative change of u, 6e-8, is a rounding error.
SCALE = (1.0 - 2.0**-24) * 2.0**-31

# splitmix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators").
GAMMA, MIX_1, MIX_2 = (np.uint64(constant) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def row_keys(seeds: ReadOnlyList[int], sample_indices: ReadOnlyList[int], positions: ReadOnlyList[int]) -> Tensor:
    """The keys of each row: its seed, sample index and position, hashed.

    Args:
        seeds: R integers of 64 bits, signed.
        sample_indices: R integers within [0, 2^31).
        positions: R integers within [0, 2^32).

    Returns:
        int32 [R, 2] on the host, each within [0, 2^31).
    """
    seed = np.array(seeds, dtype=np.int64).view(np.uint64)  # [R]
    sample, position = np.array(sample_indices, dtype=np.uint64), np.array(positions, dtype=np.uint64)
    hashes = _splitmix64(_splitmix64(seed + GAMMA) ^ ((sample << np.uint64(32)) + position))
    keys = np.stack((hashes, hashes >> np.uint64(32)), axis=1) & np.uint64(MASK_31)
    return torch.from_numpy(keys.astype(np.int32))


def request_seed(engine_seed: int, number: int) -> int:
    """The seed of the engine's ``number``-th request without a seed of its own: 64 bits, signed."""
    seed = np.array([engine_seed], dtype=np.int64).view(np.uint64)
    hashed = _splitmix64(_splitmix64(seed + GAMMA) ^ np.array([number], dtype=np.uint64))
    return int(hashed.view(np.int64)[0])


def mix(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Hash token ids with the keys of their rows.

    Args:
        keys: int32 [R, 2], from ``row_keys``.
        token_ids: int32 [V], the same for every row, or [R, K].

    Returns:
        int32 [R, V] or [R, K], uniform over [0, 2^31).
    """
    first, second = keys[:, :1], keys[:, 1:]  # [R, 1] each
    x = token_ids ^ first
    shifted = x >> SHIFT_1
    x ^= shifted
    torch.add(second, x, alpha=MULTIPLIER_1, out=x)  # x * MULTIPLIER_1 + second, wrapping
    x &= MASK_31
    torch.bitwise_right_shift(x, SHIFT_2, out=shifted)
    x ^= shifted
    x *= MULTIPLIER_2
    x &= MASK_31
    torch.bitwise_right_shift(x, SHIFT_3, out=shifted)
    x ^= shifted
    return x


def noise(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Exponential noise of mean 1; a token's is the same among few tokens as in the whole vocabulary.

    The winner of a race has a small E, so resolution matters there: u keeps full relative precision down to its
    smallest value, 2^-32, and log1p keeps it in E. The integers are the same on every device; E differs as log1p
    does, by a unit in the last place.

    Args:
        keys: int32 [R, 2], from ``row_keys``.
        token_ids: int32 [V], the same for every row, or [R, K].

    Returns:
        float32 [R, V] or [R, K], within [2^-32, 16.7].
    """
    uniform = mix(keys, token_ids).to(torch.float32)
    return uniform.add_(0.5).mul_(-SCALE).log1p_().neg_()


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * MIX_1
    x = (x ^ (x >> np.uint64(27))) * MIX_2
    return x ^ (x >> np.uint64(31))
