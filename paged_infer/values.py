"""Convert options and prompts to plain Python values, also from numpy and torch.

numpy and torch are recognised by their interface, not imported: a scalar has ``ndim`` 0 and ``item()``, an array or
tensor has ``ndim`` and ``tolist()``. Only int, float, bool and str are kept, so later code (pickles, JSON,
comparisons) sees no other type.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as ReadOnlyList
from numbers import Integral, Real
from typing import Any, ClassVar, Protocol

from paged_infer.suggestions import value_hint


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
    """``value`` as an int or a finite float; None if it is not a number, NaN, infinite, or too large for a float."""
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


def as_token_id(name: str, value: object) -> int:
    """Raises ValueError unless ``value``, an element of ``name``, is an integer from 0 on."""
    token_id = as_integer(value)
    if token_id is None or token_id < 0:
        raise ValueError(f"{name}: token id {value!r} must be an integer >= 0")
    return token_id


class Checked:
    """Checks of the fields of a frozen dataclass. An error names the field, its value and the limit.

    A value that passes is kept as plain Python. ``optional`` lets None pass.
    """

    __slots__ = ()
    _prefix: ClassVar[str] = ""  # before a field's name in an error

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _refuse(self, name: str, reason: str) -> ValueError:
        return ValueError(f"{self._prefix}{name}={getattr(self, name)!r}: {reason}")

    def _check_integer(self, name: str, low: int, high: int | None = None, *, optional: bool = False) -> None:
        if optional and getattr(self, name) is None:
            return
        value = as_integer(getattr(self, name))
        if value is None or value < low or (high is not None and value > high):
            limit = f">= {low}" if high is None else f"within [{low}, {high}]"
            raise self._refuse(name, f"must be an integer {limit}")
        self._keep(name, value)

    def _check_number(
        self, name: str, low: float, high: float | None = None, *, open_low: bool = False, optional: bool = False
    ) -> None:
        if optional and getattr(self, name) is None:
            return
        value = as_number(getattr(self, name))
        too_low = value is None or (value <= low if open_low else value < low)
        if value is None or too_low or (high is not None and value > high):
            above = f"> {low:g}" if open_low else f">= {low:g}"
            limit = above if high is None else f"{above} and <= {high:g}"
            raise self._refuse(name, f"must be a finite number {limit}")
        self._keep(name, value)

    def _check_tuple(self, name: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        elements = () if value is None else as_tuple(value)
        if elements is None:
            raise ValueError(f"{name}={value!r}: must be a sequence")
        self._keep(name, elements)
        return elements

    def _check_token_ids(self, name: str) -> None:
        """Check and deduplicate them."""
        self._keep(name, tuple(dict.fromkeys(as_token_id(name, element) for element in self._check_tuple(name))))

    def _check_flag(self, name: str, *, optional: bool = False) -> None:
        value = plain(getattr(self, name))
        if not isinstance(value, bool) and not (optional and value is None):
            raise self._refuse(name, "must be True, False or None" if optional else "must be True or False")
        self._keep(name, value)

    def _check_choice(self, name: str, known: tuple[str, ...]) -> None:
        value = plain(getattr(self, name))
        if not isinstance(value, str) or value not in known:
            allowed = ", ".join(known) + value_hint(value, known)
            raise ValueError(f"{self._prefix}{name}={value!r}: must be one of {allowed}")
        self._keep(name, value)
