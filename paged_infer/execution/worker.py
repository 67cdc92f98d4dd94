"""One rank of several, in a process of its own: loads its part of the model, and runs the steps that it is sent.

    engine                               rank 0 .. N - 1, the same commands in the same order
    prepare(setup)  ------------------>  returns what it was started with, to be compared
    load()          ------------------>  meets the other ranks, loads its shard; returns how large the pool can be
    reserve(num_blocks)  ------------->  makes the pool, equally large on every rank
    launch(step)    ------------------>  runs its part of the step; every rank samples, from the same logits
    result(step)    -- rank 0 alone -->  StepResult

Every rank samples because the next step may need the tokens before the engine has read them (``async_scheduling``), and
because a draft model needs them within a step. The logits have the same bits on every rank, and noise depends only on
the request.

``rank_processes`` runs this module as a program, ``ray_cluster`` makes actors of ``Worker``.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from paged_infer.config import EngineConfig
from paged_infer.control.step import StepResult
from paged_infer.execution.agreement import fingerprint
from paged_infer.execution.errors import Failure
from paged_infer.execution.executor import InProcessExecutor, RunningStep
from paged_infer.execution.loaded_models import LoadedModels
from paged_infer.execution.memory_plan import MemoryPlan
from paged_infer.execution.step_delta import Delta, StepDecoder
from paged_infer.model.parallel import TorchCollective, Traffic

NUM_IN_FLIGHT = 2  # steps whose results the engine may still ask for
BEAT_S = 1.0  # between two heartbeats, at most


@dataclass(frozen=True, slots=True)
class Setup:
    """What a rank is started with.

    Attributes:
        folder: the model's, on the rank's machine.
        store: host and port where the ranks meet.
    """

    folder: Path
    config: EngineConfig
    rank: int
    size: int
    store: tuple[str, int]


@dataclass(slots=True)
class _Computed:
    """A step whose result is known."""

    known: StepResult

    def result(self) -> StepResult:
        return self.known


class Worker:
    """The commands of one rank, in the order in which they are called."""

    def prepare(self, setup: Setup) -> dict[str, str]:
        """Returns what all ranks must have in common."""
        self._setup = setup
        self._decoder = StepDecoder(num_remembered(setup.config))
        self._running: dict[int, RunningStep] = {}  # by index
        return fingerprint(setup.folder, setup.config)

    def load(self) -> MemoryPlan:
        """Meet the other ranks, and load the models.

        Raises:
            ValueError: the model or an option cannot be used.
            RuntimeError: the other ranks cannot be reached.
        """
        setup = self._setup
        host, port = setup.store
        device = torch.device(setup.config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        timeout = timedelta(seconds=setup.config.rank_timeout_s)
        store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=setup.rank, world_size=setup.size, timeout=timeout)
        self._parallel = TorchCollective(dist.new_group(timeout=timeout))
        self._models = LoadedModels(setup.folder, setup.config, self._parallel)
        return self._models.memory

    def reserve(self, num_blocks: int) -> MemoryPlan:
        """Make the pool; returns the final plan."""
        self._executor: InProcessExecutor = self._models.executor(num_blocks)
        return self._models.memory

    def launch(self, delta: Delta) -> None:
        """Run a step; see ``Executor.launch``."""
        step = self._decoder.decode(delta)
        running = self._executor.launch(step)
        if any(sequence.num_prompt_logprobs is not None for sequence in step.sequences):
            running = _Computed(running.result())  # which needs all ranks again, for more logits
        if self._setup.rank == 0:
            self._running[step.index] = running
            if len(self._running) > NUM_IN_FLIGHT:  # the caller was interrupted, and never asked for it
                del self._running[min(self._running)]

    def result(self, index: int) -> tuple[int, StepResult, Traffic]:
        """Index and result of a step, of the last one launched or of the one before; and the traffic so far."""
        return index, self._running.pop(index).result(), self._parallel.traffic


def open_store(host: str, timeout_s: float) -> dist.TCPStore:
    """The store at which ranks meet, on a free port of this address only."""
    listener = socket.create_server((host, 0))
    return dist.TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def num_remembered(config: EngineConfig) -> int:
    """How many sequences an encoder and its decoders remember: more than run at once, as a step may leave some out."""
    return 2 * config.max_num_seqs


class Pulse:
    """Sends heartbeats to the engine, from a thread that ends this process as soon as the engine has ended."""

    def __init__(self, connection: Connection, beat_s: float = BEAT_S) -> None:
        self._connection, self._beat_s = connection, beat_s
        self._lock = threading.Lock()  # messages are sent whole
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._connection.fileno(), 0)  # reports only that the other end has closed
        while not poll.poll(self._beat_s * 1000):
            self.send(None)
        os._exit(1)

    def send(self, report: Any) -> None:
        """Send a report; None is a heartbeat."""
        try:
            with self._lock:
                self._connection.send(report)
        except OSError:  # the engine has ended
            os._exit(1)


def run(worker: Worker, control: Connection, pulse: Pulse) -> None:
    """Run commands until the engine closes ``control``. An error ends the process: other ranks may wait for it."""
    while True:
        try:
            name, arguments = control.recv()
        except (EOFError, OSError):
            return
        try:
            answer = getattr(worker, name)(*arguments)
        except Exception as error:
            pulse.send(Failure.of(error))
            os._exit(1)
        if name != "launch":
            try:
                control.send(answer)
            except OSError:
                return


def main(worker: Worker) -> NoReturn:
    """The program of a rank. Its arguments: the descriptors of its two sockets, and the seconds between heartbeats."""
    control, pulse = (Connection(int(number)) for number in sys.argv[1:3])
    run(worker, control, Pulse(pulse, float(sys.argv[3])))
    os._exit(0)  # without waiting for libraries that wait for other ranks


if __name__ == "__main__":
    # Pickles name the classes of this module, not those of __main__, which no other process would find.
    from paged_infer.execution import worker

    worker.main(worker.Worker())
