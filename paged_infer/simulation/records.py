"""Records of real servers, and the errors of a prediction."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence as ReadOnlyList
from pathlib import Path
from typing import Any

from paged_infer.simulation.simulate import makespan_s, summary
from paged_infer.simulation.times import TokenTimes

FIELDS = ("input_toks", "output_toks", "queued_ts", "first_token_ts", "last_token_ts")


def read_records(path: Path) -> list[TokenTimes]:
    """The requests of a vLLM run, one JSON object per line, as LLMServingSim's bench writes them.

    Raises:
        ValueError: no such file, or a line without ``FIELDS``; the message names the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"records {path}: {error}") from None
    times = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            num_prompt, num_output, queued_s, first_s, last_s = (float(record[name]) for name in FIELDS)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"records {path}, line {number}: must have {', '.join(FIELDS)}: {error!r}") from None
        has_tokens = 1 <= num_prompt < math.inf and 1 <= num_output < math.inf
        rise = -math.inf < queued_s < first_s <= last_s < math.inf and (num_output == 1 or first_s < last_s)
        if not (has_tokens and rise):
            found = ", ".join(f"{name}={record[name]}" for name in FIELDS)
            raise ValueError(
                f"records {path}, line {number}: {found}: tokens must be numbers >= 1, and times numbers that rise"
            )
        times.append(TokenTimes(queued_s, int(num_prompt), [first_s, last_s], int(num_output)))
    if not times:
        raise ValueError(f"records {path}: has no requests")
    return times


def errors(predicted: ReadOnlyList[TokenTimes], measured: ReadOnlyList[TokenTimes]) -> dict[str, Any]:
    """predicted / measured - 1: of the makespan, and of each of ``summary``'s numbers.

    Raises:
        ValueError: the records are of other requests: their number or their lengths differ.
    """
    lengths = [sorted((one.num_prompt, one.num_tokens) for one in times) for times in (predicted, measured)]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"the records are of {len(measured)} requests with {sum(one.num_tokens for one in measured)} output "
            f"tokens, the workload has {len(predicted)} with {sum(one.num_tokens for one in predicted)}, or their "
            "lengths differ: not the same workload"
        )
    ours, theirs = summary(predicted), summary(measured)
    found: dict[str, Any] = {"makespan": makespan_s(predicted) / makespan_s(measured) - 1}
    for name, numbers in ours.items():
        found[name] = {part: value / theirs[name][part] - 1 for part, value in numbers.items()}
    return found
