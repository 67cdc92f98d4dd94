"""How much faster each optimisation is: a series of engines, each with one optimisation more.

    GPU    every kernel launched by the host, one step at a time -> decode steps as CUDA graphs -> the next step begun
           while the one before runs
    CPU    attention in readable torch -> batched torch -> one pass in C, where there is a compiler -> running ahead,
           which cannot pay where host and device are the same processor, and is shown for that

All of them are options of ``LLM``, so each can be switched off alone.
"""

from __future__ import annotations

import torch

from paged_infer.config import EngineOptions
from paged_infer.kernels.attention_backends import fastest_backend


def engine_options(device: torch.device) -> dict[str, EngineOptions]:
    """The options of the engines by name, from no optimisation to all of them."""
    if device.type == "cuda":
        nothing: EngineOptions = {"attention_backend": "triton", "enforce_eager": True, "async_scheduling": False}
        graphs: EngineOptions = nothing | {"enforce_eager": False}
        return {"eager": nothing, "+ graphs": graphs, "+ ahead": graphs | {"async_scheduling": True}}
    backends = ["torch", "sdpa"] + ["c"] * (fastest_backend(device) == "c")
    found: dict[str, EngineOptions] = {
        name: {"attention_backend": name, "async_scheduling": False} for name in backends
    }
    return found | {"+ ahead": found[backends[-1]] | {"async_scheduling": True}}
