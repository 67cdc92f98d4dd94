"""An engine's process on any node of a Ray cluster: an actor that connects back to its client by TCP.

    client                                       a node
    ------                                       ------
    listens on a free port    <-- connects --    actor: engine_core.serve_engine
    EngineProcess  -- the same messages as to a process on this machine -->

Ray chooses the node, starts and kills the process; requests and outputs do not pass through it. Everything that
``Replicas`` does about a process that ends holds here too.
"""

from __future__ import annotations

import secrets
import threading
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import ray

from paged_infer.engine.process_messages import EngineSpec
from paged_infer.engine.spawned_process import StartedProcess
from paged_infer.execution.ray_cluster import join_cluster
from paged_infer.kernels.device import device_of

START_S = 300.0  # the time that Ray has to place and start the actor
POLL_S = 0.1


class _Engine:
    """The actor. Ray assigns its devices, and has already set CUDA_VISIBLE_DEVICES."""

    def run(self, address: tuple[str, int], key: bytes, spec: EngineSpec) -> bool:
        with Client(address, authkey=key) as connection:
            from paged_infer.engine.engine_core import serve_engine  # once the client knows it is placed

            return serve_engine(connection, spec)


class RayProcess:
    """The actor as ``EngineProcess`` sees a process."""

    def __init__(self, actor: Any, running: Any) -> None:
        self._actor, self._running = actor, running
        self.exitcode: int | None = None

    def kill(self) -> None:
        ray.kill(self._actor)

    def join(self, timeout: float | None = None) -> None:
        """Wait until ``run`` has ended, then kill the actor, which would otherwise wait for more calls."""
        if ray.wait([self._running], timeout=timeout)[0]:
            try:
                self.exitcode = 0 if ray.get(self._running) else 1
            except ray.exceptions.RayError:  # it has been killed, or its node is lost
                self.exitcode = 1
            self.kill()


def start_on_ray(spec: EngineSpec, name: str) -> StartedProcess:
    """Start an actor on the cluster that RAY_ADDRESS names, on the one that this machine belongs to, or on a new one.

    Raises:
        ValueError: the cluster cannot be reached, or it was not started within ``START_S``; perhaps no node has the CPU
            or the GPUs for it.
    """
    join_cluster("data_parallel_backend='ray'", log_to_driver=True)
    num_gpus = spec.config.tensor_parallel_size if device_of(spec.config.device).type == "cuda" else 0
    key = secrets.token_bytes(32)
    with Listener((ray.util.get_node_ip_address(), 0), authkey=key) as listener:
        actor_class = ray.remote(_Engine).options(num_cpus=1, num_gpus=num_gpus, scheduling_strategy="SPREAD")
        actor = actor_class.remote()
        running = actor.run.remote(listener.address, key, spec)
        connected: Future[Connection] = Future()

        def accept() -> None:
            with suppress(OSError, EOFError):  # the listener is closed
                connected.set_result(listener.accept())

        threading.Thread(target=accept, name=f"{name} connects", daemon=True).start()
        waited_s = 0.0
        while not connected.done() and waited_s < START_S:
            if ray.wait([running], timeout=POLL_S)[0] and not connected.done():
                ray.get(running)  # raises why it has ended
            waited_s += POLL_S
        if not connected.done():
            ray.kill(actor)
            raise ValueError(
                f"{name} was not started within {START_S:.0f} s: does any node of the cluster have a free CPU?"
            )
    return StartedProcess(RayProcess(actor, running), connected.result(), has_own_clock=True)
