"""How long a call takes: on a GPU by events around a replayed CUDA graph, elsewhere by the clock; medians."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """One sample for each repeat, and the way they were taken."""

    samples_s: tuple[float, ...]
    method: str  # "clock", "cuda graph", or "cuda events, no graph: <reason>"

    @property
    def median_s(self) -> float:
        return median(self.samples_s)


def time_on(device: torch.device | str, fn: Call, *, repeats: int = 20) -> Timing:
    """``time_cuda_graph`` on a CUDA device, ``time_calls`` elsewhere."""
    if torch.device(device).type != "cuda":
        return time_calls(fn, repeats=repeats)
    with torch.cuda.device(device):
        return time_cuda_graph(fn, repeats=repeats)


def time_calls(fn: Call, *, repeats: int = 20, warm_up: int = 1) -> Timing:
    """By the clock, after ``warm_up`` calls that are thrown away. For the CPU: it waits for no device."""
    for _ in range(warm_up):
        fn()
    samples_s = []
    for _ in range(repeats):
        start_s = perf_counter()
        fn()
        samples_s.append(perf_counter() - start_s)
    return Timing(tuple(samples_s), "clock")


# Why a capture failed in this process; no other is tried after it. torch 2.11 does not undo a failed capture: the
# allocator behaves as if it were still running, and never releases cached memory again (fixed by pytorch PR 180395).
_failed_capture: str | None = None


def time_cuda_graph(
    fn: Call, *, can_be_captured: bool = True, flush_l2: bool = True, repeats: int = 20, warm_up: int = 3
) -> Timing:
    """GPU time of ``fn`` alone on the current device: captured in a CUDA graph, each replay between two events.

    The host launches one graph instead of every kernel, and before each replay the GPU gets a longer job (clearing its
    L2 cache); replay and events queue up after it, so no launch gap is timed. Without a graph, ``fn`` itself is called
    between the events, ``method`` has the reason, and gaps in which the host is late count.

    Args:
        fn: launches work on the current stream; always on the same tensors, as a graph does.
        can_be_captured: False if the host waits for the device in ``fn``. After a capture that fails, all later
            timings of this process are without a graph.
        flush_l2: start each replay with nothing of ``fn``'s in the L2 cache. A decode step finds the weights and caches
            of the other layers there, so cold is what an engine sees. False: warm, from one replay just before.
        warm_up: calls before the capture, for compilers and libraries that set themselves up when first called.

    Raises:
        RuntimeError: there is no CUDA device. Whatever a plain call of ``fn`` raises comes through.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("time_cuda_graph needs a CUDA device; time_calls times the CPU")
    _warm_up(fn, warm_up)
    replay, method = _capture(fn) if can_be_captured else (fn, "cuda events, no graph: the host waits in it")
    flush = _l2_flusher()
    events = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush()
        if not flush_l2:
            replay()
        start.record()
        replay()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return Timing(tuple(start.elapsed_time(end) / 1e3 for start, end in events), method)


def _warm_up(fn: Call, times: int) -> None:
    """On a stream of its own, as torch asks for what is to be captured."""
    stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        for _ in range(max(1, times)):
            fn()
    stream.wait_stream(side)
    torch.cuda.synchronize()


def _capture(fn: Call) -> tuple[Call, str]:
    """A call that repeats what ``fn`` does, and how it does it."""
    global _failed_capture
    if _failed_capture is None:
        stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                fn()
            return graph.replay, "cuda graph"
        except Exception as error:
            first = error.__context__ or error  # ending the broken capture raises a second, less useful error
            _failed_capture = f"{type(first).__name__}: {first}".splitlines()[0]
            _recover(stream)
    return fn, f"cuda events, no graph: a capture failed in this process: {_failed_capture}"


def _recover(stream: torch.cuda.Stream) -> None:
    """Undo what can be undone: the capture's stream is still current, the random generator still in capture mode."""
    torch.cuda.set_stream(stream)
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())  # same seed and offset, without the mark of a capture


def _l2_flusher() -> Call:
    """Write a buffer several times the L2 cache, then read it: the write throws out what was there, and the read leaves
    lines that need no writing back while ``fn`` is being timed.
    """
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    buffer = torch.zeros(max(4 * l2_bytes, 2**28) // 4, dtype=torch.float32, device="cuda")

    def flush() -> None:
        buffer.zero_()
        buffer.sum()

    return flush
