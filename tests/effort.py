"""How much the slow property tests try: EFFORT times as much as in ``make test``; ``make nightly`` sets it to 5."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

EFFORT = int(os.environ.get("EFFORT", "1"))


def each_with_some(names: Iterable[str], settings: Mapping[str, Any], *, whole: str) -> list[Any]:
    """Pairs for ``parametrize``: each name with a third of the settings, the next name with the next third.

    ``whole``, and with an EFFORT above 1 every name, meets all of them.
    """
    return [
        pytest.param(name, setting, id=f"{name}-{key}")
        for i, name in enumerate(names)
        for j, (key, setting) in enumerate(settings.items())
        if EFFORT > 1 or name == whole or (i + j) % 3 == 0
    ]
