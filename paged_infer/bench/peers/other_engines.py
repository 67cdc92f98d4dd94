"""Engines on the same weights, each in a process: vLLM, nano-vLLM and mini-SGLang, where installed, and
transformers and ours, for benches that compare what whole processes take.

Each runs in a process of its own, so that what it does to torch, to CUDA and to memory stays there. They are driven
through what their own offline benchmarks use: ``LLM(...).generate``.

    ours      --- workload --->  |  peer's process: LLM(folder)
    (pipe)    <--- Run ---------  |  generate(...), clocked around the call
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

from paged_infer.bench.metrics import Run, System, TokenTimes
from paged_infer.bench.peers.processes import peak_bytes
from paged_infer.bench.workloads import Workload
from paged_infer.config import EngineOptions

MODULES = {"vllm": "vllm", "nano-vllm": "nanovllm", "mini-sglang": "minisgl"}
PROCESSES = {"paged": "paged_infer", "transformers": "transformers", "generate_batch": "transformers", **MODULES}
START_LIMIT_S = 600.0  # a first start compiles kernels and captures graphs
RUN_LIMIT_S = 3600.0
BLOCK_SIZE = 16  # of ours


@dataclass(frozen=True, slots=True)
class PeerOptions:
    """The options of every engine. ``memory_share``: of the whole device's memory.

    ``threads`` and the cache's ``pool_tokens`` are set on a CPU; 0: the engine's default. ``engine``: further options
    of ours, which replace those that follow from the rest.
    """

    folder: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    memory_share: float
    threads: int = 0
    pool_tokens: int = 0
    engine: EngineOptions = field(default_factory=EngineOptions)


def is_installed(name: str) -> str | None:
    """The version of a peer's package, where it is importable."""
    module = PROCESSES.get(name, "")
    if not module or importlib.util.find_spec(module) is None:
        return None
    for distribution in importlib.metadata.packages_distributions().get(module, ()):
        return importlib.metadata.version(distribution)
    return "not known"


def check_importable(names: list[str]) -> None:
    """Raises ValueError for a peer that is not installed; one line that names its module."""
    for name in names:
        if importlib.util.find_spec(PROCESSES[name]) is None:
            raise ValueError(f"peer {name} cannot run: no module {PROCESSES[name]!r} is installed here")


@contextmanager
def engine_peers(names: list[str], options: PeerOptions) -> Iterator[dict[str, System]]:
    """Start each in its process, one after the other; all are ended with the block.

    Raises:
        ValueError: a peer is not installed, or did not start; the message has its error.
    """
    check_importable(names)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ExitStack() as stack:
        systems: dict[str, System] = {}
        for name in names:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(name, options, theirs), daemon=False)
            process.start()
            theirs.close()
            stack.callback(_end, process, ours)
            _answer(name, ours, START_LIMIT_S)
            systems[name] = partial(_send, name, ours)
        yield systems


def _send(name: str, connection: Connection, workload: Workload) -> Run:
    try:
        connection.send(workload)
    except OSError:
        raise ValueError(f"peer {name} has ended") from None
    run: Run = _answer(name, connection, RUN_LIMIT_S)
    return run


def _answer(name: str, connection: Connection, limit_s: float) -> Any:
    try:
        if not connection.poll(limit_s):
            raise ValueError(f"peer {name} did not respond within {limit_s:.0f} s")
        answer = connection.recv()
    except (EOFError, ConnectionResetError):
        raise ValueError(f"peer {name} ended without a message; its process may have written one above") from None
    if isinstance(answer, Exception):
        raise ValueError(f"peer {name} failed: {answer}")
    return answer


def _end(process: Any, connection: Connection) -> None:
    connection.close()  # the peer's recv ends, and with it its process
    process.join(30)
    if process.is_alive():
        process.terminate()
        process.join(10)


def _serve(name: str, options: PeerOptions, connection: Connection) -> None:
    """The peer's process: build the engine, then serve workloads until the pipe is closed or something fails."""
    try:
        if options.threads:
            import torch

            torch.set_num_threads(options.threads)
        generate = ENGINES[name](options)
        connection.send("ready")
        while (workload := _receive(connection)) is not None:
            run = generate(workload)
            run.peak_bytes = peak_bytes()
            connection.send(run)
    except Exception as error:  # a peer may raise anything; a user needs one line
        connection.send(RuntimeError(f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]))


def _receive(connection: Connection) -> Workload | None:
    """None once the other end is closed."""
    try:
        workload: Workload = connection.recv()
    except EOFError:
        return None
    return workload


def _paged(options: PeerOptions) -> System:
    from paged_infer.llm import LLM

    own: EngineOptions = {
        "dtype": options.dtype,
        "device": "cpu" if options.threads else "auto",
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "num_blocks": -(-options.pool_tokens // BLOCK_SIZE) or None,
        "block_size": BLOCK_SIZE,
        "enable_prefix_caching": False,
    }
    own.update(options.engine)
    llm = LLM(options.folder, **own)

    def generate(prompts: list[list[int]], params: list[Any]) -> list[dict[str, Any]]:
        return [{"token_ids": one.outputs[0].token_ids} for one in llm.generate(prompts, params, use_tqdm=False)]

    untimed = _untimed(SimpleNamespace(generate=generate), lambda workload: workload.params)
    per_token = llm.engine.memory.kv_bytes_per_token
    return lambda workload: replace(untimed(workload), kv_bytes_per_token=per_token)


def _transformers(options: PeerOptions, name: str = "transformers static") -> System:
    import torch
    from transformers import AutoModelForCausalLM

    from paged_infer.bench.peers.transformers_peers import peers_of
    from paged_infer.cli_options import quiet_libraries

    quiet_libraries()
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=dtype, local_files_only=True).eval()
    return peers_of(model, 0)[name]


def _vllm(options: PeerOptions) -> System:
    if options.threads:  # its build for a CPU; in one process it is faster
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{options.threads - 1}")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    from vllm import LLM, SamplingParams

    llm = LLM(
        options.folder,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        gpu_memory_utilization=options.memory_share,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=False,  # else no request has times
    )

    def run(workload: Workload) -> Run:
        params = _params(SamplingParams, workload, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return Run([list(output.outputs[0].token_ids) for output in outputs], list(map(_vllm_times, outputs)), seconds)

    return run


def _vllm_times(output: Any) -> TokenTimes:
    """vLLM reports the wait for the first token, and on a clock of its own when the first and the last came."""
    num_prompt, num_output = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
    stats = output.metrics
    waited_s = getattr(stats, "first_token_latency", None)
    if not waited_s:
        return TokenTimes(0.0, num_prompt, [], num_output)
    return TokenTimes(0.0, num_prompt, [waited_s, waited_s + stats.last_token_ts - stats.first_token_ts], num_output)


def _nano_vllm(options: PeerOptions) -> System:
    from nanovllm import LLM, SamplingParams

    free, total = _memory()
    llm = LLM(
        options.folder,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        # it counts memory of other processes as part of its own share
        gpu_memory_utilization=min(0.95, 1 - free / total + options.memory_share),
    )
    # It samples every token and refuses a temperature of 0; the smallest that it accepts is greedy except for ties.
    return _untimed(llm, lambda workload: _params(SamplingParams, workload, coldest=1e-5), use_tqdm=False)


def _mini_sglang(options: PeerOptions) -> System:
    import torch
    from minisgl.core import SamplingParams
    from minisgl.llm import LLM

    free, total = _memory()
    llm = LLM(
        options.folder,
        dtype=getattr(torch, options.dtype),
        max_seq_len_override=options.max_model_len,
        max_running_req=options.max_num_seqs,
        cuda_graph_max_bs=options.max_num_seqs,
        memory_ratio=min(0.9, options.memory_share * total / free),  # of what is free
    )
    return _untimed(llm, lambda workload: _params(SamplingParams, workload))


ENGINES: dict[str, Callable[[PeerOptions], System]] = {
    "paged": _paged,
    "transformers": _transformers,
    "generate_batch": partial(_transformers, name="transformers generate_batch"),
    "vllm": _vllm,
    "nano-vllm": _nano_vllm,
    "mini-sglang": _mini_sglang,
}


def _memory() -> tuple[int, int]:
    """Free and total bytes of the device."""
    import torch

    return torch.cuda.mem_get_info() if torch.cuda.is_available() else (1, 1)


def _params(kind: Callable[..., Any], workload: Workload, coldest: float = 0.0, **options: Any) -> list[Any]:
    """The workload's parameters as the peer's class of the same name."""
    return [
        kind(temperature=max(coldest, one.temperature), max_tokens=one.max_tokens, ignore_eos=one.ignore_eos, **options)
        for one in workload.params
    ]


def _untimed(llm: Any, params: Callable[[Workload], list[Any]], **options: Any) -> System:
    """A peer that reports its tokens and no times."""

    def run(workload: Workload) -> Run:
        its_params = params(workload)
        start = time.perf_counter()
        outputs = llm.generate(workload.prompts, its_params, **options)
        seconds = time.perf_counter() - start
        token_ids = [list(output["token_ids"]) for output in outputs]
        pairs = zip(workload.prompts, token_ids, strict=True)
        return Run(token_ids, [TokenTimes(0.0, len(prompt), [], len(ids)) for prompt, ids in pairs], seconds)

    return run
