"""Which processes run, as Linux lists them."""

from __future__ import annotations

import os
from pathlib import Path


def is_running(pid: int) -> bool:
    """Whether the process runs; one that has ended may not have been waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def children(pid: int | None = None) -> set[int]:
    """Processes that this one, or ``pid``, has started and that have not ended."""
    while True:
        tasks = list(Path(f"/proc/{pid or os.getpid()}/task").iterdir())
        try:
            listed = [(task / "children").read_text() for task in tasks]
        except OSError:  # a thread has ended, and another has its children now
            continue
        return {one for one in map(int, " ".join(listed).split()) if is_running(one)}
