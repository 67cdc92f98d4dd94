"""KV blocks saved by sharing, with a model: samples and beams of the same prompts (Kwon 2023, section 6.3).

A block in k tables saves k - 1 blocks. The saving is measured over all steps, with the prefix cache
off, so that only sharing within a request counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paged_infer.bench.report import JsonReport
from paged_infer.llm import LLM
from paged_infer.params import BeamSearchParams, SamplingParams

# The ranges that the paper's Figure 15 gives for 2, 4 and 6 sequences, on the Alpaca traces, in percent.
PAPER = {"samples": (6.1, 9.8), "beams": (37.6, 55.2)}


@dataclass(frozen=True, slots=True)
class Saving:
    kind: str  # "samples" or "beams"
    width: int  # sequences a request
    saved: float  # share of the blocks that unshared tables would hold


@dataclass(frozen=True, slots=True)
class SharingReport(JsonReport):
    model: str
    block_size: int
    num_requests: int
    mean_prompt_tokens: float
    max_tokens: int
    machine: dict[str, Any]
    savings: list[Saving]


def measure_sharing(llm: LLM, prompts: Sequence[Sequence[int]], widths: Sequence[int], max_tokens: int) -> list[Saving]:
    """What samples at temperature 1, and beams, of every width save on ``llm``, which caches no prefixes."""
    savings = []
    for width in widths:
        params = SamplingParams(n=width, temperature=1.0, seed=0, max_tokens=max_tokens, ignore_eos=True)
        llm.engine.reset_stats()
        llm.generate(prompts, params, use_tqdm=False)
        savings.append(Saving("samples", width, llm.engine.usage.sharing_saved))
    for width in widths:
        llm.engine.reset_stats()
        llm.beam_search(prompts, BeamSearchParams(width, max_tokens, ignore_eos=True), use_tqdm=False)
        savings.append(Saving("beams", width, llm.engine.usage.sharing_saved))
    return savings
