"""Reports are dataclasses of plain data, kept as JSON, so that every picture can be drawn again from its numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from itertools import repeat
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Self, get_args, get_origin, get_type_hints

from paged_infer.files import replacing

if TYPE_CHECKING:
    from paged_infer.viz.style import Picture


class JsonReport:
    """Base of a dataclass of numbers, texts, lists, dicts and further dataclasses."""

    __slots__ = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]

    def save(self, path: Path) -> None:
        """Write the report, making its folder if need be. At any moment the file is this report or the previous one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """The report that ``save`` wrote."""
        report: Self = from_json(cls, json.loads(path.read_text(encoding="utf-8")))
        return report


def save_report(report: JsonReport, numbers: Path, draw: Callable[[Any], Picture] | None = None) -> None:
    """Save the report as ``numbers``, a .json, and if ``draw`` is given, its picture as a .png of the same name.

    Prints the machine, if the report has one, and the files.
    """
    if machine := getattr(report, "machine", None):
        from paged_infer.execution.machine import machine_line

        print(f"on {machine_line(machine)}")
    report.save(numbers)
    if draw is None:
        print(f"numbers: {numbers}")
    else:
        draw(report).save(numbers.with_suffix(".png"))
        print(f"picture: {numbers.with_suffix('.png')}   numbers: {numbers}")


def from_json(kind: Any, stored: Any) -> Any:
    """``stored`` as a value of type ``kind``. Keys without a field, which ``as_json`` may add, are passed over."""
    origin, inner = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: from_json(hints[name], value) for name, value in stored.items() if name in hints})
    if origin is UnionType:  # X | None
        return None if stored is None else from_json(inner[0], stored)
    if origin is list:
        return [from_json(inner[0], one) for one in stored]
    if origin is tuple:
        kinds = repeat(inner[0]) if inner[-1] is Ellipsis else inner
        return tuple(map(from_json, kinds, stored))
    if origin is dict:
        return {inner[0](key): from_json(inner[1], value) for key, value in stored.items()}
    return stored
