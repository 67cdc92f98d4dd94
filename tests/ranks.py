"""Ranks as threads of one process, which meet in memory: tensor parallelism without processes or a network."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from paged_infer.config import EngineConfig
from paged_infer.control.step import ScheduledStep, StepResult
from paged_infer.execution.executor import InProcessExecutor
from paged_infer.execution.loaded_models import LoadedModels
from paged_infer.execution.step_delta import StepDecoder, StepEncoder
from paged_infer.execution.worker import num_remembered
from paged_infer.model.parallel import Collective, Traffic, add_in_order

T = TypeVar("T")


class ThreadRanks:
    """One rank's ``Collective``. The others' tensors are read between two barriers."""

    def __init__(self, rank: int, held: list[Tensor], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.traffic = rank, len(held), Traffic()
        self._held, self._barrier = held, barrier

    def all_reduce(self, x: Tensor) -> Tensor:
        self.traffic.all_reduces += 1
        return add_in_order(self._exchange(x))

    def all_gather(self, x: Tensor) -> Tensor:
        self.traffic.all_gathers += 1
        return self._exchange(x)

    def _exchange(self, x: Tensor) -> Tensor:
        self.traffic.num_bytes += x.nbytes
        self._held[self.rank] = x
        self._barrier.wait()
        gathered = torch.stack(self._held)  # fails if shapes differ
        self._barrier.wait()
        return gathered


class RankThreads:
    """Ranks that meet in call after call of ``run``."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=120)
        held = [torch.empty(0)] * size
        self.ranks = [ThreadRanks(rank, held, self._barrier) for rank in range(size)]

    def run(self, work: Callable[[ThreadRanks], T]) -> list[T]:
        """What ``work`` gives on each rank, side by side. If one fails, the others stop waiting, and it is raised."""

        def attempt(rank: ThreadRanks) -> T | BaseException:
            try:
                return work(rank)
            except BaseException as error:
                self._barrier.abort()
                return error

        with ThreadPoolExecutor(len(self.ranks)) as threads:
            results = list(threads.map(attempt, self.ranks))
        failures = [result for result in results if isinstance(result, BaseException)]
        causes = [failure for failure in failures if not isinstance(failure, threading.BrokenBarrierError)]
        for failure in (*causes, *failures):
            raise failure
        return [result for result in results if not isinstance(result, BaseException)]


def on_ranks(size: int, work: Callable[[Collective], T]) -> list[T]:
    """One call of ``RankThreads.run``."""
    return RankThreads(size).run(work)


class Computed:
    def __init__(self, known: StepResult) -> None:
        self._known = known

    def result(self) -> StepResult:
        return self._known


class ThreadsExecutor(InProcessExecutor):
    """As an executor in process, to the engine: rank 0's. ``launch`` runs the step on all, each with a copy of its own:
    two threads must not compute one mask at a time."""

    def __init__(self, threads: RankThreads, executors: list[InProcessExecutor], num_remembered: int) -> None:
        super().__init__(executors[0].runner, executors[0].drafter)
        self._threads, self._executors = threads, executors
        self._encoder = StepEncoder(num_remembered)
        self._decoders = [StepDecoder(num_remembered) for _ in executors]

    def launch(self, step: ScheduledStep) -> Computed:
        delta = pickle.dumps(self._encoder.encode(step))

        def run(parallel: ThreadRanks) -> StepResult:
            copy = self._decoders[parallel.rank].decode(pickle.loads(delta))
            return self._executors[parallel.rank].launch(copy).result()

        results = self._threads.run(run)
        assert all(result == results[0] for result in results)
        return Computed(results[0])


class ThreadsModels:
    """``LoadedModels`` of two ranks."""

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        self._threads = RankThreads(2)
        self._models = self._threads.run(lambda parallel: LoadedModels(folder, config, parallel))
        self.memory = self._models[0].memory
        self._num_remembered = num_remembered(config)

    def executor(self) -> ThreadsExecutor:
        return ThreadsExecutor(self._threads, [models.executor() for models in self._models], self._num_remembered)
