"""The model in several workers, one per rank, that the engine starts on this machine or on others.

    engine's process      Scheduler -- delta of a step -->  rank 0  \\
                                                            rank 1   > collectives in every layer
                                    <-- StepResult -------  rank 0  /

The engine's process plans and has no model: it can plan the next step while this one is computed (on a CPU, too), and
it outlives a rank that dies. How ranks start, are reached and end is a ``Ranks``: processes of this machine
(``rank_processes``), or actors of a Ray cluster (``ray_cluster``).
"""

from __future__ import annotations

import dataclasses
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as ReadOnlyList
from pathlib import Path
from typing import Any, Protocol

import torch

from paged_infer.config import EngineConfig
from paged_infer.control.step import ScheduledStep
from paged_infer.execution.agreement import check_agreement
from paged_infer.execution.executor import RemoteStep
from paged_infer.execution.memory_plan import MemoryPlan
from paged_infer.execution.step_delta import Delta, StepEncoder
from paged_infer.execution.worker import Setup, num_remembered
from paged_infer.kernels.device import device_of
from paged_infer.model.loading.hub import resolve_model
from paged_infer.model.parallel import Traffic


class Ranks(Protocol):
    """Workers that have been started. Each gets the same commands, in the same order: the methods of ``Worker``.

    Attributes:
        store: host and port where they meet.
        is_loading: a ValueError of a rank is then one of the model or of an option, and otherwise a rank's end.
        traffic: of rank 0, when it sent the last result that was read.
    """

    store: tuple[str, int]
    is_loading: bool
    traffic: Traffic

    @property
    def pids(self) -> list[int]:
        """Their processes, by rank, each as its own machine counts them."""

    def gpu_of(self, rank: int) -> int:
        """The number of a rank's GPU among those that it sees."""

    def call(self, name: str, arguments: ReadOnlyList[tuple[Any, ...]]) -> list[Any]:
        """Run a command, with each rank's own arguments, and wait for all answers.

        Raises:
            EngineDeadError: a rank has ended or has failed; which ends all of them.
            ValueError: the same, while loading, because of the model or of an option.
        """

    def launch(self, index: int, delta: Delta) -> RemoteStep:
        """Run ``Worker.launch`` without waiting for it. ``index``: the step's. Raises EngineDeadError as ``call``."""

    def check_alive(self) -> None:
        """See ``Executor``."""

    def on_death(self, callback: Callable[[], None]) -> None:
        """See ``Executor``."""

    def close(self) -> None:
        """See ``Executor``."""


class RankExecutor(ABC):
    """Runs ``tensor_parallel_size`` ranks. The constructor loads the models, and ``reserve`` makes the pool.

    Attributes:
        memory: how large the pool can be on every rank.

    Raises:
        ValueError: the model or an option cannot be used, or there is no place for the ranks.
        EngineDeadError: a rank ended while it loaded.
    """

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        self.device = device_of_ranks(config)
        self._size = size = config.tensor_parallel_size
        self._encoder = StepEncoder(num_remembered(config))
        config = rank_config(config)
        self._ranks = ranks = self._start(size, config.rank_timeout_s)
        self._finalizer = weakref.finalize(self, ranks.close)
        try:
            setups = []
            for rank in range(size):
                device = f"cuda:{ranks.gpu_of(rank)}" if self.device.type == "cuda" else str(self.device)
                own = dataclasses.replace(config, device=device)
                setups.append(Setup(folder.absolute(), own, rank, size, ranks.store))
            check_agreement(ranks.call("prepare", [(setup,) for setup in setups]))
            plans: list[MemoryPlan] = ranks.call("load", [()] * size)
        except BaseException:
            self.close()
            raise
        self.memory = min(plans, key=lambda plan: plan.num_blocks)

    @abstractmethod
    def _start(self, size: int, timeout_s: float) -> Ranks:
        """Start ``size`` workers for ``self.device``. Raises ValueError if there is no place for them."""

    def reserve(self) -> None:
        """Make the pool: on every rank, as many blocks as the rank with the least room can hold. Sets ``memory``."""
        plans: list[MemoryPlan] = self._ranks.call("reserve", [(self.memory.num_blocks,)] * self._size)
        if len({dataclasses.replace(plan, profile=None) for plan in plans}) > 1:
            raise RuntimeError(f"the ranks have pools of different sizes: {plans}")
        self.memory = plans[0]
        self._ranks.is_loading = False

    @property
    def pids(self) -> list[int]:
        """See ``Ranks``."""
        return self._ranks.pids

    @property
    def traffic(self) -> Traffic:
        """See ``Executor``."""
        return self._ranks.traffic

    def now(self) -> float:
        """The time of this process, the only one that plans."""
        return time.perf_counter()

    def launch(self, step: ScheduledStep) -> RemoteStep:
        """See ``Executor``."""
        self.check_alive()
        return self._ranks.launch(step.index, self._encoder.encode(step))

    def check_alive(self) -> None:
        self._ranks.check_alive()

    def on_death(self, callback: Callable[[], None]) -> None:
        self._ranks.on_death(callback)

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


def rank_config(config: EngineConfig) -> EngineConfig:
    """The options of a rank. Ranks do not plan, so the policy, perhaps a class of the caller's, is not sent."""
    speculation = config.speculation
    if speculation is not None and speculation.model is not None:
        speculation = dataclasses.replace(speculation, model=resolve_model(speculation.model).absolute())
    return dataclasses.replace(
        config, scheduling_policy="chunked", scheduler_delay_factor=0.0, speculative_config=speculation
    )
