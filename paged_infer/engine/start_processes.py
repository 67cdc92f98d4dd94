"""Start the engines of an ``AsyncLLM`` that are in processes of their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from paged_infer.config import EngineConfig
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.engine.engine_process import EngineProcess
from paged_infer.engine.input_processor import InputProcessor
from paged_infer.engine.prefill_decode import PrefillDecode
from paged_infer.engine.process_messages import EngineSpec
from paged_infer.engine.replicas import Replicas
from paged_infer.engine.routing import PREFIX
from paged_infer.engine.spawned_process import StartedProcess, spawn
from paged_infer.kernels.device import device_of
from paged_infer.text.tokenizer import Tokenizer

BACKENDS = ("mp", "ray")


def start_processes(
    folder: Path,
    config: EngineConfig,
    max_num_waiting: int,
    step_timeout: float | None,
    size: int,
    *,
    backend: str,
    routing: str,
    disaggregated_prefill: bool,
) -> tuple[EngineProcess | Replicas, InputProcessor]:
    """Start ``size`` engines, each in a process of its own, and what checks and tokenizes their requests here.

    Args:
        backend: one of ``BACKENDS``: on this machine, or on the nodes of a Ray cluster (``engine.ray_process``).
        routing: one of ``routing.ROUTINGS``.
        disaggregated_prefill: see ``engine.prefill_decode``.

    Raises:
        ValueError: see ``AsyncLLM``.
        EngineDeadError: a process ended while it loaded.
    """
    if config.trace:
        raise ValueError("trace=True: the trace would stay in the engine's process; use one engine in this process")
    if backend != "mp" and size == 1:
        raise ValueError(f"data_parallel_backend={backend!r} with data_parallel_size=1: there is no replica to place")
    if routing == PREFIX and not config.enable_prefix_caching:
        raise ValueError("data_parallel_routing='prefix' with enable_prefix_caching=False: no prefix would be found")
    if disaggregated_prefill:
        _check_disaggregated(config, size)
    tokenizer = Tokenizer.from_pretrained(folder)
    num_threads = max(1, torch.get_num_threads() // (2 if disaggregated_prefill else size))
    devices: list[str | None] = [None] * size
    if size > 1 and backend == "mp" and device_of(config.device).type == "cuda":
        known = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        devices = [*divide_devices(known.split(","), size, config.tensor_parallel_size)]

    def spec_of(replica: int) -> EngineSpec:
        return EngineSpec(folder, config, step_timeout, num_threads, devices[replica])

    core: EngineProcess | Replicas
    if size == 1:
        kind = PrefillDecode if disaggregated_prefill else EngineProcess
        core = kind(spec_of(0), max_num_waiting=max_num_waiting)
        try:
            info = core.wait_until_ready()
        except BaseException:  # Ctrl-C, too
            core.stop()
            raise
    else:
        start = start_of(backend)

        def start_replica(i: int, on_end: Callable[[EngineProcess], None]) -> EngineProcess:
            return EngineProcess(spec_of(i), f"replica {i}", on_end=on_end, start=start)

        core = Replicas(start_replica, size, routing, max_num_waiting)
        info = core.info
    manager = BlockManager(info.memory.num_blocks, info.memory.block_size)  # to check sizes; it allocates nothing
    return core, InputProcessor(tokenizer, config, info.model_config, info.memory, manager, is_sent=True)


def start_of(backend: str) -> Callable[[EngineSpec, str], StartedProcess]:
    """How a replica is started. Raises ValueError if the backend is unknown or not installed."""
    if backend not in BACKENDS:
        raise ValueError(f"data_parallel_backend={backend!r}: must be one of {', '.join(BACKENDS)}")
    if backend == "mp":
        return spawn
    try:
        from paged_infer.engine.ray_process import start_on_ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ValueError("data_parallel_backend='ray' needs ray: pip install 'paged-infer[ray]'") from None
    return start_on_ray


def _check_disaggregated(config: EngineConfig, size: int) -> None:
    if size > 1:
        raise ValueError(f"disaggregated_prefill=True with data_parallel_size={size}: must be 1")
    if not config.enable_prefix_caching:
        raise ValueError(
            "disaggregated_prefill=True with enable_prefix_caching=False: blocks are handed over to the prefix cache"
        )
    if config.tensor_parallel_size > 1:
        raise ValueError(
            f"disaggregated_prefill=True with tensor_parallel_size={config.tensor_parallel_size}: must be 1, because "
            "whole blocks are handed over"
        )
    if config.speculation is not None and config.speculation.method == "draft_model":
        raise ValueError("disaggregated_prefill=True with a draft model: the blocks of its cache are not handed over")


def divide_devices(devices: list[str], num_replicas: int, num_each: int) -> list[str]:
    """The CUDA_VISIBLE_DEVICES of each replica: ``num_each`` of ``devices``, in order.

    >>> divide_devices(["0", "1", "2", "3"], 2, 2)
    ['0,1', '2,3']

    Raises:
        ValueError: there are too few.
    """
    if num_replicas * num_each > len(devices):
        raise ValueError(
            f"data_parallel_size={num_replicas} with {num_each} CUDA device(s) each: there are {len(devices)} devices"
        )
    return [",".join(devices[i * num_each : (i + 1) * num_each]) for i in range(num_replicas)]
