"""llama.cpp on a GGUF file: its server, and what its own benches report of decoding alone.

The server's /completion takes token ids as a prompt and returns those that it drew.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from paged_infer.bench.http.servers import server_process
from paged_infer.bench.metrics import Run, System, TokenTimes
from paged_infer.bench.peers.processes import PROC, peak_bytes
from paged_infer.bench.workloads import Workload
from paged_infer.params import SamplingParams

NAME, SERVER = "llama.cpp", "llama-server"
ANSWER_S, BENCH_S = 1800.0, 600.0
CONTEXT_STEP = 256  # llama.cpp rounds a context up to it
NO_LIMITS = httpx.Limits(max_connections=None)  # else requests beyond 100 wait here


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    gguf: Path
    threads: int
    slots: int  # requests at once
    longest: int  # tokens of a request
    longest_at_once: int  # of one of many


@contextmanager
def llama_server(options: LlamaOptions) -> Iterator[tuple[System, str]]:
    """The server as a system, and its version: one with a slot for each of many requests, and one with a single slot,
    since all slots have the same length. They are ended with the block.

    Raises:
        ValueError: it is not on PATH, did not start, or another server responds in its place.
    """
    path = shutil.which(SERVER)
    if path is None:
        raise ValueError(f"peer {NAME} cannot run: no {SERVER} is on PATH")
    threads = str(options.threads)
    command = [path, "-m", str(options.gguf), "-t", threads, "-tb", threads]
    with ExitStack() as stack:
        servers = {}
        for slots, longest in ((options.slots, options.longest_at_once), (1, options.longest)):
            # One token more: it calls a text truncated that fills its slot.
            context = slots * -(-(longest + 1) // CONTEXT_STEP) * CONTEXT_STEP
            sizes = ["-np", str(slots), "-c", str(context)]
            url, pid = stack.enter_context(server_process(SERVER, [*command, *sizes]))
            client = stack.enter_context(httpx.Client(base_url=url, timeout=ANSWER_S, limits=NO_LIMITS))
            properties = _get(client, "/props")
            served = Path(str(properties.get("model_path"))).name
            if served != options.gguf.name:
                raise ValueError(f"peer {NAME} failed: the server at {url} has {served}, not {options.gguf.name}")
            servers[slots] = _Server(client, pid)
        yield (lambda w: servers[options.slots if len(w.prompts) > 1 else 1](w)), str(properties.get("build_info"))


@dataclass(frozen=True, slots=True)
class _Server:
    client: httpx.Client
    pid: int

    def __call__(self, workload: Workload) -> Run:
        with ThreadPoolExecutor(len(workload.prompts)) as threads:
            start = time.perf_counter()
            answers = list(threads.map(self._complete, workload.prompts, workload.params))
            seconds = time.perf_counter() - start
        times = [TokenTimes(0.0, len(p), [], len(ids)) for p, ids in zip(workload.prompts, answers, strict=True)]
        peak = peak_bytes(self.pid)
        if peak is None and PROC.exists():
            raise ValueError(f"peer {NAME} failed: its process has ended, and another one responds at its port")
        return Run(answers, times, seconds, peak_bytes=peak)

    def _complete(self, prompt: list[int], params: SamplingParams) -> list[int]:
        body = {
            "prompt": prompt,
            "n_predict": params.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
        }
        answer = _get(self.client, "/completion", body)
        evaluated = answer.get("tokens_evaluated")
        if answer.get("truncated") or evaluated != len(prompt):
            raise ValueError(f"peer {NAME} failed: it evaluated {evaluated} tokens of a prompt of {len(prompt)}")
        return list(answer["tokens"])


def _get(client: httpx.Client, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON that it responds with, to a POST if there is a body."""
    try:
        response = client.get(path) if body is None else client.post(path, json=body)
        found = response.json()
    except httpx.HTTPError as error:
        raise ValueError(f"peer {NAME} failed: {type(error).__name__}: {error}") from None
    except ValueError:  # no JSON
        found = None
    if response.status_code != 200 or not isinstance(found, dict):
        raise ValueError(f"peer {NAME} failed: status {response.status_code}: {response.text[:200]}")
    return found


def llama_benches(options: LlamaOptions, num_prompt: int, num_output: int) -> dict[str, float]:
    """Tokens per second of decoding alone, without sampling and HTTP, from llama-bench (one sequence) and
    llama-batched-bench (as many as there are slots), where they are on PATH and run.
    """
    file, threads, found = str(options.gguf), str(options.threads), {}
    sizes = ["-p", "0", "-n", str(num_output)]
    if text := _output("llama-bench", "-m", file, "-t", threads, *sizes, "-o", "json"):
        found["llama-bench, one sequence"] = float(json.loads(text)[0]["avg_ts"])
    room = options.slots * (num_prompt + num_output)
    sizes = ["-c", str(room), "-npp", str(num_prompt), "-ntg", str(num_output), "-npl", str(options.slots)]
    if text := _output("llama-batched-bench", "-m", file, "-t", threads, *sizes):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
        found[f"llama-batched-bench, {options.slots} sequences"] = float(rows[-1][rows[0].index("S_TG t/s")])
    return found


def _output(program: str, *arguments: str) -> str:
    """What it writes; empty if it is not on PATH, fails, or takes too long."""
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=BENCH_S, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return "" if done.returncode else done.stdout
