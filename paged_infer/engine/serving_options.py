"""The options of ``AsyncLLM`` beside those of its engines, checked."""

from __future__ import annotations

from dataclasses import dataclass

from paged_infer.config import EngineConfig
from paged_infer.engine.routing import LEAST_LOADED, PREFIX, ROUTINGS
from paged_infer.values import Checked

BACKENDS = ("mp", "ray")


@dataclass(frozen=True, slots=True)
class ServingOptions(Checked):
    """In the order of ``AsyncLLM``, which explains them.

    Raises:
        ValueError: one is not allowed, or not with another; the message names the value and the limit.
    """

    max_num_waiting: int
    step_timeout: float | None
    engine_process: bool
    disaggregated_prefill: bool
    data_parallel_size: int
    data_parallel_backend: str
    data_parallel_routing: str | None

    def __post_init__(self) -> None:
        self._check_integer("max_num_waiting", 1)
        self._check_number("step_timeout", 0, open_low=True, optional=True)
        self._check_integer("data_parallel_size", 1)
        self._check_choice("data_parallel_backend", BACKENDS)
        size, backend, routing = self.data_parallel_size, self.data_parallel_backend, self.data_parallel_routing
        if routing is not None:
            self._check_choice("data_parallel_routing", ROUTINGS)
        if size == 1 and routing is not None:
            raise ValueError(f"data_parallel_routing={routing!r} with data_parallel_size=1: one engine")
        if size == 1 and backend != "mp":
            raise ValueError(
                f"data_parallel_backend={backend!r} with data_parallel_size=1: there is no replica to place"
            )
        if size > 1 and self.disaggregated_prefill:
            raise ValueError(f"disaggregated_prefill=True with data_parallel_size={size}: must be 1")

    @property
    def is_local(self) -> bool:
        """Whether there is one engine, in this process."""
        return self.data_parallel_size == 1 and not self.engine_process and not self.disaggregated_prefill

    @property
    def routing(self) -> str:
        """``data_parallel_routing`` with its default."""
        return self.data_parallel_routing or LEAST_LOADED

    def check_engines(self, config: EngineConfig) -> None:
        """Raises ValueError for options of the engines that are not allowed with these."""
        if config.distributed_executor_backend == "external_launcher":
            raise ValueError(
                "distributed_executor_backend='external_launcher': requests would arrive at only one rank; use LLM, "
                "or another backend"
            )
        if config.trace and not self.is_local:
            raise ValueError("trace=True: the trace would stay in the engine's process; use one engine in this process")
        if self.routing == PREFIX and not config.enable_prefix_caching:
            raise ValueError(
                "data_parallel_routing='prefix' with enable_prefix_caching=False: no prefix would be found"
            )
        if not self.disaggregated_prefill:
            return
        if not config.enable_prefix_caching:
            raise ValueError(
                "disaggregated_prefill=True with enable_prefix_caching=False: blocks are handed over to the prefix "
                "cache"
            )
        if config.tensor_parallel_size > 1:
            raise ValueError(
                f"disaggregated_prefill=True with tensor_parallel_size={config.tensor_parallel_size}: must be 1, "
                "because whole blocks are handed over"
            )
        if config.speculation is not None and config.speculation.method == "draft_model":
            raise ValueError(
                "disaggregated_prefill=True with a draft model: the blocks of its cache are not handed over"
            )
