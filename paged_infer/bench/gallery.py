"""``python -m paged_infer.bench.gallery [FOLDER]``: pictures of small runs of the storyteller.

Pictures of benches that FOLDER has already are drawn again from the numbers beside them, as after a change of style.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paged_infer import LLM, SamplingParams
from paged_infer.bench.kernels.attention_traffic import TrafficReport, attention_traffic_figure
from paged_infer.bench.parallel.report import ParallelReport, parallel_figure
from paged_infer.bench.quantisation.report import QuantisationReport, quantisation_figure
from paged_infer.bench.report import JsonReport
from paged_infer.bench.scheduling.arrival import ArrivalReport
from paged_infer.bench.scheduling.memory_figure import fragmentation_figure
from paged_infer.bench.scheduling.memory_waste import MemoryReport
from paged_infer.bench.scheduling.policies import PoliciesReport
from paged_infer.bench.scheduling.policies_figure import arrival_figure, policies_figure
from paged_infer.bench.simulation.figure import simulate_figure
from paged_infer.bench.simulation.prediction import SimulateReport
from paged_infer.bench.speed.ladder import Ladder
from paged_infer.bench.speed.measure import SpeedReport
from paged_infer.bench.speed.speed_figure import speed_figure
from paged_infer.bench.workloads import story_beginnings
from paged_infer.cli_options import RESULTS
from paged_infer.control.trace import Trace
from paged_infer.viz.pool_map import pool_map_figure
from paged_infer.viz.style import Picture
from paged_infer.viz.timeline import timeline_figure

OUTPUT_LENGTHS = (24, 38, 30, 12, 26, 18, 34, 22)


def crowded_trace() -> Trace:
    """Eight stories in a pool that is too small for them: chunked prompts, a queue, preemption by swapping."""
    llm = LLM(
        trace=True, num_blocks=20, block_size=8, max_num_seqs=6, max_num_batched_tokens=48, preemption_mode="swap"
    )
    prompts = story_beginnings(llm, num_requests=len(OUTPUT_LENGTHS), max_tokens=1, seed=0).prompts
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in OUTPUT_LENGTHS]
    llm.generate([prompt[:40] for prompt in prompts], params, use_tqdm=False)
    assert llm.trace is not None
    return llm.trace


def shared_trace() -> Trace:
    """Six stories with a shared prefix, two of them with two samples, arriving one after the other."""
    llm = LLM(trace=True, num_blocks=40, block_size=8, max_num_seqs=8, max_num_batched_tokens=64)
    prompts = story_beginnings(llm, num_requests=6, max_tokens=1, seed=0).prompts
    for index, (prompt, length) in enumerate(zip(prompts, (5, 9, 14, 3, 20, 7), strict=True)):
        n = 2 if index in (1, 4) else 1
        params = SamplingParams(n=n, temperature=0.8, seed=index, max_tokens=20, ignore_eos=True)
        llm.engine.add_request(str(index), prompts[0][:33] + prompt[:length], params)
        llm.engine.step()
    while llm.engine.has_unfinished_requests:
        llm.engine.step()
    assert llm.trace is not None
    return llm.trace


def save_gallery(folder: Path = RESULTS) -> list[Path]:
    """Write timeline.png and pool_map.png, which are alike on all machines; returns their paths."""
    pictures = {"timeline": timeline_figure(crowded_trace()), "pool_map": pool_map_figure(shared_trace(), 12)}
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in pictures]


DRAWN: dict[str, tuple[type[JsonReport], Callable[[Any], Picture]]] = {
    "attention_traffic": (TrafficReport, attention_traffic_figure),
    "bench-arrival": (ArrivalReport, arrival_figure),
    "bench-ladder": (Ladder, speed_figure),
    "bench-memory": (MemoryReport, fragmentation_figure),
    "bench-parallel": (ParallelReport, parallel_figure),
    "bench-policies": (PoliciesReport, policies_figure),
    "bench-quantisation": (QuantisationReport, quantisation_figure),
    "bench-simulate": (SimulateReport, simulate_figure),
    "bench": (SpeedReport, speed_figure),
    "ladder": (Ladder, speed_figure),
}
"""How the name of a picture begins -> the report that it shows, and what draws it. The first one that fits counts."""


def redraw(folder: Path) -> list[Path]:
    """Draw again each picture of ``folder`` that has its numbers beside it, from these; returns their paths.

    Nothing is measured. A picture whose name is not known, such as that of a training run, stays as it is.
    """
    drawn = []
    for path in sorted(folder.glob("*.png")):
        kind = next((DRAWN[name] for name in DRAWN if path.stem.startswith(name)), None)
        if kind and (numbers := path.with_suffix(".json")).is_file():
            report, draw = kind
            draw(report.read(numbers)).save(path)
            drawn.append(path)
    return drawn


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    print(*save_gallery(folder), *redraw(folder), sep="\n")
