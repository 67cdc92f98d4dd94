"""A few steps as torch.profiler records them: some with chunks of prompts, and the decode steps that follow.

    bench-trace.json.gz, for ui.perfetto.dev or chrome://tracing

    host      | schedule | step 18: 240 decodes, 4 chunks of 1,808 tokens | settle | ...
    device          | rms_norm | matmul | qk_norm_rope | paged_prefill | ...

A first, unrecorded pass compiles what these steps need and finds their place in the workload, whose steps are the same
in each pass. Requests that are unfinished after them are aborted. Nothing here is a measurement.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from paged_infer.bench.speed.recorded_steps import serving
from paged_infer.bench.speed.step_spans import replaced
from paged_infer.bench.tables import print_table
from paged_infer.bench.workloads import Workload
from paged_infer.control.step import ScheduledStep
from paged_infer.engine.engine import LLMEngine
from paged_infer.files import replacing

NUM_SHOWN = 15  # kernels of the table
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the record


@dataclass(frozen=True, slots=True)
class Recorded:
    """What was recorded, and where it is.

    ``kernels``: (name, calls, milliseconds), the longest first; on a CPU torch's operations, without those inside them.
    ``num_in_graphs``: kernels that a CUDA graph launched.
    """

    path: Path
    steps: list[str]
    kernels: list[tuple[str, int, float]]
    num_in_graphs: int = 0

    @property
    def num_kernels(self) -> int:
        return sum(calls for _, calls, _ in self.kernels)


def has_chunk(step: ScheduledStep) -> bool:
    """Whether the step computes a chunk of a prompt: more than one known token of a sequence."""
    return any(sequence.num_known_tokens > 1 for sequence in step.sequences)


def described(step: ScheduledStep) -> str:
    """Such as "step 17: 3 decodes, 1 chunk of 512 tokens"."""
    chunks = [one.num_tokens for one in step.sequences if one.num_known_tokens > 1]
    num_decodes = len(step.sequences) - len(chunks)
    parts = [f"{num_decodes} decode{'s' * (num_decodes != 1)}"] * (num_decodes > 0)
    parts += [f"{len(chunks)} chunk{'s' * (len(chunks) != 1)} of {sum(chunks):,} tokens"] * bool(chunks)
    return f"step {step.index}: {', '.join(parts)}"


def record_steps(engine: LLMEngine, workload: Workload, num_prompt: int, num_decode: int, path: Path) -> Recorded:
    """Record ``num_prompt`` steps with chunks of prompts and the ``num_decode`` decode steps after them.

    Args:
        path: a .json.gz, written whole.

    Raises:
        ValueError: the workload has no such steps; the message has the number of each kind.
    """
    first = _find(engine, workload, num_prompt, num_decode)
    steps: list[ScheduledStep] = []
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (engine.device.type == "cuda")
    with serving(engine, workload):
        for _ in range(first):
            engine.step()
        _synchronize(engine)
        with _named(engine, steps), profile(activities=activities) as recorded:
            for _ in range(num_prompt + num_decode):
                engine.step()
            _synchronize(engine)
    kinds = [has_chunk(step) for step in steps]
    assert kinds == [True] * num_prompt + [False] * num_decode, kinds
    events = _export(recorded, path)
    kernels = [event for event in events if event.get("cat") in KERNELS]
    times = _kernel_times(kernels) if engine.device.type == "cuda" else _operator_times(recorded)
    num_in_graphs = sum(bool(event["args"].get("graph node id")) for event in kernels)
    return Recorded(path, [described(step) for step in steps], times, num_in_graphs)


def _find(engine: LLMEngine, workload: Workload, num_prompt: int, num_decode: int) -> int:
    """How many steps come before the first ``num_prompt`` with chunks that are followed by ``num_decode`` without."""
    kinds: list[bool] = []
    launch = engine.executor.launch

    def launched(step: ScheduledStep) -> Any:
        kinds.append(has_chunk(step))
        return launch(step)

    wanted = [True] * num_prompt + [False] * num_decode
    with serving(engine, workload), replaced([(engine.executor, "launch", launched)]):
        while engine.has_unfinished_requests:
            engine.step()
            if kinds[-len(wanted) :] == wanted:
                return len(kinds) - len(wanted)
    raise ValueError(
        f"{workload.name}: {sum(kinds)} steps have chunks of prompts and {len(kinds) - sum(kinds)} have none, but "
        f"never {num_decode} of the latter right after {num_prompt} of the former: ask for fewer steps, for more "
        f"requests or for a smaller max_num_batched_tokens than {engine.scheduler.max_num_batched_tokens}"
    )


def _named(engine: LLMEngine, steps: list[ScheduledStep]) -> Any:
    """Within the block, each step appears in the record under its name; it is appended to ``steps``."""
    launch = engine.executor.launch

    def launched(step: ScheduledStep) -> Any:
        steps.append(step)
        with record_function(described(step)):
            return launch(step)

    def named(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def within(*arguments: Any) -> Any:
            with record_function(name):
                return call(*arguments)

        return within

    parts = [(engine.scheduler, name, named(name, getattr(engine.scheduler, name))) for name in ("schedule", "settle")]
    return replaced([(engine.executor, "launch", launched), *parts])


def _synchronize(engine: LLMEngine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)


def _export(recorded: profile, path: Path) -> list[dict[str, Any]]:
    """Write ``path``, and return its events."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(plain))
        content = plain.read_bytes()
    with replacing(path) as part:
        part.write_bytes(gzip.compress(content))
    events: list[dict[str, Any]] = json.loads(content)["traceEvents"]
    return events


def _kernel_times(kernels: list[dict[str, Any]]) -> list[tuple[str, int, float]]:
    found: dict[str, list[float]] = {}
    for event in kernels:
        found.setdefault(event["name"], []).append(event["dur"] / 1e3)  # from microseconds
    return _longest_first([(name, len(each), sum(each)) for name, each in found.items()])


def _operator_times(recorded: profile) -> list[tuple[str, int, float]]:
    named = [one for one in recorded.key_averages() if not one.is_user_annotation]
    return _longest_first([(one.key, one.count, one.self_cpu_time_total / 1e3) for one in named])


def _longest_first(times: list[tuple[str, int, float]]) -> list[tuple[str, int, float]]:
    return sorted(times, key=lambda one: -one[2])


def print_recorded(recorded: Recorded) -> None:
    """Print the kernels that took most of the time, and the path of the record."""
    total_ms = sum(ms for _, _, ms in recorded.kernels) or 1.0
    rows = [
        (name if len(name) <= 80 else f"{name[:77]}...", f"{calls:,}", f"{ms:,.2f}", f"{ms / total_ms:.1%}")
        for name, calls, ms in recorded.kernels[:NUM_SHOWN]
    ]
    title = f"{recorded.steps[0]}; ...; {recorded.steps[-1]}"
    print_table(title, ("kernel", "calls", "ms", "share"), rows)
    in_graphs = f", {recorded.num_in_graphs:,} of them in CUDA graphs" * bool(recorded.num_in_graphs)
    size = recorded.path.stat().st_size / 2**20
    print(f"{len(recorded.steps)} steps, {recorded.num_kernels:,} kernel events{in_graphs}: {recorded.path}", end=" ")
    print(f"({size:.1f} MiB; open it in ui.perfetto.dev)", flush=True)
