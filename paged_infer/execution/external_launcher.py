"""One of several ranks that were started together: ``distributed_executor_backend="external_launcher"``.

    torchrun --nproc-per-node 2 my_script.py        every rank runs the same script, with an engine of its own

    rank 0   Scheduler -> step -> shard of the model -> logits -> Sampler -> tokens
    rank 1   Scheduler -> step -> shard of the model -> logits -> Sampler -> tokens      the same, so nothing is sent

A step depends on the requests, the options, the tokens so far and the time. The script gives all ranks the same
requests in the same order. Options are compared at the start. Logits have the same bits on all ranks, and noise depends
on the request alone. The time, of a step and of a request's arrival, is rank 0's, sent before each. So every rank plans
the same step. If a script does something on one rank only (adds or aborts a request), the ranks wait for each other in
different places, which ends with an error after ``distributed_timeout``.

All other times in outputs are from the rank's own clock: on several machines, use the outputs of rank 0.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from paged_infer.config import EngineConfig
from paged_infer.control.step import ScheduledStep, StepResult
from paged_infer.execution.agreement import check_agreement, fingerprint
from paged_infer.execution.errors import EngineDeadError, Failure
from paged_infer.execution.executor import InProcessExecutor, RunningStep
from paged_infer.execution.loaded_models import LoadedModels
from paged_infer.execution.network import address_towards, use_interface_of
from paged_infer.kernels.device import device_of
from paged_infer.model.parallel import TorchCollective

LOAD_S = 1800.0  # by which one rank may take longer to load than another
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # as torchrun sets them


_out_of_step = threading.Event()  # a collective of this process has failed, or was interrupted


def _leave() -> None:
    """End the threads of the process groups before the interpreter ends, which may otherwise abort.

    Not if a collective may still be waiting for another rank: this would wait for its thread, too.
    """
    if dist.is_initialized() and not _out_of_step.is_set():
        dist.destroy_process_group()


class LaunchedRank:
    """This process among those that the launcher has started. The constructor connects to the others.

    Raises:
        ValueError: there is no launcher, it has started another number of ranks, or ranks have other options.
        EngineDeadError: the other ranks cannot be reached.
    """

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        missing = [name for name in VARIABLES if name not in os.environ]
        if missing:
            raise ValueError(
                "distributed_executor_backend='external_launcher': start the script with torchrun --nproc-per-node "
                f"{config.tensor_parallel_size}; {', '.join(missing)} not set"
            )
        size, wanted = int(os.environ["WORLD_SIZE"]), config.tensor_parallel_size
        if size != wanted:
            raise ValueError(f"tensor_parallel_size={wanted}: the launcher has started {size} ranks")
        self.rank = int(os.environ["RANK"])
        device = device_of(config.device)
        if device.type == "cuda":
            local, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= num_gpus:
                raise ValueError(
                    f"tensor_parallel_size={wanted}: rank {self.rank} has no GPU of its own; there are {num_gpus} here"
                )
            config = dataclasses.replace(config, device=f"cuda:{local}")
            torch.cuda.set_device(local)
        self.config = config
        timeout = timedelta(seconds=config.rank_timeout_s)
        with self.one_error():
            if not dist.is_initialized():
                use_interface_of(address_towards(os.environ["MASTER_ADDR"]))
                dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
                atexit.register(_leave)
            self._group = dist.new_group(backend="gloo", timeout=timeout)  # for the time, which is on the host
            self._loading = dist.new_group(backend="gloo", timeout=timedelta(seconds=LOAD_S))
            group = dist.new_group(timeout=timeout)
            fingerprints = self.gather(fingerprint(folder, config))
        check_agreement(fingerprints)
        self.parallel = TorchCollective(group)

    def gather(self, own: Any) -> list[Any]:
        """The objects that the ranks pass, in order of rank (all-gather)."""
        given: list[Any] = [None] * dist.get_world_size(self._loading)
        with self.one_error():
            dist.all_gather_object(given, own, group=self._loading)
        return given

    def now(self) -> float:
        """``time.perf_counter`` of rank 0."""
        shared = torch.tensor([time.perf_counter()], dtype=torch.float64)
        with self.one_error():
            dist.broadcast(shared, 0, group=self._group)
        return shared.item()

    @contextlib.contextmanager
    def one_error(self) -> Iterator[None]:
        """Raise EngineDeadError for any failure, since this rank is then out of step with the others."""
        try:
            yield
        except (ValueError, EngineDeadError):
            raise
        except BaseException as error:
            _out_of_step.set()
            if not isinstance(error, Exception):  # Ctrl-C
                raise
            first = (str(error).splitlines() or ["no message"])[0]
            raise EngineDeadError(f"rank {self.rank}: {type(error).__name__}: {first}") from error


class LaunchedExecutor(InProcessExecutor):
    """Computes this rank's part of each step. After an error, or Ctrl-C, it computes no more."""

    def __init__(self, rank: LaunchedRank, local: InProcessExecutor) -> None:
        super().__init__(local.runner, local.drafter)
        self._rank = rank
        self._error: str | None = None

    def now(self) -> float:
        """See ``LaunchedRank``."""
        return self._rank.now()

    def launch(self, step: ScheduledStep) -> RunningStep:
        """See ``Executor``."""
        self.check_alive()
        with self.in_step():
            return _LaunchedStep(super().launch(step), self)

    def check_alive(self) -> None:
        if self._error is not None:
            raise EngineDeadError(self._error)

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        try:
            with self._rank.one_error():
                yield
        except BaseException as error:
            self._error = str(error) or f"rank {self._rank.rank}: {type(error).__name__}"
            raise


class _LaunchedStep:
    def __init__(self, running: RunningStep, executor: LaunchedExecutor) -> None:
        self._running, self._executor = running, executor

    def result(self) -> StepResult:
        with self._executor.in_step():
            return self._running.result()


def load_launched(folder: Path, config: EngineConfig) -> tuple[LaunchedRank, LoadedModels, int]:
    """This rank, its models, and the number of blocks that every rank has room for.

    Raises:
        ValueError: see ``LaunchedRank`` and ``LoadedModels``; raised on every rank.
        EngineDeadError: see ``LaunchedRank``; or a rank has failed.
    """
    rank, models, failure = LaunchedRank(folder, config), None, None
    try:
        models = LoadedModels(folder, rank.config, rank.parallel)
    except Exception as error:
        failure = error
    given = rank.gather((models.memory.num_blocks if models else 0, failure and Failure.of(failure)))
    for number, (_, report) in enumerate(given):
        if report is not None:
            raise report.as_error(number) from failure
    assert models is not None
    return rank, models, min(num_blocks for num_blocks, _ in given)
