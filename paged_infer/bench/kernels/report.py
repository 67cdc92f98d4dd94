"""The results of ``bench kernels``: which kernel ran how fast, which did not run and why, and the targets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from paged_infer.bench.kernels.checks import CheckResult
from paged_infer.bench.kernels.fused import FUSED
from paged_infer.bench.report import JsonReport
from paged_infer.bench.roofline import Roofline

OURS = ("flash_attention", "paged_attention", "paged_attention_8_bits", "quantised_linear", *FUSED)
LEFT_OUT = "left out: "  # begins the note of an entry for which there was no time
TARGET_DECODES = ((32, 4096), (1, 32_768))  # (batch, context)
LONG_PREFILL = 4096  # tokens: prefills have targets from here on


@dataclass(frozen=True, slots=True)
class Entry:
    """One kernel in one comparison. Without ``seconds`` it did not run, and ``note`` has the reason."""

    name: str
    seconds: float | None
    note: str = ""  # how it was timed


@dataclass(frozen=True, slots=True)
class Measurement:
    """A comparison: the same work, by several kernels in turn. ``work``: floating-point operations, or bytes moved."""

    group: str  # "prefill", "decode", "decode_8_bits", "fused" or "linear"
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
    """What one step's stores cost: launches of our kernel, or ATen operations of torch (None: not counted)."""

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
class KernelReport(JsonReport):
    """Grows while the bench runs."""

    device: str  # "cuda", or "cpu": there kernels are interpreted, and not timed
    machine: dict[str, Any]
    checks: list[CheckResult] = field(default_factory=list)
    roofline: Roofline | None = None
    launches: list[LaunchCount] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """With what follows from the measurements, for a reader without this code."""
        return asdict(self) | {"reaches": [asdict(reach) for reach in self.reaches()]}

    def record(self, measurement: Measurement) -> bool:
        """Add it, or replace the last one if that is of the same comparison; returns whether it was added."""
        is_new = not self.measurements or self.measurements[-1].title != measurement.title
        self.measurements[len(self.measurements) - (not is_new) :] = [measurement]
        return is_new

    def group(self, name: str, **sizes: int) -> list[Measurement]:
        """Measurements of a group, of those sizes."""
        return [m for m in self.measurements if m.group == name and sizes.items() <= m.sizes.items()]

    def absences(self) -> list[tuple[str, str]]:
        """Which kernels did not run, and why, each reason once."""
        comparisons: dict[tuple[str, str], list[str]] = {}
        for measurement in self.measurements:
            for entry in measurement.entries:
                if entry.seconds is None:
                    comparisons.setdefault((entry.name, entry.note), []).append(measurement.title)
        return [
            (name, note + (f" ({titles[0]})" if len(titles) == 1 else f" ({len(titles)} comparisons)"))
            for (name, note), titles in comparisons.items()
        ]

    def failures(self) -> list[str]:
        """Our own kernels that failed in a comparison that was run."""
        return [
            f"{measurement.title}: {entry.name}: {entry.note}"
            for measurement in self.measurements
            if measurement.was_run
            for entry in measurement.entries
            if entry.seconds is None and entry.name in OURS and not entry.note.startswith(LEFT_OUT)
        ]

    def share_of_copy(self, measurement: Measurement, name: str) -> float | None:
        """Bytes per second over those of a copy on the same device."""
        rate = measurement.rate(name)
        return None if rate is None or self.roofline is None else rate / self.roofline.copy_bytes_per_s

    def reaches(self) -> list[Reach]:
        """The targets of the kernels, and what was measured."""
        long = [m for m in self.group("prefill", head_dim=128) if m.sizes["length"] >= LONG_PREFILL]
        usual, alone = (self.group("decode", batch=b, context=n) for b, n in TARGET_DECODES)
        flash, paged, prefill = "flash_attention", "paged_attention", "prefill 4k..16k:"
        targets: list[tuple[str, float, Iterable[float | None]]] = [
            (f"{prefill} flash_attention / SDPA flash", 1.2, (m.ratio(flash, "SDPA flash") for m in long)),
            (f"{prefill} flash_attention / SDPA cuDNN", 0.65, (m.ratio(flash, "SDPA cuDNN") for m in long)),
            (f"{prefill} paged / dense flash_attention", 0.85, (m.ratio(paged, flash) for m in long)),
            ("decode, batch 32, context 4k: share of copy", 0.85, (self.share_of_copy(m, paged) for m in usual)),
            ("decode, batch 1, context 32k: share of copy", 0.75, (self.share_of_copy(m, paged) for m in alone)),
            ("decode: paged_attention / flashinfer", 1.0, (m.ratio(paged, "flashinfer") for m in self.group("decode"))),
        ]
        return [
            Reach(what, wanted, min((x for x in found if x is not None), default=None))
            for what, wanted, found in targets
        ]
