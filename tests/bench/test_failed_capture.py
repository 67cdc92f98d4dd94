"""A call that no CUDA graph can hold is timed by events; after a capture that failed, none is tried in that process."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from paged_infer.bench import timing
from paged_infer.bench.kernels import comparisons
from paged_infer.bench.kernels.fused import FUSED, Shape
from paged_infer.bench.kernels.peers import Ready
from paged_infer.bench.kernels.problems import Tensors
from paged_infer.bench.timing import time_cuda_graph

FAILED = "cuda events, no graph: a capture failed in this process: RuntimeError: not while a stream captures"
SMALL = Shape(3, 3, 4, 2, 16, 32, 48, 100)


class FakeStream:
    def wait_stream(self, other: FakeStream) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return 7.0  # ms


class FakeCuda:
    """What the timer uses of ``torch.cuda``: counts captures, and keeps the state that a failed one leaves."""

    Event, Stream = FakeEvent, FakeStream

    def __init__(self) -> None:
        self.num_captures = 0
        self.is_capturing = False
        self.stream_now = self.first_stream = FakeStream()
        self.default_generators = [SimpleNamespace(clone_state=lambda: "clone", graphsafe_set_state=self._set_state)]
        self.generator_state = "fresh"

    def graph(self, graph: SimpleNamespace) -> FakeCuda:
        return self

    def __enter__(self) -> None:
        self.num_captures += 1
        self.is_capturing, self.stream_now, self.generator_state = True, FakeStream(), "capturing"

    def __exit__(self, kind: object, *_: object) -> None:
        self.is_capturing = False
        if kind is not None:
            raise RuntimeError("capture_end")
        self.stream_now, self.generator_state = self.first_stream, "fresh"

    def CUDAGraph(self) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: None)

    def stream(self, stream: FakeStream) -> FakeStream:
        return stream

    def set_stream(self, stream: FakeStream) -> None:
        self.stream_now = stream

    def current_stream(self) -> FakeStream:
        return self.stream_now

    def current_device(self) -> int:
        return 0

    def is_available(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def _set_state(self, state: str) -> None:
        self.generator_state = state


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=fake))
    monkeypatch.setattr(timing, "_l2_flusher", lambda: lambda: None)
    monkeypatch.setattr(timing, "_failed_capture", None)
    return fake


def waits(cuda: FakeCuda) -> torch.Tensor:
    if cuda.is_capturing:
        raise RuntimeError("not while a stream captures\nmore about it")
    return torch.ones(1)


def test_a_call_in_which_the_host_waits_is_never_captured(cuda):
    timed = time_cuda_graph(lambda: waits(cuda), can_be_captured=False, repeats=2)
    assert timed == timing.Timing((0.007, 0.007), "cuda events, no graph: the host waits in it")
    assert cuda.num_captures == 0
    assert time_cuda_graph(lambda: None, repeats=1).method == "cuda graph"
    assert cuda.num_captures == 1


def test_after_one_capture_that_failed_none_is_tried_and_the_reason_is_reported(cuda):
    assert time_cuda_graph(lambda: waits(cuda), repeats=1).method == FAILED
    assert (cuda.stream_now, cuda.generator_state) == (cuda.first_stream, "clone")
    assert time_cuda_graph(lambda: waits(cuda), repeats=1).method == FAILED
    assert time_cuda_graph(lambda: None, repeats=1).method == FAILED
    assert cuda.num_captures == 1


def test_a_kernels_samples_are_all_timed_in_one_way(cuda, monkeypatch):
    """The first is captured before the second breaks its capture; its later samples by events are not mixed in."""
    elapsed = iter([1.0] * comparisons.REPEATS + [7.0] * 1000)
    monkeypatch.setattr(FakeEvent, "elapsed_time", lambda self, end: next(elapsed))
    setups = {"good": lambda: Ready(lambda: torch.ones(1)), "breaks": lambda: Ready(lambda: waits(cuda))}
    found = {entry.name: (entry.seconds, entry.note) for entry in comparisons.run_comparison(setups)}
    assert found == {"good": (0.001, "cuda graph"), "breaks": (0.007, FAILED)}
    assert cuda.num_captures == 2


def test_a_comparison_captures_nothing_that_is_marked(cuda):
    setups = {
        "ours": lambda: Ready(lambda: torch.ones(1)),
        "torch": lambda: Ready(lambda: waits(cuda), "a note", can_be_captured=False),
    }
    notes = [entry.note for entry in comparisons.run_comparison(setups)]
    assert notes == ["cuda graph", "cuda events, no graph: the host waits in it, a note"]


@pytest.mark.parametrize("name", [name for name, kernel in FUSED.items() if kernel.elements is not None])
def test_every_contender_that_reads_values_on_the_host_is_marked_and_no_other(name):
    """Fake tensors raise where a value is asked for: in ``item`` and ``tolist``, and in a mask as an index."""
    kernel = FUSED[name]
    tensors = kernel.arguments(SMALL, Tensors(torch.float32, "cpu"))
    for function in [*kernel.contenders.values()][1:]:
        with FakeTensorMode() as mode:
            fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}
            try:
                function(**fakes)
                reads_values = False
            except (DataDependentOutputException, DynamicOutputShapeException):
                reads_values = True
        assert kernel.can_be_captured(function) is not reads_values, function


def test_the_comparison_of_a_fused_kernel_hands_the_mark_on():
    for comparison in comparisons.fused_comparisons(torch.device("meta")):
        kernel = FUSED[comparison.title.split(",")[0]]
        for name, function in kernel.contenders.items():
            ready = comparison.peers[name](SMALL)
            assert ready.can_be_captured is kernel.can_be_captured(function), comparison.title


ON_A_GPU = """
import torch
from paged_infer.bench.timing import time_cuda_graph
x, stream = torch.ones(2**20, device="cuda"), torch.cuda.current_stream()
def waits():
    return x.sum().item()
timed = time_cuda_graph(waits, can_be_captured=False, repeats=3)
assert timed.method == "cuda events, no graph: the host waits in it", timed
assert time_cuda_graph(lambda: x.mul_(1.0), repeats=3).method == "cuda graph"
timed = time_cuda_graph(waits, repeats=3)
assert timed.method.startswith("cuda events, no graph: a capture failed in this process: "), timed
assert timed.median_s > 0
assert torch.cuda.current_stream() == stream
assert torch.randn(4, device="cuda").isfinite().all()
assert time_cuda_graph(lambda: x.mul_(1.0), repeats=3).method == timed.method
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_stays_usable_after_a_capture_that_failed():
    """In a process of its own: what comes after it in that process could not trust the allocator."""
    result = subprocess.run([sys.executable, "-c", ON_A_GPU], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
