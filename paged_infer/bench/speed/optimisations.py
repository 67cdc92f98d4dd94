"""How much faster each optimisation is: a series of engines, each with one optimisation more.

    GPU    every kernel launched by the host, one step at a time -> decode steps as CUDA graphs -> the next step begun
           while the one before runs -> more tokens of prompts in a step
    CPU    attention in readable torch -> batched torch -> one pass in C, where there is a compiler -> running ahead,
           which cannot pay where host and device are the same processor, and is shown for that

All of them are options of ``LLM``, so each can be switched off alone.
"""

from __future__ import annotations

import torch

from paged_infer.config import EngineOptions
from paged_infer.kernels.attention_backends import fastest_backend

FEW_TOKENS, MANY_TOKENS = 2048, 8192  # of a step


def engine_options(device: torch.device) -> dict[str, EngineOptions]:
    """The options of the engines by name, from no optimisation to all of them."""
    alike: EngineOptions = {"async_scheduling": False, "max_num_batched_tokens": FEW_TOKENS}
    if device.type == "cuda":
        nothing: EngineOptions = alike | {"attention_backend": "triton", "enforce_eager": True}
        graphs: EngineOptions = nothing | {"enforce_eager": False}
        ahead: EngineOptions = graphs | {"async_scheduling": True}
        large: EngineOptions = ahead | {"max_num_batched_tokens": MANY_TOKENS}
        return {"eager": nothing, "+ graphs": graphs, "+ ahead": ahead, f"+ {MANY_TOKENS:,} tokens": large}
    backends = ["torch", "sdpa"] + ["c"] * (fastest_backend(device) == "c")
    found: dict[str, EngineOptions] = {name: alike | {"attention_backend": name} for name in backends}
    return found | {"+ ahead": found[backends[-1]] | {"async_scheduling": True}}
