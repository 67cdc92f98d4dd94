"""The model in actors of a Ray cluster, one per rank, on one machine or many: ``distributed_executor_backend="ray"``.

A placement group holds a GPU (or a core) for each rank, close together if possible. The ranks meet at a store on rank
0's machine. Every machine needs the model under the same path. A rank that dies ends the calls that wait for it; one
that hangs makes another wait in a collective, which ends after ``distributed_timeout``. An idle engine does not watch
its ranks.

Without ``RAY_ADDRESS``, a cluster that ``ray.init`` of the caller has joined, or one that ``ray start`` has started on
this machine, Ray starts one here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Sequence as ReadOnlyList
from dataclasses import replace
from typing import Any

from paged_infer.control.step import StepResult
from paged_infer.execution.errors import EngineDeadError, Failure
from paged_infer.execution.network import use_interface_of
from paged_infer.execution.rank_executor import RankExecutor
from paged_infer.execution.step_delta import Delta
from paged_infer.execution.worker import Setup, Worker, open_store
from paged_infer.model.parallel import Traffic

PLACED_S = 60.0  # for the cluster to find room
GRACE_S = 1.0  # for the other ranks to fail once one has: one that has died is the cause


class RayExecutor(RankExecutor):
    """See ``RankExecutor``. Raises ValueError, too, without Ray, its cluster, or room in it."""

    def _start(self, size: int, timeout_s: float) -> RayRanks:
        join_cluster("distributed_executor_backend='ray'", include_dashboard=False, logging_level="ERROR")
        return RayRanks(size, timeout_s, has_gpus=self.device.type == "cuda")


def join_cluster(option: str, *, log_to_driver: bool = False, **settings: Any) -> None:
    """``ray.init(**settings)``, unless this process has joined a cluster already. Sends no usage statistics.

    Raises:
        ValueError: Ray is missing, or its cluster cannot be reached; the message names ``option`` and the address.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError(f"{option} needs Ray: pip install 'paged-infer[ray]'") from None
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    try:
        ray.init(log_to_driver=log_to_driver, **settings)
    except ConnectionError as error:
        where = f"RAY_ADDRESS={address}: " if address else ""
        raise ValueError(f"{option}: {where}{error}") from None


class RayWorker(Worker):
    """A rank, as an actor."""

    def prepare(self, setup: Setup) -> dict[str, str]:
        import ray

        use_interface_of(ray.util.get_node_ip_address())
        return super().prepare(setup)

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

    def __init__(self, index: int, ranks: RayRanks, launched: list[Any]) -> None:
        self._index, self._ranks, self._launched = index, ranks, launched

    def request(self) -> None:
        self._result = self._ranks.actors[0].result.remote(self._index)

    def wait(self) -> None:
        import ray

        waiting = [self._result, *self._launched]
        while self._result in waiting:
            (first,), waiting = ray.wait(waiting, num_returns=1)
            if first in self._launched:
                self._ranks.get([first], self._launched)  # raises what the rank has raised

    def result(self) -> StepResult:
        ((_, result, self._ranks.traffic),) = self._ranks.get([self._result], self._launched)
        return result


class RayRanks:
    """Places ``size`` ranks; see ``Ranks``.

    Args:
        timeout_s: how long a rank waits for another.
        has_gpus: each takes one.

    Raises:
        ValueError: the cluster has no room for them.
    """

    def __init__(self, size: int, timeout_s: float, has_gpus: bool) -> None:
        from ray.util.placement_group import placement_group

        self.is_loading = True
        self.traffic = Traffic()
        self.actors: list[Any] = []
        self._error: Exception | None = None
        self._is_closed = False
        needs = {"CPU": 1.0, **({"GPU": 1.0} if has_gpus else {})}
        self._group = placement_group([needs] * size, strategy="PACK")
        try:
            self._place(size, needs)
            (self.store,) = self.get([self.actors[0].open_store.remote(timeout_s)])
        except BaseException:
            self.close()
            raise

    def _place(self, size: int, needs: dict[str, float]) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        if not self._group.wait(PLACED_S):
            raise ValueError(
                f"tensor_parallel_size={size}: the Ray cluster has no room for {size} times {needs}; it has "
                f"{ray.cluster_resources()}"
            )
        actor_class = ray.remote(RayWorker)
        for rank in range(size):
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
            options = {"num_cpus": needs["CPU"], "num_gpus": needs.get("GPU", 0), "scheduling_strategy": place}
            self.actors.append(actor_class.options(**options).remote())

    @property
    def pids(self) -> list[int]:
        """See ``Ranks``."""
        return self.call("pid", [()] * len(self.actors))

    def gpu_of(self, rank: int) -> int:
        """Ray shows each actor only its own GPU."""
        return 0

    def call(self, name: str, arguments: ReadOnlyList[tuple[Any, ...]]) -> list[Any]:
        """See ``Ranks``."""
        pairs = zip(self.actors, arguments, strict=True)
        return self.get([getattr(actor, name).remote(*own) for actor, own in pairs])

    def launch(self, index: int, delta: Delta) -> RayStep:
        """See ``Ranks``."""
        return RayStep(index, self, [actor.launch.remote(delta) for actor in self.actors])

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
        return replace(Failure.of(cause), is_input=isinstance(cause, ValueError) and self.is_loading).as_error()

    def check_alive(self) -> None:
        """See ``Ranks``."""
        if self._error is not None:
            raise EngineDeadError(*self._error.args)
        if self._is_closed:
            raise EngineDeadError("the engine has been shut down")

    def on_death(self, callback: Callable[[], None]) -> None:
        """Does nothing: a rank that dies is noticed in the next step."""

    def close(self) -> None:
        """See ``Ranks``."""
        import ray
        from ray.util.placement_group import remove_placement_group

        if self._is_closed or not ray.is_initialized():
            return
        self._is_closed = True
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self._group)
