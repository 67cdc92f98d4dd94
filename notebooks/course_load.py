"""Servers, schedulers and event loops under load, as chapters 10 and 11 measure them. ``course`` has the same names."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor

from course import device

from paged_infer import LLM, AsyncLLM
from paged_infer.bench.load import EngineSystem, serve
from paged_infer.bench.metrics import quantile
from paged_infer.bench.scheduling.arrival import watch_arrival
from paged_infer.bench.scheduling.policies import COST, Load, PolicyOptions, simulated
from paged_infer.bench.speed.measure import SpeedReport
from paged_infer.bench.workloads import random_lengths
from paged_infer.control.policies import Policy


async def lags_ms(work: Awaitable) -> list[float]:
    """How late a task wakes up that sleeps 2 ms again and again, while ``work`` goes on in the same event loop.

    In milliseconds, the smallest first.
    """
    lags, task = [], asyncio.ensure_future(work)
    while not task.done():
        began_s = time.perf_counter()
        await asyncio.sleep(0.002)
        lags.append(max(0.0, 1e3 * (time.perf_counter() - began_s) - 2))
    return sorted(lags)


def load_test(llm: LLM, clients: list[int], rate_shares: list[float]) -> SpeedReport:
    """Two servers on free ports, with ``max_num_seqs`` 16 and 1, under closed loops and under an open one.

    Args:
        llm: its limits and vocabulary bound the texts.
        clients: of the closed loops.
        rate_shares: of the open loop, as shares of the rate that the most clients reached.
    """
    import uvicorn

    from paged_infer.bench.http.http_bench import HttpBench, HttpSystem
    from paged_infer.server.app import create_app
    from paged_infer.server.run import listen

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)  # servers, engines and clients share an interpreter here: shorter turns
    load = random_lengths(llm, num_requests=16, shortest=6, longest=12, seed=1)
    expected = [out.outputs[0].text for out in llm.generate(load.prompts, load.params, use_tqdm=False)]
    engines = [AsyncLLM(dtype="float32", device=device.type, num_blocks=1024, max_num_seqs=seqs) for seqs in (16, 1)]
    servers, systems = [], []
    with ThreadPoolExecutor(1) as client:
        for engine in engines:
            socket = listen("127.0.0.1", 0)
            servers.append(uvicorn.Server(uvicorn.Config(create_app(engine), log_level="error")))
            threading.Thread(target=servers[-1].run, args=([socket],), daemon=True).start()
            systems.append(HttpSystem(client, f"http://127.0.0.1:{socket.getsockname()[1]}", llm.name))
        bench = HttpBench(systems[0], load, 1, lambda name: None, one_at_a_time=systems[1], expected=expected)
        gc.freeze()  # as serve does: a collection that walks the libraries' objects, too, takes 0.2 s
        report = bench.report(clients, None, rate_shares)
        gc.unfreeze()
    for server, engine in zip(servers, engines, strict=True):
        server.should_exit = True
        asyncio.run(engine.shutdown())
    sys.setswitchinterval(interval_s)
    return report


def simulated_waits(rate: float, max_num_seqs: int, budget: int, num_output: int) -> tuple[float, float]:
    """Median seconds to the first token, and to the last, of 80 requests that arrive at ``rate``, on a simulated clock.

    The scheduler is the package's, with chunked prefill and ``budget`` tokens a step; ``COST`` moves the clock.
    """
    requests = Load(80, rate, (64, 512), (num_output // 2, 3 * num_output // 2), 0).arrivals()
    times = serve(simulated(PolicyOptions("", "chunked", budget), COST, max_num_seqs, 2048), requests)
    waits_s = [one.ttft_s for one in times], [one.latency_s for one in times]
    first_s, whole_s = (quantile(sorted(values), 0.5) for values in waits_s)
    return first_s, whole_s


def prompt_arrives(llm: LLM, policy: Policy, budget: int) -> tuple[float, float]:
    """A prompt of 600 tokens arrives while four requests decode, under ``policy`` with ``budget`` tokens a step.

    Returns:
        In milliseconds, the longest gap between two tokens of a decoding request, and the time to the new one's first
        token. Of three runs the shortest of the same steps, since other processes only add to them.
    """
    scheduler, runs = llm.engine.scheduler, []
    scheduler.policy, scheduler.max_num_batched_tokens = policy, budget  # it reads both at every step
    for turn in range(3):
        system = EngineSystem(llm.engine, seed=3 * budget + turn)  # other prompts each time: a cold prefix cache
        runs.append(watch_arrival(PolicyOptions("", "", budget), system, 4, 600, max_tokens=200))
        for number in range(5):
            llm.engine.abort(f"bench {number}")
    gaps_s = [min(step) for step in zip(*([gap_s for _, gap_s in one.moments] for one in runs), strict=True)]
    return 1e3 * max(gaps_s), 1e3 * min(one.ttft_s for one in runs)
