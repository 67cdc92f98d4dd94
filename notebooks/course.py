"""What the chapters need of the package before they have built it: a model, and one text through its decoder.

>>> llm = open_llm()                            # the storyteller, in float32, on the GPU if there is one
>>> hidden = hidden_states(llm, token_ids)      # [T, hidden], what the last layer leaves of each token
>>> scores = logits(llm, token_ids)             # [T, V], row t scores the token after token t

Chapter 08 explains the one thing that these functions hide, ``AttentionMetadata``: where the tokens of a step stand.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paged_infer import LLM, AsyncLLM, SamplingParams
from paged_infer.bench.load import EngineSystem, StepCost, serve
from paged_infer.bench.metrics import quantile
from paged_infer.bench.scheduling.arrival import watch_arrival
from paged_infer.bench.scheduling.policies import Load, PolicyOptions, simulated
from paged_infer.bench.shapes import SHAPES
from paged_infer.bench.speed.measure import SpeedReport
from paged_infer.bench.timing import time_on
from paged_infer.bench.workloads import random_lengths
from paged_infer.cache.contiguous import ContiguousCache
from paged_infer.cache.none import NoCache
from paged_infer.cache.paged import PagedCache
from paged_infer.cache.spec import Cache
from paged_infer.config import EngineConfig
from paged_infer.control.policies import Policy
from paged_infer.control.step import SamplingRow
from paged_infer.execution.memory_profile import MemoryProfile, MemoryProfiler
from paged_infer.kernels import AttentionMetadata
from paged_infer.kernels.attention_backends import attention_backend
from paged_infer.model.config import ModelConfig
from paged_infer.model.decoder import Decoder
from paged_infer.sampling.sampler import Sampler

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_llm(model: str | None = None, **options) -> LLM:
    """The storyteller, or another model, on ``device``; in float32, in which alone tokens are exact."""
    return LLM(model, **{"dtype": "float32", "device": device.type, **options})


def hidden_states(
    model: LLM | Decoder,
    token_ids: list[int] | Tensor,
    cache: Cache | None = None,
    *,
    start: int = 0,
    batch: int = 1,
    positions: Tensor | None = None,
) -> Tensor:
    """Token ids through all layers and the last norm: T of them -> [T, hidden].

    Args:
        cache: what remembers earlier tokens. None: the ids are a whole text, and nothing is kept.
        start: how many tokens of the text the cache holds already.
        batch: the number of texts. Their ids, equally many of each, stand one text after the other.
        positions: of each token, [T]. None: counted on from ``start``.
    """
    decoder = decoder_of(model)
    ids = torch.as_tensor(token_ids, device=decoder.device).flatten()
    cache = NoCache(decoder.kv_spec()) if cache is None else cache
    step = layout(len(ids) // batch, start=start, batch=batch, block_size=getattr(cache, "block_size", None))
    step.positions = (step.positions if positions is None else positions.flatten()).to(decoder.device)
    return decoder(ids, cache, step)


def logits(model: LLM | Decoder, token_ids: list[int] | Tensor, cache: Cache | None = None, **where) -> Tensor:
    """The scores of every token of the vocabulary, after each token of the text: [T, V]. Arguments as above."""
    decoder = decoder_of(model)
    return decoder.logits(hidden_states(decoder, token_ids, cache, **where))


def decoder_of(model: LLM | Decoder) -> Decoder:
    return model.engine.decoder if isinstance(model, LLM) else model


def layout(length: int, *, start: int = 0, batch: int = 1, block_size: int | None = None) -> AttentionMetadata:
    """Tokens ``start`` to ``start + length - 1`` of each of ``batch`` texts, as the decoder wants them described.

    A paged cache has its ``block_size``, large enough for a whole text: text i is then in block i.
    """
    place = torch.device("cpu") if block_size is None else device
    rows, columns = torch.arange(batch, device=place), torch.arange(start, start + length, device=place)
    return AttentionMetadata(
        positions=columns.repeat(batch),
        slot_mapping=(rows[:, None] * (block_size or 0) + columns).flatten(),
        query_start_loc=torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=place),
        seq_lens=torch.full((batch,), start + length, dtype=torch.int32, device=place),
        block_tables=rows[:, None].int().contiguous(),
        num_decodes=batch if length == 1 else 0,
        max_query_len=length,
        max_seq_len=start + length,
    )


def package_sampler(scores: Tensor, **options) -> list[int]:
    """The package's choice for each row of logits [R, V], under ``SamplingParams(**options)``; row i has seed i."""
    params = SamplingParams(**options)
    rows = [SamplingRow(params, seed, 0, position=0, num_output_tokens=0) for seed in range(len(scores))]
    return Sampler()(scores, rows).token_ids


def seeded(seed: int, *shape: int) -> Tensor:
    """Normal random numbers on ``device``, the same ones on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def rounded(values: Tensor, digits: int = 3) -> list:
    """A tensor as (nested) lists of numbers with that many digits, to be printed."""
    return values.detach().double().cpu().round(decimals=digits).tolist()


@torch.inference_mode()
def layer_seconds(model: LLM | Decoder, num_tokens: int) -> dict[str, float]:
    """How long each piece of the first layer takes for a text of that many tokens, in seconds: the quickest of 36."""
    decoder = decoder_of(model)
    config, layer, step, cache = decoder.config, decoder.layers[0], layout(num_tokens), NoCache(decoder.kv_spec())
    x = seeded(0, num_tokens, config.hidden_size)
    q, k, v = (
        seeded(1, num_tokens, heads, config.head_dim)
        for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    )
    calls = {
        "projections of attention": lambda: (layer.attention.qkv(x), layer.attention.output(x)),
        "MLP": lambda: layer.mlp(x),
        "two norms": lambda: (layer.attention_norm(x, x), layer.mlp_norm(x, x)),
        "tokens reading tokens": lambda: cache.attend(0, q, k, v, step),
    }
    rounds = [{name: min(time_on(device, call, repeats=6).samples_s) for name, call in calls.items()} for _ in range(6)]
    return {name: min(seconds[name] for seconds in rounds) for name in calls}


class OperationCounter(TorchDispatchMode):
    """The names of the operations that torch runs in a ``with`` block, without views, which run nothing.

    An index by a mask ", waits": the size of its result depends on values, so the CPU must wait for the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            name = function.__name__.partition(".")[0]
            by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
            self.names.append(name + ", waits" * by_mask)
        return function(*args, **(kwargs or {}))


def num_host_reads(call: Callable[[], object]) -> int:
    """How many numbers the call moves from a tensor into Python or C++ code, for each of which the CPU waits for a GPU.

    PyTorch's own operations may do so too: the profiler records the operations inside them.
    """
    with torch.autograd.profiler.profile(use_kineto=False) as recorded:
        call()
    return sum(event.name == "aten::_local_scalar_dense" for event in recorded.function_events)


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
        report = bench.report(clients, None, rate_shares)
    for server, engine in zip(servers, engines, strict=True):
        server.should_exit = True
        asyncio.run(engine.shutdown())
    sys.setswitchinterval(interval_s)
    return report


def simulated_waits(rate: float, max_num_seqs: int, budget: int, num_output: int) -> tuple[float, float]:
    """Median seconds to the first token, and to the last, of 80 requests that arrive at ``rate``, on a simulated clock.

    The scheduler is the package's, with chunked prefill and ``budget`` tokens a step; ``StepCost()`` moves the clock.
    """
    requests = Load(80, rate, (64, 512), (num_output // 2, 3 * num_output // 2), 0).arrivals()
    times = serve(simulated(PolicyOptions("", "chunked", budget), StepCost(), max_num_seqs, 2048), requests)
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


def milliseconds(call: Callable[..., object], *args, **kwargs) -> float:
    """How long one call takes, with all that it has launched on a GPU."""
    began_s = time.perf_counter()
    call(*args, **kwargs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began_s)


class LiveBytes(TorchDispatchMode):
    """Adds up the tensors that operations under it have made and that are alive; ``weights`` do not count."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.weights = {StorageWeakRef(weight.untyped_storage()) for weight in weights}
        self.live: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            if (reference := StorageWeakRef(storage)) not in self.weights:
                self.live[reference] = storage.nbytes()
        self.live = {reference: size for reference, size in self.live.items() if not reference.expired()}
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def peak_bytes(call: Callable[..., object], *args, weights: Iterable[Tensor] = ()) -> int:
    """The most bytes in tensors at one time during the call. Views of ``weights`` do not count."""
    with LiveBytes(weights) as live:
        call(*args)
    return live.peak


class SupposedDevice:
    """A device of ``total`` bytes for the package's memory profiler, which asks a GPU otherwise."""

    def __init__(self, decoder: Decoder, total: int) -> None:
        self.weights, self.total = list(decoder.parameters()), total

    def free_and_total(self) -> tuple[int, int]:
        return self.total, self.total

    def allocated(self) -> int:
        return sum(weight.nbytes for weight in self.weights)

    def peak_of(self, run: Callable[[], object]) -> int:
        return peak_bytes(run, weights=self.weights)


def supposed_profile(model: LLM | Decoder, total: int) -> MemoryProfile:
    """What the package's profiler measures of a model on a device of ``total`` bytes, by PyTorch's attention."""
    decoder = decoder_of(model)
    profiler = MemoryProfiler(SupposedDevice(decoder, total), free=total, total=total, allocated=0)
    return profiler.finish(EngineConfig(), decoder, *attention_backend("sdpa", device), has_graphs=False)


def random_gpt2(vocab_size: int) -> Decoder:
    """Two layers of GPT-2's kind, with a learned row for each of 128 positions, and random weights."""
    kind = {"family": "gpt2", "norm": "layer", "activation": "gelu_tanh", "gated_mlp": False, "learned_positions": True}
    heads = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "sliding_windows": (None, None)}
    sizes = {"hidden_size": 64, "intermediate_size": 256, "max_position_embeddings": 128}
    decoder = Decoder(ModelConfig(vocab_size=vocab_size, **kind, **heads, **sizes))
    generator = torch.Generator().manual_seed(0)
    for name, weights in decoder.named_parameters():
        torch.nn.init.normal_(weights, mean=float(name.endswith("norm.weight")), std=0.2, generator=generator)
    return decoder.to(device)


def random_decoder(shape: str, dtype: torch.dtype = torch.float32, *, plain: bool = False, **sizes) -> Decoder:
    """A decoder of a shape in ``paged_infer.bench.shapes``, with random weights, on ``device``.

    Its elementwise operations and, on a CPU, its matrix products are those of the engine, or PyTorch's if ``plain``.
    """
    _, ops = attention_backend("sdpa" if plain else "auto", device)
    decoder = Decoder(ModelConfig.from_hf({**SHAPES[shape], **sizes}), ops).to(device, dtype)
    for weights in decoder.parameters():
        torch.nn.init.uniform_(weights, -0.04, 0.04)
    if not plain:
        decoder.prepack()
    return decoder


def prepared_step(
    decoder: Decoder, length: int, end: int, batch: int = 1, cache: Cache | None = None
) -> Callable[[], Tensor]:
    """A function that runs one step and returns the logits of its last rows, [batch, V].

    The step brings the last ``length`` tokens of ``batch`` texts of ``end`` tokens each. Without a ``cache``, one holds
    their earlier tokens and has been written to: memory that never was reads fast and proves nothing.
    """
    if cache is None:
        cache = ContiguousCache(decoder.kv_spec(), end, [0] * batch, device)
        for held in (*cache.keys, *cache.values):
            held.fill_(0.1)
    step = layout(length, start=end - length, batch=batch)
    step.positions = step.positions.to(device)
    ids = torch.randint(0, decoder.config.vocab_size, (batch * length,)).to(device)
    return lambda: decoder.logits(decoder(ids, cache, step).view(batch, length, -1)[:, -1])


def story_cache(llm: LLM, model: LLM | Decoder | None = None, batch: int = 1, room: int = 512) -> PagedCache:
    """A paged cache for ``batch`` texts of at most ``room`` tokens, each in one block, with the attention of ``llm``.

    Args:
        model: whose keys and values it holds; by default those of ``llm``.
    """
    decoder, own = decoder_of(llm if model is None else model), llm.engine.executor.runner.cache
    return PagedCache(decoder.kv_spec(), batch, room, own.backend, decoder.device, own.ops)


def verification_pass(llm: LLM, model: LLM | Decoder, width: int, batch: int = 1) -> Callable[[], list[int]]:
    """A function that computes ``width`` tokens of each of ``batch`` texts, and draws after each of them.

    The texts hold 100 tokens before. The model, the logits and the draws are those of a step of the engine; planning
    and packing are left out.
    """
    cache, sampler = story_cache(llm, model, batch), Sampler()
    for held in (*cache.keys, *cache.values):
        held.fill_(0.1)  # memory that never was written to reads fast
    rows = [SamplingRow(SamplingParams(), 0, 0, 100 + n, n) for _ in range(batch) for n in range(width)]
    ids = [5] * (width * batch)
    return torch.inference_mode()(lambda: sampler(logits(model, ids, cache, start=100, batch=batch), rows).token_ids)


def draft_turns(llm: LLM) -> list[float]:
    """A list to which the engine of ``llm`` adds, at each step, the seconds that its draft model takes in all."""
    drafter, turns_s = llm.engine.executor.drafter, []
    fill_in = drafter.fill_in

    def timed(step):
        began_s = time.perf_counter()
        filled = fill_in(step)  # it has read each draft, so nothing of it is still running on a GPU
        turns_s.append(time.perf_counter() - began_s)
        return filled

    drafter.fill_in = timed
    return turns_s
