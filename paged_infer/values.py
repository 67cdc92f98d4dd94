"""Convert options and prompts to plain Python values, also from numpy and torch.

numpy and torch are recognised by their interface, not imported: a scalar has ``ndim`` 0 and ``item()``, an array or
tensor has ``ndim`` and ``tolist()``. Only int, float, bool and str are kept, so code that follows (pickles, JSON,
comparisons) meets no other type.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as ReadOnlyList
from numbers import Integral, Real
from typing import Any, Protocol


class TokenArray(Protocol):
    """A one-dimensional array or tensor of integers: ``numpy.ndarray``, ``torch.Tensor``."""

    @property
    def ndim(self) -> int: ...

    def __len__(self) -> int: ...

    def tolist(self) -> Any: ...


def plain(value: Any) -> Any:
    """A numpy or torch scalar as int, float, bool or str; any other value unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def as_integer(value: object) -> int | None:
    """``value`` as an int; None if it is not an integer. True and 3.0 are not integers here."""
    value = plain(value)
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def as_number(value: object) -> float | None:
    """``value`` as an int or a finite float; None if it is no number, NaN, infinite, or too large for a float."""
    value = plain(value)
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    if not math.isfinite(number):
        return None
    return int(value) if isinstance(value, Integral) else number


def as_tuple(value: Any) -> tuple[Any, ...] | None:
    """The elements of an iterable, with numpy and torch scalars converted by ``plain``; None if it is not iterable."""
    if not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        return None
    return tuple(map(plain, value.tolist() if hasattr(value, "tolist") else value))


def as_token_ids(prompt: ReadOnlyList[int] | TokenArray) -> list[int]:
    """The token ids of a prompt: a list, or a one-dimensional array or tensor. Does not check that they are integers.

    Raises:
        ValueError: not a list, array or tensor, or not one-dimensional.
    """
    is_array = hasattr(prompt, "ndim") and hasattr(prompt, "tolist")
    is_bytes = isinstance(prompt, (bytes, bytearray, memoryview))
    if is_bytes or not (is_array or isinstance(prompt, ReadOnlyList)):
        raise ValueError(f"a prompt is a str or a list of token ids, not {type(prompt).__name__}")
    if getattr(prompt, "ndim", 1) != 1:
        shape = tuple(getattr(prompt, "shape", ()))
        raise ValueError(
            f"a prompt must have one dimension, not shape {shape}: pass a list of prompts, without padding"
        )
    ids = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    return [t if type(t) is int or (integer := as_integer(t)) is None else integer for t in ids]
