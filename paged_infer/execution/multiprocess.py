"""The model in several processes of this machine, one per rank: ``distributed_executor_backend="mp"``.

The ranks meet at a store on a free port of the loopback interface, where other machines cannot reach them.
"""

from __future__ import annotations

import os
import socket

import torch

from paged_infer.execution.rank_executor import RankExecutor
from paged_infer.execution.rank_processes import RankProcesses


class MultiprocessExecutor(RankExecutor):
    """See ``RankExecutor``. Raises ValueError, too, if there are more ranks than GPUs."""

    def _start(self, size: int, timeout_s: float) -> RankProcesses:
        if self.device.type == "cuda" and size > (num_gpus := torch.cuda.device_count()):
            raise ValueError(f"tensor_parallel_size={size}: must be at most the number of GPUs, {num_gpus}")
        return RankProcesses(size, timeout_s, rank_environment(max(1, torch.get_num_threads() // size)))


def rank_environment(num_threads: int) -> dict[str, str]:
    """Environment of ranks on one machine: their number of threads, and only ports on the loopback interface."""
    interfaces = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    network = {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", interfaces[0])} if interfaces else {}
    return {"OMP_NUM_THREADS": str(num_threads), "MKL_NUM_THREADS": str(num_threads), **network}
