"""A stand-in for a CUDA device on a CPU, which raises where the host would wait for the device.

Its tensors report ``device="cuda:0"`` and compute on a CPU. A copy to the host arrives when its event is waited for:
what is read earlier is garbage. Within ``no_waiting``, an operation raises if on CUDA it would read a value of the
device's memory on the host, as ``torch.cuda.set_sync_debug_mode("error")`` does, or copy from or to pageable memory,
which can block too. As on CUDA, tensors of both devices in one operation are an error. Kernels are interpreted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from paged_infer.kernels.triton_runtime import launches_go_to

DEVICE = torch.device("cuda:0")
READS = {
    Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.cpu, Tensor.__bool__, Tensor.__int__, Tensor.__float__,
    Tensor.__index__, Tensor.__array__, Tensor.__contains__, torch.equal, Tensor.equal,
}  # fmt: skip
# Below a function of torch: the size of a result, or a branch, depends on values.
READS_WITHIN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item", "_unique2", "bincount")
PROPERTIES = {Tensor.device.__get__: DEVICE, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False}  # type: ignore[attr-defined]


class GpuTensor(Tensor):
    """A tensor of the stand-in; ``cpu_tensor`` has its values."""

    cpu_tensor: Tensor

    @staticmethod
    def __new__(cls, cpu_tensor: Tensor) -> GpuTensor:
        made: GpuTensor = torch.Tensor._make_subclass(cls, torch.empty(0))
        made.cpu_tensor = cpu_tensor
        return made

    @classmethod
    def __torch_function__(cls, func: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{func}: a tensor of the stand-in, outside of its FakeGpu")


class FakeEvent:
    """Holds the copies to the host that were queued when it was recorded."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self._copies: list[tuple[Tensor, Tensor]] = []

    def record(self, stream: object = None) -> None:
        self._copies, self._gpu.queued_copies = [*self._copies, *self._gpu.queued_copies], []

    def synchronize(self) -> None:
        with torch._C.DisableTorchFunction():
            for host, values in self._copies:
                host.copy_(values)
        self._copies = []


class FakeGpu(TorchFunctionMode):
    """While it is entered, torch has this device."""

    def __init__(self) -> None:
        super().__init__()
        self.may_wait = True
        self.queued_copies: list[tuple[Tensor, Tensor]] = []
        self._pinned: dict[int, Tensor] = {}  # by the address of its memory, which is kept

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        before, self.may_wait = self.may_wait, False
        try:
            yield
        finally:
            self.may_wait = before

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Where the host waits on purpose."""
        before, self.may_wait = self.may_wait, True
        try:
            yield
        finally:
            self.may_wait = before

    def move(self, module: nn.Module) -> None:
        """Move parameters and buffers to the device."""
        for part in module.modules():
            for names in (part._parameters, part._buffers):
                names.update({name: GpuTensor(x.detach()) for name, x in names.items() if x is not None})  # type: ignore[misc, arg-type]

    def run_kernel(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A hook for ``launches_go_to``."""
        host = [i for i, x in enumerate(args) if isinstance(x, Tensor) and not isinstance(x, GpuTensor)]
        assert not host, f"{kernel.fn.__name__}: arguments {host} are in the host's memory"
        with torch._C.DisableTorchFunction():
            kernel[grid](*_on_cpu(args), **named)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_on_gpu = any(isinstance(x, GpuTensor) for x in tensors)
        if is_on_gpu and func in PROPERTIES:
            return PROPERTIES[func]
        if func is Tensor.pin_memory:
            return self._pin(args[0].clone())
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func is Tensor.copy_:
            return self._copy(*args, **kwargs)
        if not is_on_gpu:
            return self._create(func, name, args, kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            self._check_index(func, *args)
        elif any(not isinstance(x, GpuTensor) and x.dim() > 0 for x in tensors):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        if func in READS:
            self._wait(f"{name} reads a value")
            return func(*_on_cpu(args), **_on_cpu(kwargs))
        kwargs.pop("device", None)
        with _NoReads(self, name):
            out = func(*_on_cpu(args), **_on_cpu(kwargs))
        if name.endswith("_") and not name.endswith("__") and isinstance(args[0], GpuTensor):
            return args[0]
        return kwargs["out"] if "out" in kwargs else _on_gpu(out)

    def _create(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """A function that has no tensor of the device among its arguments: it may make one."""
        pins, is_for_gpu = kwargs.pop("pin_memory", False), _is_gpu(kwargs.get("device"))
        if is_for_gpu:
            del kwargs["device"]
            if func in (torch.tensor, torch.as_tensor):
                self._wait(f"{name} copies numbers to the device")
        out = func(*args, **kwargs)
        if pins:
            self._pin(out)
        return GpuTensor(out) if is_for_gpu else out

    def _to(self, x: Tensor, *args: Any, non_blocking: bool = False, **kwargs: Any) -> Tensor:
        targets = [a for a in (*args, kwargs.get("device")) if isinstance(a, (torch.device, str))]
        others = [a for a in args if not isinstance(a, (torch.device, str))]
        kwargs.pop("device", None)
        if isinstance(x, GpuTensor) and targets and not _is_gpu(targets[0]):
            self._wait("to copies to the host")
            return x.cpu_tensor.to(*others, **kwargs)
        if isinstance(x, GpuTensor):
            return _on_gpu(x.cpu_tensor.to(*others, **kwargs))
        if not targets or not _is_gpu(targets[0]):
            return x.to(*args, **kwargs)
        self._check_host(x, non_blocking)
        return GpuTensor(x.to(*others, **kwargs).clone())

    def _copy(self, x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        is_to_gpu, is_from_gpu = isinstance(x, GpuTensor), isinstance(source, GpuTensor)
        if is_to_gpu != is_from_gpu:
            self._check_host(source if is_to_gpu else x, non_blocking)
        to, values = _on_cpu((x, source))
        if is_to_gpu or not is_from_gpu or not non_blocking:
            to.copy_(values)
        else:
            to.view(torch.uint8).fill_(0x7F)
            self.queued_copies.append((x, values.clone()))
        return x

    def _check_host(self, host: Tensor, non_blocking: bool) -> None:
        if not non_blocking:
            self._wait("a copy without non_blocking")
        elif host.untyped_storage().data_ptr() not in self._pinned:
            self._wait("a copy from or to pageable memory")

    def _check_index(self, func: Any, x: Tensor, index: Any, value: Any = None) -> None:
        assert isinstance(x, GpuTensor), "an index or a value on the device, of a tensor on the host"
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, GpuTensor):
                # Setting the elements of a mask to a number is masked_fill_.
                is_fill = part.cpu_tensor.dtype == torch.bool and not isinstance(value, Tensor)
                if part.cpu_tensor.dtype == torch.bool and (func is Tensor.__getitem__ or not is_fill):
                    self._wait(f"{func.__name__} counts a mask")
                elif part.cpu_tensor.dim() == 0:
                    self._wait(f"{func.__name__} reads its index")
            elif isinstance(part, (list, np.ndarray, Tensor)):
                self._wait(f"{func.__name__} copies its index, a {type(part).__name__}, to the device")
        if isinstance(value, Tensor) and not isinstance(value, GpuTensor):
            self._wait(f"{func.__name__} copies its value to the device")

    def _pin(self, x: Tensor) -> Tensor:
        self._pinned[x.untyped_storage().data_ptr()] = x
        return x

    def _wait(self, why: str) -> None:
        if not self.may_wait:
            raise AssertionError(f"the host waits for the device: {why}")


class _NoReads(TorchDispatchMode):
    def __init__(self, gpu: FakeGpu, name: str) -> None:
        super().__init__()
        self._gpu, self._name = gpu, name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in READS_WITHIN:
            self._gpu._wait(f"{self._name} calls {func._schema.name}")
        return func(*args, **(kwargs or {}))


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _on_cpu(values: Any) -> Any:
    return tree_map(lambda x: x.cpu_tensor if isinstance(x, GpuTensor) else x, values)


def _on_gpu(values: Any) -> Any:
    if isinstance(values, (tuple, list)) and any(isinstance(x, Tensor) for x in values):
        return tree_map(lambda x: GpuTensor(x) if isinstance(x, Tensor) else x, values)
    return GpuTensor(values) if isinstance(values, Tensor) else values


@pytest.fixture(name="gpu")
def gpu_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """Torch has a ``FakeGpu`` within the test."""
    fake = FakeGpu()
    monkeypatch.setattr(torch.cuda, "Event", lambda: FakeEvent(fake))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(multi_processor_count=1)
    )
    with fake, launches_go_to(fake.run_kernel, (0, 0)):
        yield fake
