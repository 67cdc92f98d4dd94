"""The options of AsyncLLM beside its engines': the same names in the same order, refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from paged_infer import AsyncLLM
from paged_infer.config import EngineConfig
from paged_infer.engine.serving_options import ServingOptions
from paged_infer.engine.start_engines import divide_devices

DRAFTS = {"method": "draft_model", "model": "none", "num_speculative_tokens": 2}


def test_they_are_the_options_of_async_llm_in_their_order() -> None:
    shown, engines = inspect.signature(AsyncLLM).parameters, {one.name for one in dataclasses.fields(EngineConfig)}
    fields = [one.name for one in dataclasses.fields(ServingOptions)]
    assert fields == [name for name in shown if name != "model" and name not in engines]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_parallel_backend": "ray"}, "data_parallel_size=1: there is no replica to place"),
        ({"data_parallel_backend": "mpi", "data_parallel_size": 2}, "backend='mpi': must be one of mp, ray"),
        ({"disaggregated_prefill": True, "trace": True}, "trace=True: the trace would stay in the engine's process"),
        (
            {"disaggregated_prefill": True, "speculative_config": DRAFTS},
            "the blocks of its cache are not handed over",
        ),
    ],
)  # fmt: skip
def test_those_that_cannot_be_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AsyncLLM("no such model", device="cpu", **options)


def test_replicas_divide_the_devices_in_order() -> None:
    assert divide_devices(["4", "5", "6", "7", "8"], 2, 2) == ["4,5", "6,7"]
    with pytest.raises(ValueError, match=r"data_parallel_size=2 with 2 CUDA device\(s\) each: there are 3 devices"):
        divide_devices(["0", "1", "2"], 2, 2)
