"""Stand-ins for CUDA graphs on a CPU, to compare the steps that would be captured with uncaptured ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from paged_infer import LLM
from paged_infer.execution.cuda_graphs import DecodeGraphs
from paged_infer.kernels.triton_runtime import launches_go_to

SYNCHRONISES = {Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.cpu, Tensor.nonzero, Tensor.__bool__, Tensor.__int__}
# torch.tensor(list) calls aten::lift_fresh: its numbers come from the host.
READS_THE_HOST = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item")


def call_again(fn: Callable[[], None]) -> Callable[[], None]:
    """Run the function itself at each replay: any backend can be captured, and no value is frozen."""
    fn()
    return fn


class Recorder:
    """Captures as CUDA does: torch's operations and Triton's launches are recorded once, with their tensors.

    A replay runs no Python of the step. It first fills every tensor that the step created with garbage, then repeats
    the operations, each into the tensor that it created at the capture. So anything else that a step reads, apart from
    the persistent buffers, or computes in Python, stays as it was at the capture. An operation that would make the host
    wait for a device, or read numbers from it, is an error.
    """

    def __init__(self) -> None:
        self.num_operations = 0

    def __call__(self, fn: Callable[[], None]) -> Callable[[], None]:
        operations: list[Callable[[], object]] = []
        made: list[Tensor] = []

        def triton_launch(kernel: Any, grid: Any, args: Any, named: Any) -> None:
            run = lambda: kernel[grid](*args, **named)  # noqa: E731
            operations.append(run)
            with _disable_current_modes():  # the interpreter uses torch itself
                run()

        fn()  # as CudaCapture does, to compile
        with _NoWaiting(), _Operations(operations, made), launches_go_to(triton_launch, (0, 0)):
            fn()
        self.num_operations = len(operations)

        def replay() -> None:
            for tensor in made:
                tensor.fill_(float("nan") if tensor.is_floating_point() else True)
                if tensor.dtype in (torch.int32, torch.int64):
                    tensor.fill_(1_000_003)  # no valid token, block or position
            for operation in operations:
                operation()

        return replay


class _Operations(TorchDispatchMode):
    def __init__(self, operations: list[Callable[[], object]], made: list[Tensor]) -> None:
        super().__init__()
        self.operations, self.made = operations, made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        by_mask = name == "index" and any(x.dtype == torch.bool for x in tree_leaves(args[1]) if x is not None)
        if name in READS_THE_HOST or by_mask:
            raise AssertionError(f"{name} within a captured step")
        out = func(*args, **kwargs)
        read = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if func._schema.is_mutable:
            self.operations.append(lambda: func(*args, **kwargs))
        elif not {_storage(x) for x in results} <= read:  # not only views
            self.made += results
            self.operations.append(lambda: _again(func, args, kwargs, results))
        return out


def _storage(x: Tensor) -> int:
    return id(x) if x.layout == torch._mkldnn else x.untyped_storage().data_ptr()


def _again(func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
    if "empty" in func._schema.name:  # memory, whatever is in it
        return
    for tensor, fresh in zip(results, tree_leaves(func(*args, **kwargs)), strict=True):
        tensor.copy_(fresh)


class _NoWaiting(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in SYNCHRONISES:
            raise AssertionError(f"{func.__name__} within a captured step")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the checks of slots, which kernels make only on a CPU, where nothing waits for them."""
    for name in ("store_kv", "qk_norm_rope"):
        monkeypatch.setattr(f"paged_infer.kernels.fused.{name}._check", lambda *args: None)


def with_graphs(llm: LLM, capture: Callable[[Callable[[], None]], Callable[[], object]]) -> LLM:
    """Let decode steps of ``llm`` be captured by a stand-in; counts them in ``graphs.num_replays``."""
    engine = llm.engine
    graphs = DecodeGraphs(
        engine.decoder,
        engine.executor.runner.cache,
        engine.executor.runner.cache.ops.sample,
        max_rows=engine.config.max_num_seqs,
        max_model_len=engine.memory.max_model_len,
        capture=capture,
    )
    replay, graphs.num_replays = graphs.replay, 0  # type: ignore[attr-defined]

    def counted(which: int) -> None:
        graphs.num_replays += 1  # type: ignore[attr-defined]
        replay(which)

    graphs.replay = counted  # type: ignore[method-assign]
    engine.executor.runner.graphs = graphs
    return llm
