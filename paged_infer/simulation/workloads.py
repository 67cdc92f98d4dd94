"""Requests to serve: when each arrives, and how many tokens its prompt and its output have."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from paged_infer.simulation.lengths import ALPACA, SHAREGPT, Dataset
from paged_infer.simulation.model_free import FIRST_PROMPT
from paged_infer.values import as_integer, as_number

LIKE = {"sharegpt-like": SHAREGPT, "alpaca-like": ALPACA}
NUM_REQUESTS = 300
LATEST_S = 1e9  # 32 years: beyond this, a double cannot resolve the time of a step


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """Arrives at ``at_s`` with ``num_prompt`` tokens, and ends after ``num_output``.

    ``prompt_token_ids``: None for a prompt unlike all others. Requests that begin with the same ids share blocks.
    """

    at_s: float
    num_prompt: int
    num_output: int
    prompt_token_ids: tuple[int, ...] | None = None

    def token_ids(self, index: int) -> list[int]:
        """The ids of the prompt. ``index``: the request's position in the workload."""
        if self.prompt_token_ids is None:
            return [FIRST_PROMPT + index] * self.num_prompt
        return list(self.prompt_token_ids)


Workload = ReadOnlyList[WorkloadRequest]  # in the order of arrival


def dataset_like(dataset: Dataset, num_requests: int, per_s: float, seed: int = 0) -> list[WorkloadRequest]:
    """Requests with lengths like those of a data set, and Poisson arrivals, ``per_s`` per second.

    Raises:
        ValueError: a rate that is not above 0, or too low (``check_rate``).
    """
    check_rate(per_s, num_requests)
    rng = random.Random(f"{dataset.name} {seed}")
    moments = accumulate(rng.expovariate(per_s) for _ in range(num_requests))
    return [WorkloadRequest(at_s, dataset.prompt.draw(rng), dataset.output.draw(rng)) for at_s in moments]


def at_rate(workload: Workload, per_s: float) -> list[WorkloadRequest]:
    """The same requests with the gaps between them scaled, so that ``per_s`` arrive per second on average.

    Raises:
        ValueError: see ``dataset_like``; or all requests arrive at once.
    """
    check_rate(per_s, len(workload))
    if not workload or workload[-1].at_s == 0:
        raise ValueError(f"rate={per_s:g}: the requests all arrive at 0 s, so there are no gaps to scale")
    factor = len(workload) / per_s / workload[-1].at_s
    return [replace(one, at_s=one.at_s * factor) for one in workload]


def check_rate(per_s: float, num_requests: int) -> None:
    """Raises ValueError for a rate that is not above 0, too high, or so low that requests arrive after ``LATEST_S``."""
    if not 0 < per_s <= 1e9:
        raise ValueError(f"rate={per_s:g}: must be a number > 0 of requests a second, and at most 1e+09")
    if num_requests / per_s > LATEST_S:
        raise ValueError(f"rate={per_s:g}: the last of {num_requests} requests would arrive after {LATEST_S:g} s")


def read_workload(path: Path) -> list[WorkloadRequest]:
    """A JSON array of ``{"at": seconds, "in": tokens, "out": tokens, "ids": [token ids of the prompt]}``.

    ``ids`` may be left out. The requests are sorted by ``at``.

    Raises:
        ValueError: no such file, or not in this form; the message names the file, and the entry by its index.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"workload {path}: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"workload {path}: must be a JSON array with at least one request")
    requests = [_request(entry, f"workload {path}, entry {index}") for index, entry in enumerate(entries)]
    return sorted(requests, key=lambda one: one.at_s)


def _request(entry: Any, where: str) -> WorkloadRequest:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be an object with at, in and out, not {entry!r:.80}")
    if missing := [name for name in ("at", "in", "out") if name not in entry]:
        raise ValueError(f"{where}: lacks {', '.join(missing)}")
    at_s = as_number(entry["at"])
    if at_s is None or not 0 <= at_s <= LATEST_S:
        raise ValueError(f"{where}: at={entry['at']!r}: must be a number of seconds >= 0, and at most {LATEST_S:g}")
    num_prompt, num_output = (_count(entry, name, where) for name in ("in", "out"))
    if entry.get("ids") is None:
        return WorkloadRequest(at_s, num_prompt, num_output)
    return WorkloadRequest(at_s, num_prompt, num_output, tuple(_ids(entry["ids"], num_prompt, where)))


def _count(entry: dict[str, Any], name: str, where: str) -> int:
    count = as_integer(entry[name])
    if count is None or count < 1:
        raise ValueError(f"{where}: {name}={entry[name]!r}: must be a number of tokens >= 1")
    return count


def _ids(ids: Any, num_prompt: int, where: str) -> Iterator[int]:
    if not isinstance(ids, list) or len(ids) != num_prompt:
        count = f"{len(ids)} of them" if isinstance(ids, list) else repr(ids)[:80]
        raise ValueError(f"{where}: ids: must be a list of in={num_prompt} token ids, not {count}")
    for one in ids:
        token_id = as_integer(one)
        if token_id is None or not 0 <= token_id < FIRST_PROMPT:
            raise ValueError(f"{where}: ids: {one!r} is not a token id")
        yield token_id
