"""One model on one rank and on two: speed, memory, and what the ranks exchange in a step."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from paged_infer.bench.parallel.report import ParallelReport, RankReport
from paged_infer.bench.peers.processes import peak_bytes
from paged_infer.bench.timing import time_calls
from paged_infer.bench.workloads import Workload, one_request
from paged_infer.cache.none import NoCache
from paged_infer.config import EngineConfig
from paged_infer.execution.multiprocess import MultiprocessExecutor, rank_environment
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.llm import LLM
from paged_infer.model.loading.load import load_decoder
from paged_infer.model.parallel import ALONE, Alone, Collective

DECODES = 64


class RankOfMany(Alone):
    """Counts like the first of ``size`` ranks, without the others: only the shapes of its results are right."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def all_reduce(self, x: Tensor) -> Tensor:
        self.traffic.all_reduces += 1
        self.traffic.num_bytes += x.nbytes
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        self.traffic.all_gathers += 1
        self.traffic.num_bytes += x.nbytes
        return x.expand(self.size, *x.shape)


def weigh_rank(folder: Path, size: int, config: EngineConfig) -> tuple[int, int, int]:
    """Collectives and bytes of a step of one token, and bytes of the weights, on one rank of ``size``."""
    parallel: Collective = ALONE if size == 1 else RankOfMany(size)
    dummy_seed = config.seed if config.load_format == "dummy" else None
    decoder = load_decoder(folder, torch.float32, dummy_seed=dummy_seed, parallel=parallel)
    parallel.traffic.reset()
    step = AttentionMetadata.unpaged(torch.zeros(1, dtype=torch.long))
    decoder.logits(decoder(step.positions, NoCache(decoder.kv_spec()), step))
    weight_bytes = sum(tensor.nbytes for tensor in (*decoder.parameters(), *decoder.buffers()))
    return parallel.traffic.calls, parallel.traffic.num_bytes, weight_bytes


def run_once(llm: LLM, workload: Workload) -> tuple[list[list[int]], float]:
    """Serve all requests at once. Returns their tokens and the seconds it took."""
    began_s = time.perf_counter()
    outputs = llm.generate(workload.prompts, workload.params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs], time.perf_counter() - began_s


def measure_ranks(
    report: ParallelReport, engines: dict[int, LLM], workloads: dict[str, Workload], on_run: Callable[[str], None]
) -> None:
    """Fill in ``report.ranks``. ``engines``, by number of ranks and without a prefix cache, take turns."""
    config = engines[1].engine.model_config
    decode = one_request(config.vocab_size, 16, DECODES, seed=0)
    seconds: dict[tuple[int, str], list[float]] = {}
    for number in range(report.repeats + 1):  # the first warms up
        tokens: dict[str, list[list[int]]] = {}
        for name, workload in {"decode": decode, **workloads}.items():
            for size, llm in engines.items():
                found, run_s = run_once(llm, workload)
                report.has_same_tokens &= tokens.setdefault(name, found) == found
                if number:
                    seconds.setdefault((size, name), []).append(run_s)
            on_run(name)
    num_tokens = {name: sum(one.max_tokens or 0 for one in w.params) for name, w in workloads.items()}
    for size, llm in engines.items():
        rates = {name: n / median(seconds[size, name]) for name, n in num_tokens.items()}
        executor = llm.engine.executor
        pids = executor.pids if isinstance(executor, MultiprocessExecutor) else ["self"]
        peaks = [peak for peak in map(peak_bytes, pids) if peak is not None]
        calls, num_bytes, weight_bytes = weigh_rank(llm.folder, size, llm.engine.config)
        step_s = median(seconds[size, "decode"]) / DECODES
        report.ranks.append(RankReport(size, rates, step_s, calls, num_bytes, weight_bytes, peaks))
    report.num_layers = config.num_layers
    report.sum_s = time_of_sum(config.hidden_size)


def time_of_sum(num_floats: int) -> float:
    """Median seconds of an all-reduce of this many floats between two new processes."""
    spawn = multiprocessing.get_context("spawn")
    results: SimpleQueue[float] = spawn.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"{folder}/meeting"
        ranks = [spawn.Process(target=_sum, args=(rank, meeting, num_floats, results)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    if codes := [rank.exitcode for rank in ranks if rank.exitcode]:
        raise RuntimeError(f"a rank has ended with status {codes}")
    return min(results.get() for _ in ranks)


def _sum(rank: int, meeting: str, num_floats: int, results: SimpleQueue[float]) -> None:
    os.environ |= rank_environment(1)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(meeting, 2), rank=rank, world_size=2)
    x = torch.zeros(num_floats)
    results.put(time_calls(lambda: dist.all_reduce(x), repeats=200, warm_up=20).median_s)
    dist.destroy_process_group()
