"""EngineConfig: the options of ``LLM(...)`` under vLLM's names, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar, Unpack, cast

from paged_infer.control.policies import Policy, make_policy
from paged_infer.control.reasoning import REASONING_PARSERS
from paged_infer.control.scheduler import PREEMPTION_MODES
from paged_infer.control.speculation import SpeculativeConfig
from paged_infer.suggestions import PLACES, suggests_names, unknown_names
from paged_infer.values import Checked

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")
QUANTIZATIONS = ("w8a16", "w4a16", "w8a8", "gguf")
EXECUTOR_BACKENDS = ("mp", "ray", "external_launcher")
DISTRIBUTED_TIMEOUT_S = 20.0
KV_CACHE_DTYPES = ("auto", "int8", "fp8", "fp8_e5m2")
ASYNC_OPTIONS = (
    "max_num_waiting", "step_timeout", "engine_process", "disaggregated_prefill", "data_parallel_size",
    "data_parallel_backend", "data_parallel_routing",
)  # fmt: skip
"""What ``AsyncLLM`` takes besides; here, because an ``LLM`` that is given one of them names it."""
PLACES["AsyncLLM()"] = ASYNC_OPTIONS


class EngineOptions(TypedDict, total=False):
    """The fields of ``EngineConfig`` as keyword arguments, for type checkers."""

    dtype: str
    load_format: str
    quantization: str | None
    kv_cache_dtype: str
    device: str
    attention_backend: str
    block_size: int
    num_blocks: int | None
    gpu_memory_utilization: float
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int | None
    enable_prefix_caching: bool
    preemption_mode: str
    swap_space: float | None
    scheduling_policy: str | Policy
    scheduler_delay_factor: float
    async_scheduling: bool | None
    enforce_eager: bool | None
    speculative_config: SpeculativeConfig | Mapping[str, Any] | None
    reasoning_parser: str | None
    tensor_parallel_size: int
    distributed_executor_backend: str | None
    distributed_timeout: float | None
    trace: bool
    seed: int


@suggests_names("LLM()", "model")
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(Checked):
    """How an engine runs. The command line takes its options and their help from here.

    Args:
        dtype: "auto", "float32", "bfloat16" or "float16", of weights, activations and KV cache. "auto" is float32 on a
            CPU and the checkpoint's own dtype on a GPU.
        load_format: "auto" reads the checkpoint's safetensors. "dummy" reads only its config.json and makes random
            weights on the device, from ``seed``: for measuring speed, where only the shape matters.
        quantization: quantise the linear layers of a float checkpoint while it is loaded: "w8a16", "w4a16", or "w8a8",
            which also quantises activations in each product. "gguf" keeps the blocks of a GGUF file. A checkpoint whose
            config.json has a quantization_config is read according to that.
        kv_cache_dtype: how keys and values are stored. "auto" is ``dtype``; "int8", "fp8" (e4m3) and "fp8_e5m2" take 8
            bits and a float16 scale for each token and head. Greedy tokens do not depend on chunks, the pool's size,
            sharing or preemption, but are those of this type.
        device: "cpu", "cuda", or "auto", which is "cuda" if there is one.
        attention_backend: how the paged cache is read: "triton", "c", "sdpa", "torch", your own "module:function", or
            "auto" for the fastest one available; see ``kernels.attention_backends``.
        block_size: tokens in a block of the paged cache.
        num_blocks: blocks in the pool. None: on a CPU what ``max_num_seqs`` requests of ``max_model_len`` tokens need,
            at most 1 GiB; on a GPU what ``gpu_memory_utilization`` leaves after weights, a step and graphs.
        gpu_memory_utilization: share of the GPU's memory that this process may use.
        max_model_len: longest sequence in tokens, prompt and output together. None: the smaller of the model's limit
            and the pool.
        max_num_seqs: the most sequences that run at once.
        max_num_batched_tokens: the most tokens computed in one step; longer prompts are computed in chunks. None: 8192
            on a GPU of at least 70 GiB, 2048 elsewhere.
        enable_prefix_caching: let requests with a common prefix share its blocks, computed once.
        preemption_mode: how a preempted request continues: "recompute" computes its blocks again, "swap" moves them to
            CPU memory and back.
        swap_space: GiB of CPU memory for swapping, at most the pool's size. None: 1, with ``preemption_mode="swap"``.
        scheduling_policy: which requests a step computes: "chunked", "prefill_first", "dynamic", "static", "priority"
            (the lowest ``priority`` of a request first), or, in Python, a ``Policy``; see ``control.policies``.
        scheduler_delay_factor: with "prefill_first", prompts wait for this many times the duration of the last step of
            prompts, so that decodes continue.
        async_scheduling: schedule and launch a step while the previous one is still being computed, and read that one's
            tokens afterwards. None: on a GPU, which would otherwise wait for the host.
        enforce_eager: launch every kernel of a decode step separately instead of replaying CUDA graphs. None: graphs on
            a GPU with the "triton" backend. False: graphs, or an error where they cannot be used.
        speculative_config: draft tokens and verify them in one step; the text stays the same (in float32).
            ``{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}`` or
            ``{"method": "draft_model", "model": FOLDER, "num_speculative_tokens": 4}``; see ``control.speculation``.
        reasoning_parser: how the model marks its reasoning, before its answer: "qwen3" or "deepseek_r1", see
            ``control.reasoning``. Structured outputs then apply after the reasoning, and
            ``SamplingParams.thinking_token_budget`` bounds it. None: the whole output is the answer.
        tensor_parallel_size: ranks, each with a part of every matrix and of every token's keys and values. They
            compute each step together; the text stays the same (in float32).
        distributed_executor_backend: where the ranks run. "mp" starts a process for each on this machine; "ray"
            an actor for each, on the machines of a Ray cluster; "external_launcher": ``torchrun`` has started them,
            each with this script. None: "mp" if there are several, otherwise the model runs in this process.
        distributed_timeout: seconds that a rank may go without a heartbeat, or make another rank wait, before the
            engine ends with an error. None: 20.
        trace: keep a record of every step, in ``LLM.trace``; it grows.
        seed: requests without a seed derive theirs from this one.

    Raises:
        ValueError: a value is out of range or of the wrong type; the message names the option, the value and the limit.
    """

    dtype: str = "auto"
    load_format: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    device: str = "auto"
    attention_backend: str = "auto"
    block_size: int = 16
    num_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    preemption_mode: str = "recompute"
    swap_space: float | None = None
    scheduling_policy: str | Policy = "chunked"
    scheduler_delay_factor: float = 0.0
    async_scheduling: bool | None = None
    enforce_eager: bool | None = None
    speculative_config: SpeculativeConfig | Mapping[str, Any] | None = None
    reasoning_parser: str | None = None
    tensor_parallel_size: int = 1
    distributed_executor_backend: str | None = None
    distributed_timeout: float | None = None
    trace: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("dtype", "device"):  # of torch, too
            if type(value := getattr(self, name)).__module__ == "torch":
                self._keep(name, str(value).removeprefix("torch."))
        self._check_choice("dtype", DTYPES)
        self._check_choice("load_format", LOAD_FORMATS)
        self._check_choice("preemption_mode", PREEMPTION_MODES)
        self._check_choice("kv_cache_dtype", KV_CACHE_DTYPES)
        self._check_device_and_backend()
        if self.quantization is not None:
            self._check_choice("quantization", QUANTIZATIONS)
        for name in ("block_size", "max_num_seqs"):
            self._check_integer(name, 1)
        for name in ("num_blocks", "max_model_len", "max_num_batched_tokens"):
            self._check_integer(name, 1, optional=True)
        for name in ("enable_prefix_caching", "trace"):
            self._check_flag(name)
        for name in ("async_scheduling", "enforce_eager"):
            self._check_flag(name, optional=True)
        self._check_number("gpu_memory_utilization", 0, 1, open_low=True)
        self._check_number("swap_space", 0, optional=True)
        if self.swap_space and self.preemption_mode != "swap":
            raise ValueError(f"swap_space={self.swap_space} with preemption_mode='recompute': nothing is swapped")
        self._check_number("scheduler_delay_factor", 0)
        make_policy(self.scheduling_policy, self.scheduler_delay_factor)
        if self.speculative_config is not None:
            self._keep("speculative_config", SpeculativeConfig.from_options(self.speculative_config))
            if self.async_scheduling:
                raise ValueError("async_scheduling=True with speculative_config: drafts need the tokens before them")
        if self.reasoning_parser is not None:
            self._check_choice("reasoning_parser", tuple(REASONING_PARSERS))
        self._check_ranks()
        self._check_integer("seed", -(2**63), 2**63 - 1)

    def _check_device_and_backend(self) -> None:
        if not isinstance(self.device, str):
            raise self._refuse("device", "must be a str: auto, cpu, cuda, or cuda:N for one of several GPUs")
        if callable(self.attention_backend):
            raise self._refuse("attention_backend", "must be a name; @register_attention_backend(NAME) gives it one")
        if not isinstance(self.attention_backend, str):
            raise self._refuse("attention_backend", "must be the name of a backend, or module:function")

    def _check_ranks(self) -> None:
        self._check_integer("tensor_parallel_size", 1)
        if self.distributed_executor_backend is not None:
            self._check_choice("distributed_executor_backend", EXECUTOR_BACKENDS)
        self._check_number("distributed_timeout", 0, optional=True, open_low=True)
        if self.distributed_timeout is not None and self.executor_backend is None:
            raise ValueError(
                f"distributed_timeout={self.distributed_timeout} with tensor_parallel_size=1: there is no other rank"
            )

    @property
    def executor_backend(self) -> str | None:
        """``distributed_executor_backend`` with its default; None: the model runs in this process."""
        default = "mp" if self.tensor_parallel_size > 1 else None
        return self.distributed_executor_backend or default

    @property
    def rank_timeout_s(self) -> float:
        """``distributed_timeout`` with its default."""
        return DISTRIBUTED_TIMEOUT_S if self.distributed_timeout is None else self.distributed_timeout

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """``speculative_config`` as an object."""
        assert not isinstance(self.speculative_config, Mapping)
        return self.speculative_config

    @property
    def options(self) -> EngineOptions:
        """The options that differ from their defaults, as keyword arguments of ``LLM``."""
        values = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        return cast(EngineOptions, {field.name: value for field, value in values if value != field.default})

    @classmethod
    def from_options(cls, **options: Unpack[EngineOptions]) -> EngineConfig:
        """Raises TypeError for an unknown option; the message lists the known ones."""
        check_names(options)
        return cls(**options)


def check_names(options: Iterable[str], known: Collection[str] = ()) -> None:
    """Raises TypeError unless each is one of ``known``, or, if that is empty, a field of ``EngineConfig``."""
    known = known or [field.name for field in dataclasses.fields(EngineConfig)]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(unknown_names("unknown option", unknown, known))


F = TypeVar("F", bound=Callable[..., Any])


def lists_options(function: F) -> F:
    """Replace ``**options`` by the fields of ``EngineConfig`` in the signature that ``help()`` and completion show."""
    signature = inspect.signature(function)
    kind = inspect.Parameter.KEYWORD_ONLY
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [one.replace(kind=kind) for one in inspect.signature(EngineConfig).parameters.values()]
    function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return function
