"""transformers on the same weights: ``generate`` and ``generate_batch``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from paged_infer.bench.metrics import Run, System, TokenTimes
from paged_infer.bench.workloads import Workload
from paged_infer.cache.spec import kv_bytes_per_token
from paged_infer.engine.kv_usage import KVUsage
from paged_infer.llm import LLM
from paged_infer.model.loading.checkpoint import config_dict
from paged_infer.model.loading.gguf_file import is_gguf
from paged_infer.model.loading.load import checkpoint_views
from paged_infer.params import SamplingParams

PAGE_SIZE = 16  # of generate_batch's cache, as ours
BATCH_TOKENS = 512  # of a step of generate_batch on a CPU, where it cannot infer a size from the device
NEVER = -1  # an end token that no model samples


def transformers_peers(llm: LLM) -> dict[str, System]:
    """One request after the other, all in one left-padded batch, and continuous batching (``generate_batch``)."""
    return peers_of(transformers_model(llm), kv_bytes_per_token(llm.engine.decoder.kv_spec()))


def peers_of(model: Any, kv_bytes_per_token: int) -> dict[str, System]:
    """The same, for a model of transformers."""
    return {
        "transformers": Generate(model, 1, kv_bytes_per_token),
        "transformers static": Generate(model, None, kv_bytes_per_token),
        "transformers generate_batch": partial(_generate_batch, model),
    }


@dataclass(frozen=True, slots=True)
class Generate:
    """``generate`` as a system. ``batch_size`` None: all requests in one batch."""

    model: Any
    batch_size: int | None
    kv_bytes_per_token: int

    def __call__(self, workload: Workload) -> Run:
        return _generate(self.model, workload, self.batch_size, self.kv_bytes_per_token)

    @torch.inference_mode()
    def next_logits(self, token_ids: list[int]) -> torch.Tensor:
        """[V], after all of these tokens."""
        logits: torch.Tensor = self.model(torch.tensor([token_ids], device=self.model.device)).logits[0, -1]
        return logits


def transformers_baselines(llm: LLM) -> dict[str, System]:
    """The two of ``generate``: requests one after the other, and in one left-padded batch."""
    peers = transformers_peers(llm)
    return {name: peers[name] for name in ("transformers", "transformers static")}


def transformers_model(llm: LLM) -> Any:
    """The same checkpoint, read by transformers. Random weights and those of a GGUF file are shared with the engine,
    not copied.

    Raises:
        ValueError: the engine's weights, of a family with buffers that transformers does not create on a given device.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading; a bench shows its own
    decoder, device = llm.engine.decoder, llm.engine.device
    is_file = is_gguf(llm.folder)
    if llm.engine.config.load_format != "dummy" and not is_file:
        model = AutoModelForCausalLM.from_pretrained(llm.folder, dtype=decoder.dtype, local_files_only=True)
        return model.to(device).eval()
    config = AutoConfig.for_model(**config_dict(llm.folder)) if is_file else AutoConfig.from_pretrained(llm.folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=decoder.dtype)
    model.load_state_dict(checkpoint_views(decoder), strict=False, assign=True)
    model.tie_weights()
    rotary = getattr(getattr(model, "model", None), "rotary_emb", None)
    if rotary is not None:
        model.model.rotary_emb = type(rotary)(config).to(device)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise ValueError(f"weights of the engine: transformers' {config.model_type} lacks {', '.join(left)}")
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def _generate(model: Any, workload: Workload, batch_size: int | None, kv_bytes_per_token: int) -> Run:
    """A finished row is padded until its batch ends; its own tokens are cut out afterwards."""
    batch_size = batch_size or len(workload.prompts)
    usage, tokens, times = KVUsage(), list[list[int]](), list[TokenTimes]()
    start = time.perf_counter()
    for first in range(0, len(workload.prompts), batch_size):
        prompts = workload.prompts[first : first + batch_size]
        params = workload.params[first : first + batch_size]
        width, limits = max(map(len, prompts)), [p.max_tokens or 0 for p in params]
        watch = _StepWatch(prompts, limits, usage)
        ends = _end_tokens(model, params[0])
        generated = model.generate(
            torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device),
            attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device),
            max_new_tokens=max(limits),
            eos_token_id=ends,
            pad_token_id=0,
            stopping_criteria=[watch],
            **_sampling(workload),
        )
        for prompt, row, limit in zip(prompts, generated[:, width:].tolist(), limits, strict=True):
            tokens.append(_until_end(row[:limit], ends))
            times.append(TokenTimes(start, len(prompt), watch.moments_s[: len(tokens[-1])]))
    return Run(tokens, times, time.perf_counter() - start, usage, kv_bytes_per_token)


class _StepWatch:
    """A stopping criterion that never stops: it records the time of every step, and what the cache holds."""

    def __init__(self, prompts: list[list[int]], limits: list[int], usage: KVUsage) -> None:
        self._prompt_lens = [len(prompt) for prompt in prompts]
        self._limits = limits
        self._usage = usage
        self.moments_s: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        num_steps = len(self.moments_s)
        self.moments_s.append(time.perf_counter())
        rows, columns = input_ids.shape
        growing = [n + num_steps for n, m in zip(self._prompt_lens, self._limits, strict=True) if num_steps < m]
        self._usage.record(rows * (columns - 1), sum(growing))  # the newest token is not in the cache yet
        return torch.zeros(rows, dtype=torch.bool, device=input_ids.device)


def _generate_batch(model: Any, workload: Workload) -> Run:
    """``generate_batch``'s own loop, with a limit for each request; its cache is made before the clock starts.

    Raises:
        ValueError: a request failed or is missing: transformers only logs that.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    num_requests = len(workload.prompts)
    limits = [params.max_tokens or 0 for params in workload.params]
    ends = _end_tokens(model, workload.params[0])
    pages = sum(-(-(len(p) + n) // PAGE_SIZE) for p, n in zip(workload.prompts, limits, strict=True))
    on_gpu = model.device.type == "cuda"
    sizes = {} if on_gpu else {"num_blocks": pages + num_requests, "max_batch_tokens": BATCH_TOKENS}
    generation = GenerationConfig(max_new_tokens=max(limits), eos_token_id=ends, pad_token_id=0, **_sampling(workload))
    batching = ContinuousBatchingConfig(page_size=PAGE_SIZE, max_requests_per_batch=num_requests, **sizes)
    before = model.config._attn_implementation
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=batching, block=True, timeout=5
    ) as manager:
        start = time.perf_counter()
        ids = [
            manager.add_request(prompt, max_new_tokens=limit, record_timestamps=True, eos_token_id=ends)
            for prompt, limit in zip(workload.prompts, limits, strict=True)
        ]
        outputs: dict[str, Any] = {}
        while len(outputs) < num_requests and (result := manager.get_result(timeout=60)) is not None:
            if result.is_finished():
                outputs[result.request_id] = result
        seconds = time.perf_counter() - start
    model.set_attn_implementation(before)  # generate_batch has switched the model to paged attention
    failed = [str(index) for index, one in enumerate(ids) if one not in outputs or outputs[one].error]
    if failed:
        reasons = {str(outputs[one].error) for one in ids if one in outputs and outputs[one].error}
        raise ValueError(
            f"transformers generate_batch: {len(failed)} of {num_requests} requests failed: {reasons or 'lost'}"
        )
    tokens = [list(outputs[one].generated_tokens) for one in ids]
    times = [
        TokenTimes(start, len(prompt), list(outputs[one].timestamps))
        for one, prompt in zip(ids, workload.prompts, strict=True)
    ]
    return Run(tokens, times, seconds)


def _sampling(workload: Workload) -> dict[str, Any]:
    """transformers' sampling options. All requests of a workload share them."""
    params = workload.params[0]
    if not params.temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": params.temperature, "top_k": 0, "top_p": 1.0}


def _end_tokens(model: Any, params: SamplingParams) -> list[int]:
    """Never empty: without end tokens, transformers uses those of the model."""
    eos = model.generation_config.eos_token_id
    if params.ignore_eos or eos is None:
        return [NEVER]
    return [eos] if isinstance(eos, int) else list(eos)


def _until_end(token_ids: list[int], ends: list[int]) -> list[int]:
    """Up to and including the first end token."""
    stop = next((i + 1 for i, token in enumerate(token_ids) if token in ends), len(token_ids))
    return token_ids[:stop]
