"""EngineConfig: the options of ``LLM(...)`` under vLLM's names, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paged_infer.control.policies import Policy, make_policy
from paged_infer.control.scheduler import PREEMPTION_MODES
from paged_infer.control.speculation import SpeculativeConfig
from paged_infer.values import as_integer, as_number, plain

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine runs. Sizes in tokens unless the name says otherwise.

    Args:
        dtype: of weights, activations and cache. "auto" is float32 on CPU and the checkpoint's own dtype on a GPU.
        load_format: "auto" reads the checkpoint's safetensors; "dummy" reads its config.json alone and makes random
            weights on the device, from ``seed``: for speed, where only the shape matters.
        device: "auto" is "cuda" where there is one, else "cpu".
        attention_backend: how the paged cache is read; see ``kernels.registry``. "auto" takes the fastest there is.
        block_size: tokens in a block of the paged cache.
        num_blocks: blocks in the pool. None: on CPU what ``max_num_seqs`` requests of ``max_model_len`` need, at most
            1 GiB; on a GPU what ``gpu_memory_utilization`` leaves after the weights and one step's activations.
        gpu_memory_utilization: share of the GPU's memory that this process may use.
        max_model_len: longest sequence, prompt and output together. None: the smaller of the model's limit and pool.
        max_num_seqs: most sequences running at once.
        max_num_batched_tokens: most tokens computed in one step; longer prompts are computed in chunks.
        enable_prefix_caching: let requests that begin alike share the blocks of their beginning, computed once.
        preemption_mode: what becomes of a request that has to give back its blocks: "recompute" computes them again,
            "swap" moves them to the CPU's memory and back.
        swap_space: GiB of that memory, at most the pool's size; None: 1, with ``preemption_mode="swap"``.
        scheduling_policy: who gets the next step: "chunked", "prefill_first", "dynamic", "static", or a ``Policy``.
        scheduler_delay_factor: with "prefill_first", how long prompts wait after a step of prompts, so that decodes go
            on: so many times as long as that step took.
        async_scheduling: plan and begin a step while the one before is still being computed, and read that one's tokens
            afterwards. None: on a GPU, where the host's work would else be waited for.
        enforce_eager: launch every kernel of a decode step by itself instead of replaying CUDA graphs. None: graphs on
            a GPU with ``attention_backend="triton"``; False: graphs, or an error where there can be none.
        speculative_config: guess tokens and compute them together, with the same text (in float32):
            ``{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}`` or
            ``{"method": "draft_model", "model": folder, "num_speculative_tokens": 4}``; see ``control.speculation``.
        trace: keep a record of every step in ``LLM.trace``.
        seed: from it come the seeds of requests that bring none.
    """

    dtype: str = "auto"
    load_format: str = "auto"
    device: str = "auto"
    attention_backend: str = "auto"
    block_size: int = 16
    num_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    preemption_mode: str = "recompute"
    swap_space: float | None = None
    scheduling_policy: str | Policy = "chunked"
    scheduler_delay_factor: float = 0.0
    async_scheduling: bool | None = None
    enforce_eager: bool | None = None
    speculative_config: SpeculativeConfig | Mapping[str, Any] | None = None
    trace: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not known; known: {', '.join(DTYPES)}")
        if self.load_format not in LOAD_FORMATS:
            known = ", ".join(LOAD_FORMATS)
            raise ValueError(f"load_format={self.load_format!r} is not known; known: {known}")
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            self._check_at_least_one(name)
        for name in ("num_blocks", "max_model_len"):
            if getattr(self, name) is not None:
                self._check_at_least_one(name)
        if self.preemption_mode not in PREEMPTION_MODES:
            known = ", ".join(PREEMPTION_MODES)
            raise ValueError(f"preemption_mode={self.preemption_mode!r} is not known; known: {known}")
        self._check_swap_space()
        delay_factor = self._number("scheduler_delay_factor", "a finite number >= 0")
        make_policy(self.scheduling_policy, delay_factor)
        if not 0 < self._number("gpu_memory_utilization", "> 0 and <= 1") <= 1:
            raise ValueError(f"gpu_memory_utilization={self.gpu_memory_utilization}: must be > 0 and <= 1")
        for name in ("enable_prefix_caching", "trace"):
            if not isinstance(self._plain(name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be True or False")
        for name in ("async_scheduling", "enforce_eager"):
            if not isinstance(self._plain(name), bool | None):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be True, False or None")
        if self.speculation is not None and self.async_scheduling:
            raise ValueError("async_scheduling=True with speculative_config: drafts follow what has been read")
        seed = as_integer(self.seed)
        if seed is None or not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed={self.seed!r}: must be an integer of 64 bits")
        object.__setattr__(self, "seed", seed)

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """``speculative_config``, checked."""
        options = self.speculative_config
        return None if options is None else SpeculativeConfig.from_options(options)

    def _check_swap_space(self) -> None:
        if self.swap_space is None:
            object.__setattr__(self, "swap_space", 1.0 if self.preemption_mode == "swap" else 0.0)
        elif self._number("swap_space", "a number of GiB >= 0") < 0:
            raise ValueError(f"swap_space={self.swap_space!r}: must be a number of GiB >= 0")
        elif self.swap_space and self.preemption_mode != "swap":
            raise ValueError(f"swap_space={self.swap_space} with preemption_mode='recompute': nothing is swapped")

    def _plain(self, name: str) -> Any:
        """The option converted to a plain Python value, which replaces it."""
        object.__setattr__(self, name, plain(getattr(self, name)))
        return getattr(self, name)

    def _number(self, name: str, limit: str) -> float:
        number = as_number(getattr(self, name))
        if number is None:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be {limit}")
        object.__setattr__(self, name, number)
        return number

    def _check_at_least_one(self, name: str) -> None:
        value = as_integer(getattr(self, name))
        if value is None or value < 1:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be an integer >= 1")
        object.__setattr__(self, name, value)

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """Raises TypeError for an unknown name; the message lists the known ones."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise TypeError(f"unknown option {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**options)
