"""Start the engines of an ``AsyncLLM``: one in this process, or one or several in processes of their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from paged_infer.config import EngineConfig
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.engine.engine import LLMEngine
from paged_infer.engine.engine_client import EngineClient
from paged_infer.engine.engine_process import EngineProcess
from paged_infer.engine.engine_thread import EngineThread
from paged_infer.engine.input_processor import InputProcessor
from paged_infer.engine.prefill_decode import PrefillDecode
from paged_infer.engine.process_messages import EngineInfo, EngineSpec
from paged_infer.engine.replicas import Replicas
from paged_infer.engine.serving_options import ServingOptions
from paged_infer.engine.spawned_process import StartedProcess, spawn
from paged_infer.kernels.device import device_of
from paged_infer.model.loading.hub import name_of, resolve_model
from paged_infer.text.tokenizer import Tokenizer


def start_engines(
    model: str | Path | None, config: EngineConfig, options: ServingOptions
) -> tuple[EngineClient, InputProcessor, str]:
    """The engines, what checks and tokenizes their requests in this process, and the model's name.

    Raises:
        ValueError: see ``AsyncLLM``.
        EngineDeadError: a process ended while it loaded.
    """
    options.check_engines(config)
    if options.is_local:
        engine = LLMEngine(model, config)
        client = EngineThread(engine, options.max_num_waiting, options.step_timeout)
        return client, engine.input_processor, engine.name
    model = "storyteller" if model is None else model
    folder = resolve_model(model)
    tokenizer = Tokenizer.from_pretrained(folder)
    processes, info = _start_processes(_specs(folder, config, options), options)
    manager = BlockManager(info.memory.num_blocks, info.memory.block_size)  # to check sizes; it allocates nothing
    inputs = InputProcessor(tokenizer, config, info.model_config, info.memory, manager, is_sent=True)
    return processes, inputs, name_of(model, folder)


def _specs(folder: Path, config: EngineConfig, options: ServingOptions) -> list[EngineSpec]:
    """Of each replica. They divide the threads of this machine, and its CUDA devices if they all run here."""
    size = options.data_parallel_size
    num_threads = max(1, torch.get_num_threads() // (2 if options.disaggregated_prefill else size))
    devices: list[str | None] = [None] * size
    if size > 1 and options.data_parallel_backend == "mp" and device_of(config.device).type == "cuda":
        known = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        devices = [*divide_devices(known.split(","), size, config.tensor_parallel_size)]
    return [EngineSpec(folder, config, options.step_timeout, num_threads, visible) for visible in devices]


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


def _start_processes(specs: list[EngineSpec], options: ServingOptions) -> tuple[EngineClient, EngineInfo]:
    if len(specs) == 1:
        kind = PrefillDecode if options.disaggregated_prefill else EngineProcess
        process = kind(specs[0], max_num_waiting=options.max_num_waiting)
        try:
            return process, process.wait_until_ready()
        except BaseException:  # Ctrl-C, too
            process.stop()
            raise
    start = _start_of(options.data_parallel_backend)

    def start_replica(i: int, on_end: Callable[[EngineProcess], None]) -> EngineProcess:
        return EngineProcess(specs[i], f"replica {i}", on_end=on_end, start=start)

    replicas = Replicas(start_replica, len(specs), options.routing, options.max_num_waiting)
    return replicas, replicas.info


def _start_of(backend: str) -> Callable[[EngineSpec, str], StartedProcess]:
    """How a replica is started. Raises ValueError if the backend is not installed."""
    if backend == "mp":
        return spawn
    try:
        from paged_infer.engine.ray_process import start_on_ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ValueError("data_parallel_backend='ray' needs ray: pip install 'paged-infer[ray]'") from None
    return start_on_ray
