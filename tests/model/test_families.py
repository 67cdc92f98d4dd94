"""The table of models in paged_infer/README.md is that of FAMILIES, and what is not there is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import paged_infer
from paged_infer.model.config import ModelConfig
from paged_infer.model.families import FAMILIES

README = Path(paged_infer.__file__).with_name("README.md")
# model_type -> models that people run, and what sets the family apart from Llama
RUN = {
    "deepseek_v2": ("DeepSeek-V2 and -Lite", "latent attention (MLA), experts after the first layers, shared experts"),
    "deepseek_v3": ("DeepSeek-V3, R1", "as V2, with sigmoid scores, a bias for the choice, and groups of experts"),
    "gemma": ("Gemma 2B, 7B", "norms multiply by 1 + weight, embeddings by sqrt(hidden); GELU"),
    "gemma2": ("Gemma 2 2B to 27B", "norms before and after each sublayer, soft caps, a window in every other layer"),
    "gemma3_text": ("Gemma 3 270M, 1B", "QK-norm, a window in five of six layers, with a RoPE of their own"),
    "gpt2": ("GPT-2 124M to 1.5B, DistilGPT-2", "LayerNorm, learned positions, biases, GELU"),
    "gpt_oss": ("gpt-oss 20B, 120B, in bfloat16", "experts with biases and clamped SwiGLU, sinks, alternating windows"),
    "granite": ("Granite 3.0 to 3.3", "multipliers of embeddings, scores, sublayers and logits"),
    "llama": ("Llama 2 and 3, SmolLM 1 and 2, TinyLlama, Yi", ""),
    "mistral": ("Mistral 7B", "a window in every layer"),
    "mixtral": ("Mixtral 8x7B, 8x22B", "experts instead of the MLP, 2 for each token"),
    "olmo2": ("OLMo-2 1B to 32B", "norms after the sublayers alone, QK-norm over all heads at once"),
    "olmo3": ("OLMo-3 7B, 32B", "as OLMo-2, with a window in three of four layers"),
    "phi3": ("Phi-3, Phi-3.5-mini, Phi-4 and -mini", "one matrix for q, k, v, one for gate, up; partial RoPE"),
    "qwen2": ("Qwen2 and 2.5, 0.5B to 72B", "biases of q, k and v"),
    "qwen2_moe": ("Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B", "as Qwen2, with experts and a gated shared expert"),
    "qwen3": ("Qwen3 0.6B to 32B", "QK-norm in each head"),
    "qwen3_moe": ("Qwen3-30B-A3B, Qwen3-235B-A22B", "as Qwen3, with experts in all layers or some"),
    "smollm3": ("SmolLM3 3B", "every fourth layer has no RoPE"),
}  # fmt: skip
# model_type -> models that people try and that do not run, with what is missing
REFUSED = {
    "bloom": ("BLOOM", "ALiBi"),
    "falcon": ("Falcon", "attention and MLP in parallel"),
    "gemma3": ("Gemma 3 4B to 27B", "images"),
    "glm4": ("GLM-4", "its names of tensors"),
    "gpt_neox": ("Pythia", "attention and MLP in parallel"),
    "lfm2": ("LFM2", "convolutions with a state"),
    "llama4": ("Llama 4", "attention in chunks"),
    "mamba": ("Mamba", "no attention: a state instead of a KV cache"),
    "opt": ("OPT", "its own learned positions"),
    "phi": ("Phi-1.5, Phi-2", "attention and MLP in parallel"),
    "qwen3_next": ("Qwen3-Next", "linear attention with a state"),
}


def table() -> str:
    run = [f"| `{name}` | {models} | {what} |" for name, (models, what) in sorted(RUN.items())]
    refused = [f"{models} (`{name}`: {why})" for name, (models, why) in sorted(REFUSED.items())]
    return "\n".join(
        [
            "| `model_type` | these run, for example | differences from Llama |",
            "|---|---|---|",
            *run,
            "",
            "These do not, and are refused by name: " + ", ".join(refused) + ".",
            "",
        ]
    )


def test_the_readme_lists_exactly_the_families_that_run() -> None:
    assert RUN.keys() == FAMILIES.keys()
    assert table() in README.read_text(), f"paste into {README}:\n\n{table()}"


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_readme_says_does_not_run_is_refused_with_the_list_of_what_does(name: str) -> None:
    with pytest.raises(ValueError, match=f"model_type='{name}': must be one of deepseek_v2, "):
        ModelConfig.from_hf({"model_type": name})


def test_every_name_is_one_of_transformers() -> None:
    assert RUN.keys() | REFUSED.keys() <= {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "gemma3"}
