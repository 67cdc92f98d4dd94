"""What chapter 16 starts in processes of their own. A spawned process imports this file, so all that it needs is here.

Importing it does not import ``course``, nor the package: that would make each process start slower.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import threading
import time
from collections.abc import Sequence as ReadOnlyList
from typing import Any

import torch
import torch.distributed as dist

note = "as in the file"  # the chapter changes it; what does a spawned process see?


def worker(rank: int, size: int, meeting: str, num_floats: ReadOnlyList[int], results: Any) -> None:
    """One rank: meet the others, add up tensors with them, and report."""
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, size)  # a file where the ranks find each other
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    mine = torch.full((4,), float(rank + 1))
    dist.all_reduce(mine)  # in place: every rank has the sum
    times = {n: all_reduce_s(torch.ones(n)) for n in num_floats}
    threads = [thread.name for thread in threading.enumerate()]
    report = {"pid": os.getpid(), "note": note, "threads": threads, "sum": mine.tolist(), "seconds": times}
    results.put((rank, report))
    dist.barrier()
    dist.destroy_process_group()


def all_reduce_s(x: torch.Tensor, rounds: int = 20) -> float:
    """The shortest of several all-reduces of x, in seconds: others at work on the machine only add to it."""
    seconds = []
    for _ in range(rounds):
        began_s = time.perf_counter()
        dist.all_reduce(x)
        seconds.append(time.perf_counter() - began_s)
        x.fill_(1)
    return min(seconds)


def run_ranks(size: int, num_floats: ReadOnlyList[int]) -> list[dict[str, Any]]:
    """Spawn ``size`` workers; the report of each, by rank."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if ("lo" in dict(map(reversed, socket.if_nameindex()))) else "lo0")
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, f"{folder}/meeting", num_floats, results)
        ranks = [spawn.Process(target=worker, args=(rank, *arguments), daemon=True) for rank in range(size)]
        for rank in ranks:
            rank.start()
        reports = dict(results.get(timeout=300) for _ in ranks)
        for rank in ranks:
            rank.join()
    return [reports[rank] for rank in range(size)]
