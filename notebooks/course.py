"""What the chapters need of the package before they have built it: a model, and one text through its decoder.

>>> llm = open_llm()                            # the storyteller, in float32, on the GPU if there is one
>>> hidden = hidden_states(llm, token_ids)      # [T, hidden], what the last layer leaves of each token
>>> scores = logits(llm, token_ids)             # [T, V], row t scores the token after token t

Chapter 08 explains the one thing that these functions hide, ``AttentionMetadata``: where the tokens of a step stand.
"""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paged_infer import LLM, SamplingParams, storyteller
from paged_infer.bench.shapes import SHAPES
from paged_infer.bench.timing import time_on
from paged_infer.cache.contiguous import ContiguousCache
from paged_infer.cache.none import NoCache
from paged_infer.cache.paged import PagedCache
from paged_infer.cache.spec import Cache
from paged_infer.control.step import SamplingRow
from paged_infer.kernels import AttentionMetadata
from paged_infer.kernels.attention_backends import attention_backend
from paged_infer.model.config import ModelConfig
from paged_infer.model.decoder import Decoder
from paged_infer.sampling.sampler import Sampler

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


ELSEWHERE = {
    "course_bits": (
        "float_decoder",
        "inputs_of",
        "product_calls",
        "story_log_probs",
        "training_stories",
        "unseen_stories",
    ),
    "course_counts": ("OperationCounter", "num_host_reads", "peak_bytes", "supposed_profile"),
    "course_load": ("lags_ms", "load_test", "prompt_arrives", "simulated_waits"),
    "course_replicas": ("routed_waits",),
}


def __getattr__(name: str) -> Any:
    """Chapters import from here what stands in other files, too; these are loaded only then."""
    for module, names in ELSEWHERE.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
        "scores, softmax, values": lambda: cache.attend(0, q, k, v, step),
    }
    rounds = [{name: min(time_on(device, call, repeats=6).samples_s) for name, call in calls.items()} for _ in range(6)]
    return {name: min(seconds[name] for seconds in rounds) for name in calls}


def milliseconds(call: Callable[..., object], *args, **kwargs) -> float:
    """How long one call takes, with all that it has launched on a GPU."""
    began_s = time.perf_counter()
    call(*args, **kwargs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began_s)


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


def random_weights(config: ModelConfig) -> Decoder:
    """A decoder with matrices that keep the sizes of vectors, embeddings of RMS 1 and norms of ones, on ``device``."""
    decoder, generator = Decoder(config), torch.Generator().manual_seed(0)
    for name, weights in decoder.named_parameters():
        drawn = torch.randn(weights.shape, generator=generator)
        scale = 1.0 if name == "embedding.weight" else weights.shape[-1] ** -0.5
        weights.data = torch.ones_like(weights) if "norm" in name else scale * drawn
    return decoder.to(device)


@contextmanager
def random_checkpoint(family: str, **sizes) -> Iterator[Path]:
    """A folder with a model of transformers, its weights random and spread wide, and the storyteller's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    vocab_size = json.loads((storyteller.PATH / "config.json").read_text())["vocab_size"]
    sizes |= {"vocab_size": vocab_size, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(family, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for path in storyteller.PATH.glob("*token*.json"):
            shutil.copy(path, folder)
        yield Path(folder)


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


def quickest_ms(calls: Mapping[Hashable, Callable[[], object]], rounds: int = 10) -> dict[Hashable, float]:
    """The shortest time of each call, in milliseconds: in every round a few of each, with what it reads in caches."""
    times = [{name: min(milliseconds(call) for _ in range(5)) for name, call in calls.items()} for _ in range(rounds)]
    return {name: min(one[name] for one in times) for name in calls}


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
