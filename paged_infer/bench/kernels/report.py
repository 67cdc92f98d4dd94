"""What ``bench kernels`` found: who ran how fast on what, who did not and why, and what was wanted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paged_infer.bench.kernels.checks import CheckResult
from paged_infer.bench.roofline import Roofline

OURS = (
    "flash_attention", "paged_attention", "store_kv", "add_rms_norm", "silu_mul", "qk_norm_rope", "sample",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One kernel in one race. Without ``seconds`` it did not run, and ``note`` says why."""

    name: str
    seconds: float | None
    note: str = ""  # how it was timed


@dataclass(frozen=True, slots=True)
class Measurement:
    """A race: the same work, by several kernels in turn. ``work`` is floating-point operations, or bytes moved."""

    group: str  # "prefill", "decode" or "fused"
    title: str
    sizes: dict[str, int]
    work: float
    entries: list[Entry]
    was_run: bool = True  # False: left out, for want of memory or time

    def seconds(self, name: str) -> float | None:
        return next((entry.seconds for entry in self.entries if entry.name == name), None)

    def rate(self, name: str) -> float | None:
        """Operations, or bytes, per second."""
        seconds = self.seconds(name)
        return None if seconds is None else self.work / seconds

    def ratio(self, name: str, other: str) -> float | None:
        """How many times as fast as ``other`` it is."""
        ours, theirs = self.seconds(name), self.seconds(other)
        return None if ours is None or theirs is None else theirs / ours


@dataclass(frozen=True, slots=True)
class LaunchCount:
    """What one step's stores cost: ATen operations, and launches on the device (None: not counted here)."""

    name: str
    aten_operations: int | None
    launches: int | None


@dataclass(frozen=True, slots=True)
class Reach:
    """A target, and what was measured: the worst over ``over``."""

    what: str
    wanted: float
    measured: float | None


@dataclass(slots=True)
class KernelReport:
    """Grows while the bench runs."""

    device: str  # "cuda", or "cpu": there kernels are interpreted, and not timed
    machine: dict[str, Any]
    checks: list[CheckResult] = field(default_factory=list)
    roofline: Roofline | None = None
    launches: list[LaunchCount] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """As JSON, so that every picture can be drawn again from its numbers."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = asdict(self) | {"reaches": [asdict(reach) for reach in self.reaches()]}
        path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> KernelReport:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            device=fields["device"],
            machine=fields["machine"],
            checks=[CheckResult(**check) for check in fields["checks"]],
            roofline=None if fields["roofline"] is None else Roofline(**fields["roofline"]),
            launches=[LaunchCount(**count) for count in fields["launches"]],
            measurements=[
                Measurement(**{**one, "entries": [Entry(**entry) for entry in one["entries"]]})
                for one in fields["measurements"]
            ],
        )

    def group(self, name: str, **sizes: int) -> list[Measurement]:
        """Measurements of a group, of those sizes."""
        return [m for m in self.measurements if m.group == name and sizes.items() <= m.sizes.items()]

    def absences(self) -> list[tuple[str, str]]:
        """Who did not run, and why, each reason once with the races that it holds for."""
        races: dict[tuple[str, str], list[str]] = {}
        for measurement in self.measurements:
            for entry in measurement.entries:
                if entry.seconds is None:
                    races.setdefault((entry.name, entry.note), []).append(measurement.title)
        return [
            (name, note + (f" ({titles[0]})" if len(titles) == 1 else f" ({len(titles)} races)"))
            for (name, note), titles in races.items()
        ]

    def failures(self) -> list[str]:
        """Races that were run, and that one of our own kernels did not finish."""
        return [
            f"{measurement.title}: {entry.name}: {entry.note}"
            for measurement in self.measurements
            if measurement.was_run
            for entry in measurement.entries
            if entry.seconds is None and entry.name in OURS
        ]

    def share_of_copy(self, measurement: Measurement, name: str) -> float | None:
        """Bytes per second over those of a copy on the same device."""
        rate = measurement.rate(name)
        return None if rate is None or self.roofline is None else rate / self.roofline.copy_bytes_per_s

    def reaches(self) -> list[Reach]:
        """The targets of the kernels, and what was measured."""
        long = [m for m in self.group("prefill", head_dim=128) if m.sizes["length"] >= 4096]
        usual, alone = (self.group("decode", batch=b, context=n) for b, n in ((32, 4096), (1, 32_768)))
        flash, paged = "flash_attention", "paged_attention"
        return [
            Reach(
                "prefill 4k..16k: flash_attention / SDPA flash", 1.2, _least(m.ratio(flash, "SDPA flash") for m in long)
            ),
            Reach(
                "prefill 4k..16k: flash_attention / SDPA cuDNN",
                0.75,
                _least(m.ratio(flash, "SDPA cuDNN") for m in long),
            ),
            Reach("prefill 4k..16k: paged / dense flash_attention", 0.8, _least(m.ratio(paged, flash) for m in long)),
            Reach(
                "decode, batch 32, context 4k: share of copy", 0.85, _least(self.share_of_copy(m, paged) for m in usual)
            ),
            Reach(
                "decode, batch 1, context 32k: share of copy", 0.7, _least(self.share_of_copy(m, paged) for m in alone)
            ),
            Reach(
                "decode: paged_attention / flashinfer",
                1.0,
                _least(m.ratio(paged, "flashinfer") for m in self.group("decode")),
            ),
        ]


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)
