"""How much of the KV memory in use holds tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from paged_infer.control.scheduler import Scheduler

if TYPE_CHECKING:
    from paged_infer.execution.memory_plan import MemoryPlan

Stats = dict[str, int | float]


@dataclass(slots=True)
class KVUsage:
    """Slots held (space for one token's keys and values each, filled or not) and tokens stored, summed over steps."""

    peak_slots: int = 0
    slot_steps: int = 0
    token_steps: int = 0
    unshared_slot_steps: int = 0

    def record(self, num_slots: int, num_tokens: int, num_unshared_slots: int | None = None) -> None:
        """Add one step. ``num_unshared_slots``: slots that would be held without sharing; None if nothing is shared."""
        self.peak_slots = max(self.peak_slots, num_slots)
        self.slot_steps += num_slots
        self.token_steps += num_tokens
        self.unshared_slot_steps += num_slots if num_unshared_slots is None else num_unshared_slots

    @property
    def fill(self) -> float:
        """Share of the held slots that contain a token, over all steps; 1 if none was ever held."""
        return self.token_steps / self.slot_steps if self.slot_steps else 1.0

    @property
    def sharing_saved(self) -> float:
        """Blocks saved by sharing over blocks without it, over all steps (PagedAttention, Kwon 2023, section 6.3)."""
        return 1 - self.slot_steps / self.unshared_slot_steps if self.unshared_slot_steps else 0.0


def stats_of(scheduler: Scheduler, memory: MemoryPlan, usage: KVUsage) -> Stats:
    """See ``LLMEngine.stats``."""
    pool = scheduler.manager.pool
    return {
        **asdict(scheduler.stats),
        "acceptance_rate": scheduler.stats.acceptance_rate,
        "evictions": pool.num_evictions,
        "num_waiting": len(scheduler.waiting),
        "num_swapped": len(scheduler.swapped),
        "num_running": len(scheduler.running),
        "num_blocks": memory.num_blocks,
        "free_blocks": pool.num_free,
        "peak_kv_bytes": usage.peak_slots * memory.kv_bytes_per_token,
        "kv_fill": usage.fill,
        "sharing_saved": usage.sharing_saved,
    }


def total_stats(each: list[Stats]) -> Stats:
    """Of several engines: the sums of their counts, and the means of their shares."""

    def total(values: list[int | float]) -> int | float:
        return sum(values) if all(isinstance(value, int) for value in values) else sum(values) / len(values)

    return {name: total([stats[name] for stats in each]) for name in each[0]}
