"""ConfigReader: each key of a config.json, checked for its type, and a record of the keys that were not read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_REQUIRED: Any = object()
MAX_SIZE = 2**31 - 1


class ConfigReader:
    """Typed reads of one JSON object. Errors are ValueErrors that name the key and the value.

    Args:
        raw: the object.
        name: its name in errors if it is not the whole file, for example ``rope_scaling``.
    """

    def __init__(self, raw: Mapping[str, Any], name: str = "") -> None:
        self._raw, self._read = dict(raw), set[str]()
        self.name = f"{name} " if name else ""

    def value(self, key: str, default: Any = None) -> Any:
        """The value, unchecked; ``default`` if the key is absent."""
        self._read.add(key)
        if key not in self._raw and default is _REQUIRED:
            raise ValueError(f"{self.name}lacks {key!r}")
        return self._raw.get(key, default)

    def size(self, key: str, default: int = _REQUIRED, *, least: int = 1, most: int = MAX_SIZE) -> int:
        """An integer from ``least`` to ``most``."""
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{self.name}{key}={value!r}: must be an integer from {least} to {most}")
        return value

    def size_or_none(self, key: str, default: int | None = None, *, most: int = MAX_SIZE) -> int | None:
        """As ``size``, but null is allowed and gives None."""
        return None if self.value(key, default) is None else self.size(key, default, most=most)  # type: ignore[arg-type]

    def flag(self, key: str, default: bool) -> bool:
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.name}{key}={value!r}: must be true or false")
        return value

    def number(self, key: str, default: float = _REQUIRED) -> float:
        """A number > 0 within float32's range."""
        value = self.value(key, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < 3e38:
            raise ValueError(f"{self.name}{key}={value!r}: must be a number > 0")
        return float(value)

    def number_or_none(self, key: str, default: float | None = None) -> float | None:
        """As ``number``, but null is allowed and gives None."""
        return None if self.value(key, default) is None else self.number(key, default)  # type: ignore[arg-type]

    def choice(self, key: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        """One of ``allowed``, of its type: neither true nor 1.0 is 1."""
        value = self.value(key, default)
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise ValueError(f"{self.name}{key}={value!r}: must be one of {', '.join(map(str, allowed))}")
        return value

    def only(self, **expected: Any) -> None:
        """Refuse any other value of these keys. Null and a missing key are accepted."""
        for key, allowed in expected.items():
            value = self.value(key)
            if value is not None and value != allowed:
                raise ValueError(f"{self.name}{key}={value!r} is not supported; only {allowed!r} is")

    def unread(self) -> list[str]:
        """Keys that have not been read yet."""
        return sorted(self._raw.keys() - self._read)

    def refuse_unread(self) -> None:
        """Refuse keys that have not been read; null ones are accepted."""
        if left := [key for key in self.unread() if self.value(key) is not None]:
            raise ValueError(f"{self.name}{left[0]}={self.value(left[0])!r} is not supported")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a checkpoint's JSON file; a ValueError that names the file if there is none."""
    if not path.is_file():
        raise ValueError(f"{path.parent}: has no {path.name}, so it is not a checkpoint in Hugging Face format")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: contains a JSON {type(value).__name__}, not an object")
    return value
