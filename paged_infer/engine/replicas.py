"""Several engines, each in a process of its own, as one.

A replica whose process ends is replaced while the others continue; its own unfinished requests end with one
EngineDeadError. A replica that has been replaced ``MAX_RESTARTS`` times in a row, without a token in between, is given
up. When all have been given up, every request ends with an EngineDeadError.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paged_infer.control.request import Request
from paged_infer.engine.engine_client import EngineClient, QueueFullError
from paged_infer.engine.engine_process import EngineProcess
from paged_infer.engine.kv_usage import Stats
from paged_infer.engine.output_channel import OutputChannel
from paged_infer.engine.process_messages import EngineInfo
from paged_infer.engine.request_states import StepReport
from paged_infer.engine.routing import PREFIX, Router
from paged_infer.execution.errors import EngineDeadError

if TYPE_CHECKING:
    from paged_infer.engine.engine import LLMEngine

logger = logging.getLogger(__name__)
MAX_RESTARTS = 3
Start = Callable[[int, Callable[[EngineProcess], None]], EngineProcess]


@dataclass(slots=True, eq=False)
class _Replica:
    process: EngineProcess
    num_restarts: int = 0
    num_failures: int = 0  # in a row
    is_restarting: bool = False
    is_given_up: bool = False

    @property
    def status(self) -> str:
        if self.is_given_up:
            return "dead"
        return "ready" if self.process.is_ready else "starting"


class Replicas(EngineClient):
    """``num_replicas`` engines, and the rule that divides the requests among them.

    Args:
        start: called with the index of a replica and a function that its ``EngineProcess`` calls when it has ended.
        routing: one of ``routing.ROUTINGS``.
        max_num_waiting: the most sequences that may be waiting, in all replicas together.

    Raises:
        ValueError: the engines cannot be built.
        EngineDeadError: a process ended while it loaded.
    """

    def __init__(self, start: Start, num_replicas: int, routing: str, max_num_waiting: int) -> None:
        super().__init__(max_num_waiting)
        self._start = start
        self._lock = threading.RLock()
        self._is_serving = False  # until then, one that ends is an error, and is not replaced
        self._replicas: list[_Replica] = []
        try:
            for index in range(num_replicas):
                self._replicas.append(_Replica(self._started(index)))
            infos = [one.process.wait_until_ready() for one in self._replicas]
        except BaseException:  # Ctrl-C, too
            self.stop()
            raise
        # The pools of GPUs may differ, as their free memory did: what fits the smallest one fits all.
        self.info: EngineInfo = min(infos, key=lambda one: (one.memory.max_model_len, one.memory.num_blocks))
        memory = self.info.memory
        self._router = Router(routing, num_replicas, memory.num_blocks)
        with self._lock:
            self._is_serving = True
            for index, one in enumerate(self._replicas):
                if one.process.gone.is_set():
                    self._on_end(index, one.process)

    def _started(self, index: int) -> EngineProcess:
        process = self._start(index, lambda ended: self._on_end(index, ended))
        process.observers.append(lambda report: self._observe(index, report))
        return process

    # -- requests ---------------------------------------------------------------------------------------------------

    def add(self, request: Request, channel: OutputChannel, streamed: bool) -> None:
        """See ``EngineClient.add``. Also raises QueueFullError if every replica is being restarted."""
        sequence, block_size = request.sequences[0], self.info.memory.block_size
        chain = sequence.hash_chain(block_size) if self._router.routing == PREFIX else []
        with self._lock:
            while True:
                self.check_alive()
                ready = {i: one.process for i, one in enumerate(self._replicas) if one.process.is_ready}
                if not ready:
                    raise QueueFullError("every replica is being restarted")
                loads = {i: process.load for i, process in ready.items()}
                self._check_accepts(sum(load.waiting for load in loads.values()))
                try:
                    return ready[self._router.choose(chain, loads)].add(request, channel, streamed)
                except EngineDeadError:  # it has just ended, and is no longer ready
                    continue

    def abort(self, request_id: str) -> None:
        for one in self._replicas:
            one.process.abort(request_id)

    def call(self, function: Callable[[LLMEngine], Any], replica: int = 0) -> Future[Any]:
        """See ``EngineProcess.call``."""
        return self._replicas[replica].process.call(function)

    # -- the end ----------------------------------------------------------------------------------------------------

    def stop(self, finish: bool = False) -> None:
        with self._lock:
            self._shut_down()
        for one in self._replicas:
            one.process.stop(finish)

    def join(self, timeout_s: float | None = None) -> bool:
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        ended = [
            one.process.join(None if deadline_s is None else max(0.0, deadline_s - time.monotonic()))
            for one in self._replicas
        ]
        return all(ended)

    def abandon(self, reason: str) -> None:
        with self._lock:
            self.is_abandoned = True
            self.error = EngineDeadError(f"the engine has been abandoned: {reason}")
        for one in self._replicas:
            one.process.abandon(reason)

    # -- looking inside ---------------------------------------------------------------------------------------------

    def replica_stats(self) -> list[Stats]:
        """See ``AsyncLLM.replica_stats``. The counts of a replica that is being restarted begin again at 0."""
        processes = [one.process for one in self._replicas]
        return [process.stats() if process.is_ready else dict(self.info.stats) for process in processes]

    def health(self) -> list[dict[str, Any]]:
        return [
            {"replica": index, "status": one.status, "restarts": one.num_restarts}
            for index, one in enumerate(self._replicas)
        ]

    # -- threads of the replicas ------------------------------------------------------------------------------------

    def _observe(self, index: int, report: StepReport) -> None:
        report.replica = index
        if report.grown:
            self._replicas[index].num_failures = 0
        report.notify(self.observers)

    def _on_end(self, index: int, ended: EngineProcess) -> None:
        """Replace the replica, outside of the lock, because a cluster may take minutes to start another."""
        with self._lock:
            replica = self._replicas[index]
            if self.error is not None or not self._is_serving or replica.is_restarting or replica.process is not ended:
                return
            replica.num_failures += 1
            if replica.num_failures > MAX_RESTARTS:
                replica.is_given_up = True
                logger.error("%s; it has been restarted %d times in a row: given up", ended.error, MAX_RESTARTS)
                if all(one.is_given_up for one in self._replicas):
                    self.error = EngineDeadError(f"all replicas have been given up; the last one: {ended.error}")
                return
            self._router.forget(index)
            replica.num_restarts += 1
            replica.is_restarting = True
        logger.error("%s: restarting it", ended.error)
        process: EngineProcess | None = None
        try:
            process = self._started(index)
        except Exception as error:  # on a cluster: no node has room
            logger.error("replica %d could not be restarted: %s", index, error)
        with self._lock:
            replica.is_restarting = False
            replica.process = process or ended
            is_over, again = self.error is not None, replica.process.gone.is_set()
        if is_over:
            replica.process.stop()
        elif again:
            self._on_end(index, replica.process)
