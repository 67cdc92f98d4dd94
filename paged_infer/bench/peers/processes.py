"""Peak memory and processor time, of our processes and of all, as Linux counts them in /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


def peak_bytes(pid: int | str = "self") -> int | None:
    """Peak resident memory; None where the system has no /proc, or the process has ended."""
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


@dataclass(slots=True)
class Others:
    """Cores that other processes kept busy within a block; None until it has ended, or without /proc."""

    cores: float | None = None


@contextmanager
def watch_others() -> Iterator[Others]:
    others, began_s = Others(), time.perf_counter()
    try:
        ours, everyone = _own_ticks(os.getpid()), _all_ticks()
    except OSError:
        yield others
        return
    yield others
    ticks = (_all_ticks() - everyone) - (_own_ticks(os.getpid()) - ours)
    others.cores = max(0.0, ticks / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - began_s))


def _all_ticks() -> int:
    """user, nice, system, irq, softirq and steal, not idle."""
    counts = [int(one) for one in (PROC / "stat").read_text().splitlines()[0].split()[1:]]
    return sum(counts[:3]) + sum(counts[5:8])


def _own_ticks(root: int) -> int:
    """Of a process and its descendants, with those that have ended and were waited for."""
    parents, ticks = {}, {}
    for folder in PROC.glob("[0-9]*"):
        try:
            words = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        pid = int(folder.name)
        parents[pid], ticks[pid] = int(words[1]), sum(map(int, words[11:15]))

    def is_ours(pid: int) -> bool:
        while pid in parents and pid != root:
            pid = parents[pid]
        return pid == root

    return sum(count for pid, count in ticks.items() if is_ours(pid))
