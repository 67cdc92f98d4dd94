"""Checkers of chapter 14, many models."""

from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from my_engine import Decoder, Engine
from torch import Tensor

from checks import checker, device, expect, expect_tensor
from paged_infer import LLM, SamplingParams, storyteller

V3 = {
    "hidden_size": 7168, "intermediate_size": 18_432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 256, "num_experts_per_tok": 8,
}  # fmt: skip
LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
QWEN = {**LLAMA, "hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 28, "head_dim": 128}


@checker
def kv_bytes(answer):
    """GQA with and without head_dim, and MLA."""
    for name, config, tokens, right in (
        ("Llama-3-8B", LLAMA, 3, 393_216),
        ("Qwen3-0.6B, whose heads are wider than hidden_size / heads,", QWEN, 2, 229_376),
        ("DeepSeek-V3", V3, 1, 70_272),
        ("DeepSeek-V3", V3, 131_072, 9_210_691_584),
    ):
        found = answer(dict(config), tokens)
        case = f"{name} with {tokens:,} tokens"
        expect(found is not None, "kv_bytes gives None: is the `return` missing?")
        found, layers = float(found), config["num_hidden_layers"]
        expect(
            found != right / 2,
            f"{case}: half of what it should be. Keys and values, 2 bytes a number, and head_dim if it is given",
        )
        expect(found != right / layers, f"{case}: this is one layer's, and there are {layers}")
        group = config["num_attention_heads"] // config["num_key_value_heads"]
        if config is V3:
            expect(found != right * 1088 / 576, f"{case}: values were counted as well as their latent")
            expect(found != right * 2, f"{case}: the latent is stored once, not as a key and as a value")
            expect(found != right * 512 / 576, f"{case}: the rotated key of 64 numbers is cached, too")
            expanded = right * 128 * 320 / 576, right * 128 * 2 * 56 / 576, right * 128 * 256 / 576
            expect(found not in expanded, f"{case}: these are keys and values of 128 heads, and MLA caches neither")
        else:
            expect(found != right * group, f"{case}: KV heads are stored, not query heads")
        expect(found == right, f"{case} takes {right:,} bytes, and yours gives {found:,.0f}")


@checker
def activation_gib(answer):
    """Hidden states, the dense MLP and the rows gathered for routed experts."""
    small = {**V3, "hidden_size": 1024, "intermediate_size": 3072, "num_experts_per_tok": 4}
    for config, tokens, right in ((V3, 131_072, (1.75, 4.5, 14.0)), (small, 2**20, (2.0, 6.0, 8.0))):
        found = answer(dict(config), tokens)
        case = f"hidden_size {config['hidden_size']:,}, {tokens:,} tokens"
        expect(found is not None, "activation_gib gives None: is the `return` missing?")
        expect(len(tuple(found)) == 3, f"{case}: three sizes are asked for")
        for number, (value, wanted) in enumerate(zip(map(float, found), right, strict=True)):
            name = ("hidden states", "the dense MLP", "the rows for routed experts")[number]
            expect(not math.isclose(value, wanted * 2**30), f"{case}, {name}: these are bytes, and GiB are asked for")
            expect(
                not math.isclose(value, wanted * 2**30 / 1e9),
                f"{case}, {name}: {value:.2f} is in GB of 1e9 bytes, and a GiB has 2^30",
            )
            expect(not math.isclose(value, 2 * wanted), f"{case}, {name}: a number has 16 bits, which are 2 bytes")
            if number == 2:
                inner = 2 * tokens * config["num_experts_per_tok"] * config["moe_intermediate_size"] / 2**30
                every = wanted * config["n_routed_experts"] / config["num_experts_per_tok"]
                expect(not math.isclose(value, inner), f"{case}, {name}: what experts read is as wide as the stream")
                expect(not math.isclose(value, every), f"{case}, {name}: a token goes to few experts, not to all")
            expect(math.isclose(value, wanted), f"{case}, {name}: {wanted} GiB, and yours gives {value:.4g}")


@checker
def product_us(answer):
    """Both sides of an H100's ridge, and of a CPU's."""
    for device_name, bandwidth, peak in (("an H100", 3.35e12, 989e12), ("a CPU of 0.1 TB/s and 2 TFLOP/s", 1e11, 2e12)):
        for rows in (32, 4096):
            width, case = 7168, f"{rows:,} rows on {device_name}"
            moving, computing = 2 * (2 * rows * width + width**2) / bandwidth, 2 * rows * width**2 / peak
            found = answer(rows, width, bandwidth, peak)
            expect(found is not None, "product_us gives None: is the `return` missing?")
            expect(isinstance(found, tuple) and len(found) == 2, "product_us has to give two things: a time and a name")
            value, limit = float(found[0]), found[1]
            right, name = 1e6 * max(moving, computing), "memory" if moving > computing else "compute"

            def is_near(other, value=value):
                return math.isclose(value, other, rel_tol=1e-6)

            expect(not is_near(right / 1e6), f"{case}: these are seconds, and microseconds are asked for")
            expect(
                not is_near(1e6 * (moving + computing)), f"{case}: both go on at the same time; the longer one counts"
            )
            expect(not is_near(1e6 * min(moving, computing)), f"{case}: this is the shorter of the two times")
            expect(not is_near(5e5 * computing), f"{case}: a multiply-add is two operations")
            bare = 2 * width**2 / bandwidth
            expect(not is_near(1e6 * bare), f"{case}: the rows and the results are moved, too, not the weights alone")
            expect(is_near(right), f"{case} take {right:.1f} µs, and yours gives {value:.1f}")
            expect(limit == name, f"{case} are limited by {name}, and yours says {limit!r}")


@checker
def moe_mlp(answer):
    """The MLP of my_engine for a Qwen3-MoE of 6 experts, of which a token takes 2."""
    for normalised in (True, False):
        decoder = _Recording(normalised)
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(4)).to(device)
        right = _moe(decoder, x)
        asked = f"moe_mlp of x [3, 16], 2 of 6 experts, norm_topk_prob {normalised}"
        decoder.used.clear()
        found = answer(decoder, x.clone(), 1)
        expect_tensor(found, right, asked)
        mistakes = {
            "the stream is added by the decoder, so give what is to be added": x + right,
            "experts and router read the normed rows: post_attention_layernorm comes first": _moe(
                decoder, x, norm=False
            ),
            "an expert's result counts by its score": _moe(decoder, x, weighs=False),
            "softmax comes before the choice: the scores are shares of all experts": _moe(decoder, x, late=True),
            "gate and up are exchanged": _moe(decoder, x, swaps=True),
        }
        other = "scores are divided by their sum only if norm_topk_prob is true"
        if normalised:
            other = "norm_topk_prob is True here: divide the scores by their sum"
        mistakes[other] = _moe(decoder, x, flips=True)
        if not torch.allclose(found, right, atol=1e-4):
            for sentence, value in mistakes.items():
                expect(not torch.allclose(found, value, atol=1e-4), sentence)
        worst = (found - right).abs().max().item()
        expect(torch.allclose(found, right, atol=1e-4), f"{asked}: off by up to {worst:.2g}")
        expect(
            decoder.used == _hit(decoder, x),
            f"experts {sorted(decoder.used)} were computed, and the router chose {sorted(_hit(decoder, x))}",
        )
    engine = Engine(storyteller.MOE_PATH, device, num_blocks=16)
    engine.decoder.mlp = lambda x, layer: answer(engine.decoder, x, layer)
    (found,) = engine.generate(["Once upon a time"], temperature=0, max_tokens=16)
    expect(
        found.output_token_ids == _package_tokens(),
        f"in your engine storyteller-moe continues with tokens {found.output_token_ids}, in the package with "
        f"{_package_tokens()}: does the function hold for any number of experts, widths and layers?",
    )


@cache
def _package_tokens() -> list[int]:
    llm = LLM("storyteller-moe", device=device.type, dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=16)
    return llm.generate("Once upon a time", params, use_tqdm=False)[0].outputs[0].token_ids


class _Recording(Decoder):
    """A decoder with one layer of experts, number 1, and nothing else; it notes which experts compute."""

    def __init__(self, normalised: bool) -> None:
        self.config = SimpleNamespace(
            rms_norm_eps=1e-6, num_experts=6, num_experts_per_tok=2, norm_topk_prob=normalised, hidden_size=16
        )
        shapes = {"post_attention_layernorm": (16,), "mlp.gate": (6, 16)}
        for expert in range(6):
            shapes |= {f"mlp.experts.{expert}.{name}_proj": (10, 16) for name in ("gate", "up")}
            shapes[f"mlp.experts.{expert}.down_proj"] = (16, 10)
        dice = torch.Generator().manual_seed(3)
        self.weights = {
            f"layers.1.{name}.weight": torch.randn(shape, generator=dice).to(device) / 3
            for name, shape in shapes.items()
        }
        self.used: set[int] = set()

    def linear(self, x: Tensor, name: str) -> Tensor:
        if ".experts." in name:
            self.used.add(int(name.split(".")[4]))
        return super().linear(x, name)


def _hit(decoder: _Recording, x: Tensor) -> set[int]:
    w = decoder.weights
    normed = F.rms_norm(x, (16,), w["layers.1.post_attention_layernorm.weight"], 1e-6)
    return set((normed @ w["layers.1.mlp.gate.weight"].T).topk(2).indices.flatten().tolist())


def _moe(
    decoder: _Recording,
    x: Tensor,
    *,
    norm: bool = True,
    weighs: bool = True,
    late: bool = False,
    swaps: bool = False,
    flips: bool = False,
) -> Tensor:
    """All experts for all rows, then the chosen ones; or one of the mistakes in it."""
    w = {name.removeprefix("layers.1."): tensor for name, tensor in decoder.weights.items()}
    if norm:
        x = F.rms_norm(x, (16,), w["post_attention_layernorm.weight"], 1e-6)
    logits = x @ w["mlp.gate.weight"].T
    scores, chosen = logits.softmax(-1).topk(2)
    if late:
        scores = logits.gather(1, chosen)
    if decoder.config.norm_topk_prob != flips:
        scores = scores / scores.sum(-1, keepdim=True)
    every = []
    for expert in range(6):
        gate, up, down = (w[f"mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        gate, up = (up, gate) if swaps else (gate, up)
        every.append((F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    rows = torch.stack(every, dim=1).gather(1, chosen[..., None].expand(-1, -1, 16))  # [T, 2, 16]
    return (rows * scores[..., None] if weighs else rows).sum(dim=1)
