"""The model in several processes of this machine, one per rank: ``distributed_executor_backend="mp"``.

    engine's process      Scheduler -- delta of a step, pickled once -->  rank 0  \\
                                                                          rank 1   > collectives in every layer
                                    <-- StepResult of rank 0 -----------  rank 0  /

The engine's process plans and has no model: it can plan the next step while this one is computed (on a CPU, too), and
it outlives a rank that dies. The ranks meet at a store on a free port of the loopback interface.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import socket
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch

from paged_infer.config import EngineConfig
from paged_infer.control.step import ScheduledStep, StepResult
from paged_infer.execution.agreement import check_agreement
from paged_infer.execution.memory_plan import MemoryPlan
from paged_infer.execution.rank_processes import RankProcesses
from paged_infer.execution.step_delta import StepEncoder
from paged_infer.execution.worker import Setup, num_remembered, open_store
from paged_infer.kernels.device import device_of
from paged_infer.model.loading.hub import resolve_model

LOOPBACK = "127.0.0.1"


class MultiprocessStep:
    """A step that the ranks compute; see ``RemoteStep``."""

    def __init__(self, index: int, ranks: RankProcesses) -> None:
        self._index, self._ranks = index, ranks

    def request(self) -> None:
        try:
            self._ranks.controls[0].send(("result", (self._index,)))
        except OSError:
            raise self._ranks.error() from self._ranks.cause

    def wait(self) -> None:
        try:
            self._ranks.controls[0].poll(None)
        except OSError:  # which ``result`` reports
            return

    def result(self) -> StepResult:
        while True:
            index, result = self._ranks.answer(0)
            if index == self._index:  # else of an earlier request, whose wait was interrupted
                return result


class MultiprocessExecutor:
    """Runs ``tensor_parallel_size`` ranks. The constructor loads the models, and ``reserve`` makes the pool.

    Attributes:
        memory: how large the pool can be on every rank.

    Raises:
        ValueError: the model or an option cannot be used, or there are more ranks than GPUs.
        EngineDeadError: a rank ended while it loaded.
    """

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        size = config.tensor_parallel_size
        self.device = device_of_ranks(config)
        if self.device.type == "cuda" and size > (num_gpus := torch.cuda.device_count()):
            raise ValueError(f"tensor_parallel_size={size}: must be at most the number of GPUs, {num_gpus}")
        timeout_s = config.rank_timeout_s
        self._encoder = StepEncoder(num_remembered(config))
        num_threads = max(1, torch.get_num_threads() // size)
        self._store = open_store(LOOPBACK, timeout_s)  # exists as long as this process
        self._ranks = RankProcesses(size, timeout_s, rank_environment(num_threads))
        self._finalizer = weakref.finalize(self, self._ranks.close)
        configs = [rank_config(config, self.device, rank) for rank in range(size)]
        setups = [
            Setup(folder.absolute(), own, rank, size, (LOOPBACK, self._store.port), timeout_s, num_threads)
            for rank, own in enumerate(configs)
        ]
        try:
            self._ranks.send("prepare", lambda rank: (setups[rank],))
            check_agreement(self._ranks.answers())
            self._ranks.send("load", lambda rank: ())
            plans: list[MemoryPlan] = self._ranks.answers()
        except BaseException:
            self.close()
            raise
        self.memory = min(plans, key=lambda plan: plan.num_blocks)

    def reserve(self) -> None:
        """Make the pool: on every rank, as many blocks as the rank with the least room can hold. Sets ``memory``."""
        self._ranks.send("reserve", lambda rank: (self.memory.num_blocks,))
        plans: list[MemoryPlan] = self._ranks.answers()
        if len({dataclasses.replace(plan, profile=None) for plan in plans}) > 1:
            raise RuntimeError(f"the ranks have pools of different sizes: {plans}")
        self.memory = plans[0]
        self._ranks.is_loading = False

    @property
    def pids(self) -> list[int]:
        """The process ids of the ranks."""
        return self._ranks.pids

    def now(self) -> float:
        """The time of this process, the only one that plans."""
        return time.perf_counter()

    def launch(self, step: ScheduledStep) -> MultiprocessStep:
        """See ``Executor``."""
        self.check_alive()
        self._ranks.send_bytes(pickle.dumps(("launch", (self._encoder.encode(step),)), protocol=5))
        return MultiprocessStep(step.index, self._ranks)

    def check_alive(self) -> None:
        if self._ranks.has_failed:
            raise self._ranks.error() from self._ranks.cause

    def on_death(self, callback: Callable[[], None]) -> None:
        self._ranks.callbacks.append(callback)

    def close(self) -> None:
        self._finalizer()


def device_of_ranks(config: EngineConfig) -> torch.device:
    """The kind of device of which each rank has one. Makes no context on a GPU, which would take memory.

    Raises:
        ValueError: it cannot be used, or names one particular GPU.
    """
    if not config.device.startswith("cuda"):
        return device_of(config.device)
    if config.device != "cuda":
        raise ValueError(f"device={config.device!r}: {config.tensor_parallel_size} ranks need a GPU each; use 'cuda'")
    return torch.device("cuda")


def rank_environment(num_threads: int) -> dict[str, str]:
    """Environment of ranks on one machine: their number of threads, and only ports on the loopback interface."""
    interfaces = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    network = {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", interfaces[0])} if interfaces else {}
    return {"OMP_NUM_THREADS": str(num_threads), **network}


def rank_config(config: EngineConfig, device: torch.device, rank: int) -> EngineConfig:
    """The options of one rank. Ranks do not plan, so the policy, perhaps a class of the caller's, is not sent."""
    speculation = config.speculation
    if speculation is not None and speculation.model is not None:
        speculation = dataclasses.replace(speculation, model=resolve_model(speculation.model).absolute())
    return dataclasses.replace(
        config,
        device=f"cuda:{rank}" if device.type == "cuda" else str(device),
        scheduling_policy="chunked",
        scheduler_delay_factor=0.0,
        speculative_config=speculation,
    )
