"""The PagedAttention paper's Figures 2 and 15, reproduced by running the control plane: what KV memory holds."""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass
from statistics import mean

from paged_infer.bench.report import JsonReport
from paged_infer.bench.scheduling.reservations import RESERVATIONS, MemoryUse, reserve_contiguously
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.step import ScheduledStep
from paged_infer.simulation.lengths import ALPACA, MAX_MODEL_LEN, SHAREGPT, Dataset, RequestLengths
from paged_infer.simulation.model_free import RequestFactory, carry_out

# 12 GiB for the KV cache of OPT-13B (the paper's Table 1) at 2 x 40 layers x 5120 x 2 bytes = 800 KiB a token.
PAPER_NUM_SLOTS = 15_728
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NUM_SAMPLES = (2, 4, 6)

# Kwon et al., SOSP 2023. Figure 2, "during the experiment in section 6.2" (basic sampling); shares of the KV memory.
PAPER_SHARES = {
    "max": {"tokens": 0.204, "reserved": 0.133, "internal": 0.573, "external": 0.089},
    "pow2": {"tokens": 0.268, "reserved": 0.179, "internal": 0.136, "external": 0.416},
    "oracle": {"tokens": 0.382, "reserved": 0.252, "internal": 0.0, "external": 0.366},
    "paged": {"tokens": 0.963, "reserved": 0.0, "internal": 0.0, "external": 0.037},  # one number printed: 96.3 %
}
PAPER_RUNNING = {"max": 7.00, "pow2": 9.81, "oracle": 13.62, "paged": 30.42}  # Figure 13a, requests at once
# Figure 15a, and for ShareGPT the ends of the range that section 6.3 gives: blocks saved by n samples.
PAPER_SAVED = {"Alpaca-like": {2: 0.0609, 4: 0.0853, 6: 0.0979}, "ShareGPT-like": {2: 0.162, 6: 0.305}}


@dataclass(frozen=True, slots=True)
class StrategyReport:
    """One way to allocate memory. Shares of the whole memory add up to 1; ``fill`` is of what is in use."""

    name: str
    tokens: float
    reserved: float
    internal: float
    external: float
    fill: float
    mean_running: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class DatasetReport:
    name: str
    num_requests: int
    mean_prompt: float
    mean_output: float
    strategies: list[StrategyReport]
    fill_by_block_size: dict[int, float]  # share of the slots in use that hold a token, paged

    def __getitem__(self, name: str) -> StrategyReport:
        return next(strategy for strategy in self.strategies if strategy.name == name)


@dataclass(frozen=True, slots=True)
class SharingReport:
    """Blocks saved, as a share of those that tables without sharing would hold."""

    dataset: str
    kind: str
    width: int  # samples of a request
    saved: float


@dataclass(frozen=True, slots=True)
class MemoryReport(JsonReport):
    num_slots: int
    block_size: int
    num_output_tokens: int  # about so many drawn by the requests of each data set
    seed: int
    datasets: list[DatasetReport]
    sharing: list[SharingReport]


class PagedRun:
    """Requests that all wait from the start, through the real Scheduler and BlockManager; memory is the limit.

    A step is measured as by ``reserve_contiguously``: while a request waits, once half have ended.
    """

    def __init__(self, requests: ReadOnlyList[RequestLengths], num_slots: int, block_size: int) -> None:
        self.num_slots = num_slots
        self.manager = BlockManager(num_slots // block_size, block_size)
        self.scheduler = Scheduler(self.manager, max_num_seqs=num_slots, max_num_batched_tokens=MAX_MODEL_LEN)
        self.use = MemoryUse()
        self.table_blocks = 0  # of all tables, summed over the measured steps: the blocks without sharing
        self.held_blocks = 0
        factory = RequestFactory(MAX_MODEL_LEN)
        for request in requests:
            self.scheduler.add(factory.request(request))
        num_ended, num_to_end = 0, sum(request.num_samples for request in requests) / 2
        while self.scheduler.waiting:
            step = self.scheduler.schedule()
            if not step.sequences:
                raise ValueError(f"a request needs more than all {self.manager.pool.num_blocks} blocks")
            if self.scheduler.waiting and num_ended >= num_to_end:
                self._measure(step)
            num_ended += sum(one.is_finished for one in carry_out(self.scheduler, step))
        self.use["preemptions"] = self.scheduler.stats.preemptions
        if not self.use["steps"]:
            raise ValueError(
                f"{len(requests)} requests are too few: none waits for {num_slots} slots any more when half have ended"
            )

    def _measure(self, step: ScheduledStep) -> None:
        manager, running = self.manager, self.scheduler.running
        stored = {sequence.sequence_id: sequence.num_computed_tokens for sequence in running}
        stored.update((one.sequence_id, one.num_computed_tokens + one.num_tokens) for one in step.sequences)
        held = manager.pool.num_used * manager.block_size
        tokens = self.scheduler.num_stored_tokens(step)
        reserved = 0
        for sequence in running:
            num_stored, table = stored[sequence.sequence_id], manager.table(sequence.sequence_id)
            self.table_blocks += len(table)
            reserved += min(len(table) * manager.block_size, sequence.max_total_tokens - 1) - num_stored
        reserved = min(reserved, held - tokens)  # forks of one prompt share the slots that each will fill
        self.held_blocks += manager.pool.num_used
        self.use.update(
            steps=1,
            slots=self.num_slots,
            tokens=tokens,
            reserved=reserved,
            internal=held - tokens - reserved,
            held=held,
            sequences=len(running),
        )


def measure_strategies(requests: ReadOnlyList[RequestLengths], num_slots: int, block_size: int) -> list[StrategyReport]:
    """The same queue through each reservation, and paged."""
    uses = {name: reserve_contiguously(requests, num_slots, ask) for name, ask in RESERVATIONS.items()}
    uses["paged"] = PagedRun(requests, num_slots, block_size).use
    return [
        StrategyReport(name, **use.shares, fill=use.fill, mean_running=use.mean_running, preemptions=use["preemptions"])
        for name, use in uses.items()
    ]


def measure_sharing(
    dataset: Dataset, width: int, num_output_tokens: int, num_slots: int, block_size: int, seed: int
) -> SharingReport:
    """``width`` samples of each prompt."""
    run = PagedRun(dataset.draw(num_output_tokens, seed, num_samples=width), num_slots, block_size)
    saved = 1 - run.held_blocks / run.table_blocks
    return SharingReport(dataset.name, "parallel sampling", width, saved)


def measure_memory(
    num_output_tokens: int = 300_000,
    num_slots: int = PAPER_NUM_SLOTS,
    block_size: int = 16,
    seed: int = 0,
    block_sizes: ReadOnlyList[int] = BLOCK_SIZES,
) -> MemoryReport:
    """Everything that ``bench memory`` shows. Nothing is timed: the same seed gives the same report anywhere.

    The sweep over block sizes takes a third of the requests, the sharing a sixth.

    Raises:
        ValueError: too little memory for the longest request, or too few requests to fill it.
    """
    for size in (block_size, *block_sizes):
        if size < 1 or num_slots // size * size < MAX_MODEL_LEN:
            raise ValueError(
                f"{num_slots} slots in blocks of {size}: blocks are >= 1, and a request may need {MAX_MODEL_LEN} slots"
            )
    datasets, sharing = [], []
    for dataset in (SHAREGPT, ALPACA):
        requests = dataset.draw(num_output_tokens, seed)
        some = dataset.draw(num_output_tokens // 3, seed)
        datasets.append(
            DatasetReport(
                dataset.name,
                num_requests=len(requests),
                mean_prompt=mean(request.num_prompt for request in requests),
                mean_output=mean(request.num_output for request in requests),
                strategies=measure_strategies(requests, num_slots, block_size),
                fill_by_block_size={size: PagedRun(some, num_slots, size).use.fill for size in block_sizes},
            )
        )
        few = num_output_tokens // 6
        sharing += [measure_sharing(dataset, n, few, num_slots, block_size, seed) for n in NUM_SAMPLES]
    return MemoryReport(num_slots, block_size, num_output_tokens, seed, datasets, sharing)
