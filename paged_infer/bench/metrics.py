"""The metrics that follow from when each token came (``simulation.times``), which all benches share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from paged_infer.bench.floor import Floor
from paged_infer.bench.workloads import Workload
from paged_infer.engine.kv_usage import KVUsage
from paged_infer.simulation.times import TokenTimes, quantile


@dataclass(slots=True)
class Run:
    """One system on one workload: its tokens, their times, and what its cache held.

    ``seconds`` is from the first request's arrival to the last one's end, in real time. ``usage`` is None where a
    peer does not report it. Over HTTP there are ``texts``, and ``token_ids`` is empty.
    """

    token_ids: list[list[int]]
    times: list[TokenTimes]
    seconds: float
    usage: KVUsage | None = None
    kv_bytes_per_token: int = 0
    span_s: dict[str, float] = field(default_factory=dict)  # where an engine's steps spent it; see ``step_spans``
    step_s: list[float] = field(default_factory=list)  # when each of an engine's steps returned, on a clock of its own
    overhead_share: float | None = None  # of the steps' time, in which nothing was computed; on a GPU of some steps
    texts: list[str] = field(default_factory=list)
    is_whole: bool = False  # answers came whole: the time of the first token is not known
    loop_delay_s: Percentiles | None = None  # of a server's event loop
    acceptance_rate: float | None = None  # of drafted tokens; None where none was drafted
    num_steps: int | None = None  # None: a peer does not report it
    peak_bytes: int | None = None  # resident memory of its process so far; of peers in processes of their own

    @property
    def num_outputs(self) -> list[int]:
        """Output tokens of each request."""
        return [len(ids) for ids in self.token_ids] or [one.num_tokens for one in self.times]

    @property
    def num_tokens(self) -> int:
        return sum(self.num_outputs)

    @property
    def peak_kv_bytes(self) -> int | None:
        return None if self.usage is None else self.usage.peak_slots * self.kv_bytes_per_token

    @property
    def kv_fill(self) -> float | None:
        """Share of KV bytes in use that hold tokens, over all steps; None where none is kept or reported."""
        return self.usage.fill if self.usage is not None and self.usage.slot_steps else None


System = Callable[[Workload], Run]  # the system under test (MLPerf's term): serves a workload, and is clocked


@dataclass(frozen=True, slots=True)
class Percentiles:
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Percentiles | None:
        """None where there is nothing to rank, or one of the values is not known."""
        found = list(values)
        if not found or None in found:
            return None
        ordered = sorted(value for value in found if value is not None)
        return cls(*(quantile(ordered, share) for share in (0.5, 0.9, 0.99)))


@dataclass(frozen=True, slots=True)
class Metrics:
    """The metrics of a run. Seconds; percentiles over requests, those of ``itl_s`` over all tokens but the first ones.

    ``reasoning_s`` and ``ttfc_s`` (first content token, ``simulation.times``) are of the requests that came so far.

    MBU and MFU (model bandwidth and FLOPs utilisation) are the least that the workload needs, over the measured
    roofline; ``floor_share`` is the floor's seconds over these. None: not known, or not reported by a peer.
    """

    seconds: float
    output_tokens_per_s: float
    total_tokens_per_s: float | None = None  # prompts and outputs
    ttft_s: Percentiles | None = None
    reasoning_s: Percentiles | None = None
    ttfc_s: Percentiles | None = None
    tpot_s: Percentiles | None = None
    itl_s: Percentiles | None = None
    latency_s: Percentiles | None = None
    mbu: float | None = None
    mfu: float | None = None
    floor_share: float | None = None
    overhead_share: float | None = None
    peak_kv_bytes: float | None = None
    kv_fill: float | None = None
    loop_delay_s: Percentiles | None = None
    acceptance_rate: float | None = None
    num_steps: float | None = None

    @classmethod
    def of(cls, runs: ReadOnlyList[Run], floor: Floor | None) -> Metrics:
        """Medians over the repeats of one system, field by field; rates and shares are those of the median seconds."""
        seconds, first = median(run.seconds for run in runs), runs[0]
        num_prompt_tokens = sum(one.num_prompt for one in first.times)
        repeats = [_measured(run) for run in runs]
        return cls(
            seconds,
            first.num_tokens / seconds,
            (num_prompt_tokens + first.num_tokens) / seconds,
            mbu=None if floor is None else floor.memory_s / seconds,
            mfu=None if floor is None else floor.compute_s / seconds,
            floor_share=None if floor is None else floor.seconds / seconds,
            **{name: _median([one[name] for one in repeats]) for name in repeats[0]},
        )


def _measured(run: Run) -> dict[str, Any]:
    """The metrics of one run that are not something over its seconds."""

    def ranked(times: list[TokenTimes], name: str) -> Percentiles | None:
        return Percentiles.of(getattr(one, name) if one.token_s else None for one in times)

    from_first = [] if run.is_whole else run.times
    names = ("overhead_share", "peak_kv_bytes", "kv_fill", "loop_delay_s", "acceptance_rate", "num_steps")
    return {
        "ttft_s": ranked(from_first, "ttft_s"),
        **{name: _reached(from_first, name) for name in ("reasoning_s", "ttfc_s")},
        "tpot_s": ranked(from_first, "tpot_s"),
        "itl_s": Percentiles.of(gap for one in run.times for gap in one.gaps_s),
        "latency_s": ranked(run.times, "latency_s"),
        **{name: getattr(run, name) for name in names},
    }


def _reached(times: list[TokenTimes], name: str) -> Percentiles | None:
    return Percentiles.of(value for one in times if (value := getattr(one, name)) is not None)


def _median(values: list[Any]) -> Any:
    """None if one of the values is not known."""
    if None in values:
        return None
    if isinstance(values[0], Percentiles):
        return Percentiles(*(median(getattr(v, p) for v in values) for p in ("p50", "p90", "p99")))
    return median(values)
