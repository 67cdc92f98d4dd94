"""What chapters count while a call runs: PyTorch's operations, reads by the CPU, bytes. ``course`` has the names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from course import decoder_of, device
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paged_infer import LLM
from paged_infer.config import EngineConfig
from paged_infer.execution.memory_profile import MemoryProfile, MemoryProfiler
from paged_infer.kernels.attention_backends import attention_backend
from paged_infer.model.decoder import Decoder


class OperationCounter(TorchDispatchMode):
    """The names of the operations that torch runs in a ``with`` block, without views, which run nothing.

    An index by a mask ", waits": the size of its result depends on values, so the CPU must wait for the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            name = function.__name__.partition(".")[0]
            by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
            self.names.append(name + ", waits" * by_mask)
        return function(*args, **(kwargs or {}))


def num_host_reads(call: Callable[[], object]) -> int:
    """How many numbers the call moves from a tensor into Python or C++ code, for each of which the CPU waits for a GPU.

    PyTorch's own operations may do so too: the profiler records the operations inside them.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # some builds print when a profile begins and ends
    with torch.autograd.profiler.profile(use_kineto=False) as recorded:
        call()
    return sum(event.name == "aten::_local_scalar_dense" for event in recorded.function_events)


class LiveBytes(TorchDispatchMode):
    """Adds up the tensors that operations under it have made and that are alive; ``weights`` do not count."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.weights = {StorageWeakRef(weight.untyped_storage()) for weight in weights}
        self.live: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            if (reference := StorageWeakRef(storage)) not in self.weights:
                self.live[reference] = storage.nbytes()
        self.live = {reference: size for reference, size in self.live.items() if not reference.expired()}
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def peak_bytes(call: Callable[..., object], *args, weights: Iterable[Tensor] = ()) -> int:
    """The most bytes in tensors at one time during the call. Views of ``weights`` do not count."""
    with LiveBytes(weights) as live:
        call(*args)
    return live.peak


class SupposedDevice:
    """A device of ``total`` bytes for the package's memory profiler, which asks a GPU otherwise."""

    def __init__(self, decoder: Decoder, total: int) -> None:
        self.weights, self.total = list(decoder.parameters()), total

    def free_and_total(self) -> tuple[int, int]:
        return self.total, self.total

    def allocated(self) -> int:
        return sum(weight.nbytes for weight in self.weights)

    def peak_of(self, run: Callable[[], object]) -> int:
        return peak_bytes(run, weights=self.weights)


def supposed_profile(model: LLM | Decoder, total: int) -> MemoryProfile:
    """What the package's profiler measures of a model on a device of ``total`` bytes, by PyTorch's attention."""
    decoder = decoder_of(model)
    profiler = MemoryProfiler(SupposedDevice(decoder, total), free=total, total=total, allocated=0)
    return profiler.finish(EngineConfig(), decoder, *attention_backend("sdpa", device), has_graphs=False)
