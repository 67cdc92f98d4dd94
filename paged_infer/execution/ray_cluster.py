"""The model in actors of a Ray cluster, one per rank, on one machine or many: ``distributed_executor_backend="ray"``.

    engine's process      Scheduler -- delta of a step -->  rank 0, an actor      a placement group: a GPU (or a core)
                                                            rank 1, an actor      for each, close together if possible
                                    <-- StepResult -------  rank 0

The actors run the same ``Worker`` as "mp", and meet at a store on rank 0's machine. Every machine needs the model under
the same path. If a rank dies, the calls that wait for it end. If one hangs, another waits for it in a collective, which
ends after ``distributed_timeout``. An idle engine does not watch its ranks.

If neither ``RAY_ADDRESS`` nor an earlier ``ray.init`` of the caller gives a cluster, Ray starts one on this machine.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from collections.abc import Sequence as ReadOnlyList
from dataclasses import replace
from pathlib import Path
from typing import Any

from paged_infer.config import EngineConfig
from paged_infer.control.step import ScheduledStep, StepResult
from paged_infer.execution.agreement import check_agreement
from paged_infer.execution.errors import EngineDeadError, Failure
from paged_infer.execution.memory_plan import MemoryPlan
from paged_infer.execution.multiprocess import device_of_ranks, rank_config
from paged_infer.execution.step_delta import StepEncoder
from paged_infer.execution.worker import Setup, Worker, num_remembered, open_store

PLACED_S = 60.0  # for the cluster to find room
GRACE_S = 1.0  # for the other ranks to fail once one has: one that has died is the cause


class RayWorker(Worker):
    """A rank, as an actor."""

    def open_store(self, timeout_s: float) -> tuple[str, int]:
        """Open the store at which the ranks meet, on this machine. Returns its host and port."""
        import ray

        host = ray.util.get_node_ip_address()
        self._store = open_store(host, timeout_s)
        return host, self._store.port

    def pid(self) -> int:
        """This process's id."""
        return os.getpid()


class RayStep:
    """A step that the actors compute; see ``RemoteStep``."""

    def __init__(self, index: int, executor: RayExecutor, launched: list[Any]) -> None:
        self._index, self._executor, self._launched = index, executor, launched

    def request(self) -> None:
        self._result = self._executor.actors[0].result.remote(self._index)

    def wait(self) -> None:
        import ray

        waiting = [self._result, *self._launched]
        while self._result in waiting:
            (first,), waiting = ray.wait(waiting, num_returns=1)
            if first in self._launched:
                self._executor.get([first], self._launched)  # raises what the rank has raised

    def result(self) -> StepResult:
        (answer,) = self._executor.get([self._result], self._launched)
        return answer[1]


class RayExecutor:
    """Runs ``tensor_parallel_size`` ranks in actors; otherwise like ``MultiprocessExecutor``.

    Raises:
        ValueError: Ray is not installed, the cluster has no room, or the model or an option cannot be used.
        EngineDeadError: a rank ended while it loaded.
    """

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        try:
            import ray
        except ModuleNotFoundError:
            raise ValueError("distributed_executor_backend='ray' needs Ray: pip install 'paged-infer[ray]'") from None
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage statistics
            ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        self.device = device_of_ranks(config)
        self._encoder = StepEncoder(num_remembered(config))
        self._error: Exception | None = None
        self._is_loading = True
        size, timeout_s = config.tensor_parallel_size, config.rank_timeout_s
        self._group, self.actors = place(size, self.device.type == "cuda")
        self._finalizer = weakref.finalize(self, _end, self._group, self.actors)
        own = rank_config(config, self.device, 0)  # Ray shows each actor only its own GPU, as number 0
        try:
            (store,) = self.get([self.actors[0].open_store.remote(timeout_s)])
            setups = [Setup(folder.absolute(), own, rank, size, store, timeout_s) for rank in range(size)]
            pairs = zip(self.actors, setups, strict=True)
            check_agreement(self.get([actor.prepare.remote(setup) for actor, setup in pairs]))
            plans: list[MemoryPlan] = self.get([actor.load.remote() for actor in self.actors])
        except BaseException:
            self.close()
            raise
        self.memory = min(plans, key=lambda plan: plan.num_blocks)

    def reserve(self) -> None:
        """See ``MultiprocessExecutor``."""
        self.memory = self.get([actor.reserve.remote(self.memory.num_blocks) for actor in self.actors])[0]
        self._is_loading = False

    def now(self) -> float:
        """The time of this process, the only one that plans."""
        return time.perf_counter()

    def launch(self, step: ScheduledStep) -> RayStep:
        """See ``Executor``."""
        self.check_alive()
        delta = self._encoder.encode(step)
        return RayStep(step.index, self, [actor.launch.remote(delta) for actor in self.actors])

    def get(self, references: list[Any], others: ReadOnlyList[Any] = ()) -> list[Any]:
        """The answers. A rank's first error ends all ranks. ``others``: further calls, which may show its cause."""
        import ray

        waiting = list(references)
        try:
            while waiting:
                (first,), waiting = ray.wait(waiting, num_returns=1)
                ray.get(first)
            return ray.get(references)
        except ray.exceptions.RayError as error:
            self._error = self._first_cause(error, [*dict.fromkeys([*references, *others])])
        self.close()
        raise type(self._error)(*self._error.args)

    def _first_cause(self, error: Exception, references: list[Any]) -> Exception:
        """When one rank ends, the others fail, too. A rank that has died is the cause."""
        import ray

        ended, _ = ray.wait(references, num_returns=len(references), timeout=GRACE_S)
        errors = [error]
        for reference in ended:
            try:
                ray.get(reference)
            except ray.exceptions.RayError as other:
                errors.append(other)
        for one in errors:
            if isinstance(one, ray.exceptions.RayActorError):
                return EngineDeadError(f"a rank has ended: {' '.join(str(one).split())}")
        cause = getattr(error, "cause", None) or error
        return replace(Failure.of(cause), is_input=isinstance(cause, ValueError) and self._is_loading).as_error()

    def check_alive(self) -> None:
        if self._error is not None:
            raise EngineDeadError(*self._error.args)
        if not self._finalizer.alive:
            raise EngineDeadError("the engine has been shut down")

    def on_death(self, callback: Callable[[], None]) -> None:
        """Does nothing: a rank that dies is noticed in the next step."""

    def close(self) -> None:
        self._finalizer()


def place(size: int, has_gpus: bool) -> tuple[Any, list[Any]]:
    """A placement group and its actors. Raises ValueError if the cluster has no room for them."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    needs = {"CPU": 1.0, **({"GPU": 1.0} if has_gpus else {})}
    group = placement_group([needs] * size, strategy="PACK")
    if not group.wait(PLACED_S):
        remove_placement_group(group)
        raise ValueError(
            f"tensor_parallel_size={size}: the Ray cluster has no room for {size} times {needs}; it has "
            f"{ray.cluster_resources()}"
        )
    actor_class = ray.remote(RayWorker)
    return group, [
        actor_class.options(
            num_cpus=1,
            num_gpus=1 if has_gpus else 0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
        ).remote()
        for rank in range(size)
    ]


def _end(group: Any, actors: list[Any]) -> None:
    import ray
    from ray.util.placement_group import remove_placement_group

    if ray.is_initialized():
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)
