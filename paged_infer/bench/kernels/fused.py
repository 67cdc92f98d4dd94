"""The fused kernels compared to torch's own operations, and why keys and values are stored by a kernel: calls counted.

A decode step writes one token's keys and values for every row, in every layer: thousands of bytes here and there, so
what it costs is calls, not bandwidth. Sizes are Llama-3-8B's; "step" means all of its 32 layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from paged_infer.bench.kernels.comparisons import Comparison, Setup
from paged_infer.bench.kernels.peers import Ready
from paged_infer.bench.kernels.report import LaunchCount
from paged_infer.kernels.fused.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from paged_infer.kernels.fused.rms_norm import add_rms_norm, add_rms_norm_reference
from paged_infer.kernels.fused.sample import sample, sample_reference
from paged_infer.kernels.fused.silu_mul import silu_mul, silu_mul_reference
from paged_infer.kernels.fused.store_kv import store_kv, store_kv_reference
from paged_infer.kernels.triton_runtime import launches_go_to

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, VOCAB = 32, 32, 8, 128, 4096, 14_336, 128_256
TOKENS = (32, 2048)  # a batch of decodes, and a budget full of prompts
STORE_REFERENCE, STORE_INDEXED = "torch, leaving out slot -1", "torch, two index_copy_"

Store = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def store_indexed(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Torch's shortest way, for a step without padding: a slot of -1 would be an error."""
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping, k)
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping, v)


STORES: dict[str, Store] = {"store_kv": store_kv, STORE_INDEXED: store_indexed, STORE_REFERENCE: store_kv_reference}


def fused_comparisons(device: torch.device) -> list[Comparison]:
    return [
        comparison
        for tokens in TOKENS
        for comparison in (
            _comparison("store_kv", tokens, LAYERS * 4 * KV_HEADS * HEAD_DIM, tuple(STORES), partial(_stores, device)),
            _with_torch("add_rms_norm", tokens, 4 * HIDDEN, partial(_norms, device)),
            _with_torch("silu_mul", tokens, 3 * INTERMEDIATE, partial(_activations, device)),
            _with_torch("qk_norm_rope", tokens, 2 * (HEADS + 2 * KV_HEADS) * HEAD_DIM, partial(_ropes, device)),
            *([_with_torch("sample", tokens, VOCAB, partial(_samples, device))] if tokens == TOKENS[0] else []),
        )
    ]  # fmt: skip


def _with_torch(name: str, tokens: int, elements: int, setups: Callable[[int], Mapping[str, Setup]]) -> Comparison:
    return _comparison(name, tokens, elements, (name, "torch"), setups)


def _comparison(
    name: str, tokens: int, elements: int, names: tuple[str, ...], setups: Callable[[int], Mapping[str, Setup]]
) -> Comparison:
    num_bytes = 2 * elements * tokens  # read and written once, in bfloat16
    title = f"{name}, {tokens:,} tokens" + (f", {LAYERS} layers" if name == "store_kv" else "")
    return Comparison("fused", title, {"tokens": tokens}, num_bytes, num_bytes, partial(setups, tokens), names)


def _stores(device: torch.device, tokens: int) -> Mapping[str, Setup]:
    return {name: partial(_store_step, device, tokens, store) for name, store in STORES.items()}


def _store_step(device: torch.device, tokens: int, store: Store) -> Ready:
    """All layers of a step, each into a cache of its own; what comes back is the last one."""
    k, v = (_random(device, tokens, KV_HEADS, HEAD_DIM, seed=seed) for seed in (1, 2))
    shape = (tokens, 16, KV_HEADS, HEAD_DIM)  # each token in a block of its own, as decodes are
    caches = [tuple(torch.zeros(shape, dtype=k.dtype, device=device) for _ in "kv") for _ in range(LAYERS)]
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(3)).to(device)
    slots = order * 16 + order % 16

    def call() -> Tensor:
        for k_cache, v_cache in caches:
            store(k, v, k_cache, v_cache, slots)
        return caches[-1][0]

    return Ready(call)


def _norms(device: torch.device, tokens: int) -> Mapping[str, Setup]:
    x, residual = (_random(device, tokens, HIDDEN, seed=seed) for seed in (1, 2))
    weight = _random(device, HIDDEN)
    return _pair(add_rms_norm, add_rms_norm_reference, x, residual, weight, 1e-6)


def _activations(device: torch.device, tokens: int) -> Mapping[str, Setup]:
    return _pair(silu_mul, silu_mul_reference, _random(device, tokens, 2 * INTERMEDIATE))


def _ropes(device: torch.device, tokens: int) -> Mapping[str, Setup]:
    angles = _random(device, tokens, 1, HEAD_DIM // 2).float().repeat(1, 1, 2)
    caches = [_random(device, tokens, 1, KV_HEADS, HEAD_DIM) for _ in "kv"]
    return _pair(
        qk_norm_rope,
        qk_norm_rope_reference,
        _random(device, tokens, HEADS + 2 * KV_HEADS, HEAD_DIM),
        angles.cos().bfloat16(),
        angles.sin().bfloat16(),
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        norm_weight=_random(device, HEADS + KV_HEADS, HEAD_DIM),
        k_cache=caches[0],
        v_cache=caches[1],
        slot_mapping=torch.arange(tokens, device=device),
    )


def _samples(device: torch.device, tokens: int) -> Mapping[str, Setup]:
    rows = torch.arange(tokens, device=device)
    logits, temperatures = _random(device, tokens, VOCAB), torch.ones(tokens, device=device)

    def scores(draw: Callable[..., tuple[Tensor, Tensor]]) -> Ready:
        return Ready(lambda: draw(logits, temperatures, rows, torch.zeros_like(rows), rows + 100)[1])

    return {"sample": partial(scores, sample), "torch": partial(scores, sample_reference)}


def _pair(ours: Callable[..., Any], reference: Callable[..., Any], *args: Any, **options: Any) -> Mapping[str, Setup]:
    def ready(function: Callable[..., Any]) -> Ready:
        def call() -> Tensor:
            out = function(*args, **options)
            return out[0] if isinstance(out, tuple) else out

        return Ready(call)

    return {ours.__name__: partial(ready, ours), "torch": partial(ready, reference)}


def _random(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, dtype=torch.bfloat16, device=device, generator=rng)


# -- Counting --------------------------------------------------------------------------------------------------------


def count_store_calls(device: torch.device) -> list[LaunchCount]:
    """What the stores of one decode step of 32 rows cost, counted while they run: ATen operations, and on CUDA what
    torch's profiler sees on the device. On a CPU a kernel's launches are counted where they are made.
    """
    counts = []
    for name, store in STORES.items():
        call = _store_step(device, TOKENS[0], store).call
        is_kernel = store is store_kv
        launches: int | None = None
        if device.type == "cuda":
            call()  # compiled, and set up, before it is counted
            launches = _profiled_launches(call)
        elif is_kernel:
            launches = _kernel_launches(call)
        counts.append(LaunchCount(name, None if is_kernel else _operations(call), launches))
    return counts


def _operations(call: Callable[[], object]) -> int:
    """ATen operations that ``call`` makes; views of a tensor, which do nothing on a device, are left out."""
    with _CountOperations() as mode:
        call()
    return mode.count


class _CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def _kernel_launches(call: Callable[[], object]) -> int:
    """Triton launches of ``call``, none of which is run."""
    grids = []
    with launches_go_to(lambda kernel, grid, args, named: grids.append(grid), (9, 0)):
        call()
    return len(grids)


def _profiled_launches(call: Callable[[], object]) -> int:
    """Kernels and copies that the device runs for ``call``."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in seen.events() or [])
