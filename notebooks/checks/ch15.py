"""Checkers of chapter 15, fewer bits."""

from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from my_engine import Engine
from torch import Tensor

from checks import checker, device, expect, expect_tensor
from paged_infer import LLM, SamplingParams, storyteller
from paged_infer.kernels.quant.weight import dequantise
from paged_infer.model.quant.scheme import Scheme, quantise

AWQ = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])


def _seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _words(codes: Tensor) -> Tensor:
    """Codes 0 to 15, [..., n] -> int32 [..., n / 8], number i in bits 4 i to 4 i + 3."""
    shifts = 4 * torch.arange(8, device=codes.device)
    return (codes.unflatten(-1, (-1, 8)) << shifts).sum(-1).to(torch.int32)


@checker
def unpack_awq(answer):
    """AutoAWQ's order of nibbles, along the rows of W."""
    for rows, columns in ((8, 3), (16, 8), (32, 24)):
        generator = torch.Generator().manual_seed(rows)
        right = torch.randint(16, (rows, columns), generator=generator).to(device)
        packed = _words(right.T.unflatten(1, (-1, 8))[..., AWQ.to(device)].flatten(1))
        found, asked = answer(packed.clone()), f"unpack_awq of int32 {list(packed.shape)}"
        if isinstance(found, Tensor) and found.shape == right.T.shape != right.shape:
            expect(False, f"{asked}: transpose the result; W is [N, K], and the file has K first")
        expect_tensor(found, right, asked)
        found = found.long()
        mistakes = {
            "nibbles are taken in their order; nibble 1 belongs to row 2": right.unflatten(0, (-1, 8))[:, AWQ],
            "the list was applied the wrong way round: it says where a nibble goes, not where it comes from": (
                right.unflatten(0, (-1, 8))[:, AWQ][:, AWQ]
            ),
        }
        if not found.equal(right):
            for sentence, value in mistakes.items():
                expect(not found.equal(value.flatten(0, 1)), f"{asked}: {sentence}")
            expect(not (found + 8).equal(right), f"{asked}: codes are asked for as they are stored, 0 to 15")
            expect(int(found.min()) >= 0, f"{asked}: {int(found.min())} is no code; the shift of a word keeps its sign")
        wrong = int((found != right).sum())
        expect(wrong == 0, f"{asked}: {wrong} of {right.numel()} codes are wrong")


@checker
def w8a8_product(answer):
    """A scale for each token, exact sums, and a row that does not depend on its company."""
    for tokens, rows, columns in ((3, 5, 8), (4, 16, 640)):
        x, generator = _seeded(1, tokens, columns), torch.Generator().manual_seed(2)
        x[0] *= 50  # a token of large numbers
        codes = torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8).to(device)
        scales = _seeded(3, rows).abs() / 100 + 0.001
        right, asked = _w8a8(x, codes, scales), f"w8a8_product of x [{tokens}, {columns}], codes [{rows}, {columns}]"
        found = answer(x.clone(), codes.clone(), scales.clone())
        expect_tensor(found, right, asked)
        near = 1e-5 * right.abs().amax(1, keepdim=True)
        largest = x.abs().max() / 127.5
        mistakes = {
            "all tokens share one scale here; each is to have its own": _w8a8(x, codes, scales, largest),
            "x was not rounded": F.linear(x.double(), codes.double()).float() * scales,
            "the scale is max|x| / 127.5, not / 127": _w8a8(x, codes, scales, x.abs().amax(1, keepdim=True) / 127),
            "the scales of the rows of W were left out": right / scales,
            "the scales of the tokens were left out": right / (x.abs().amax(1, keepdim=True) / 127.5),
        }
        if not bool(((found - right).abs() <= near).all()):
            for sentence, value in mistakes.items():
                expect(not torch.allclose(found, value, rtol=1e-4, atol=1e-6), f"{asked}: {sentence}")
            expect(False, f"{asked}: off by up to {(found - right).abs().max().item():.3g}. Are sums of int8 exact?")
        alone = answer(x[1:2].clone(), codes.clone(), scales.clone())
        expect(alone.equal(found[1:2]), f"{asked}: row 1 has other bits alone than among {tokens} tokens")
    zeros = answer(torch.zeros(2, 640, device=device), codes, scales)
    expect(bool((zeros == 0).all()), "a token of zeros has to give zeros, and not NaN: its scale must not be 0")


def _w8a8(x: Tensor, codes: Tensor, scales: Tensor, x_scales: Tensor | None = None) -> Tensor:
    x_scales = x.abs().amax(1, keepdim=True) / 127.5 if x_scales is None else x_scales
    rounded = (x / x_scales).round().clamp(-128, 127).double()
    return (rounded @ codes.double().T).float() * x_scales * scales


@checker
def crossover_rows(answer):
    """Where the two lines meet on three machines."""
    for name, bandwidth, flops_16, flops_8, right in (
        ("a CPU of 0.1 TB/s, 2 and 8 TFLOP/s", 1e11, 2e12, 8e12, 10),
        ("an H100", 3.35e12, 989e12, 1979e12, 148),
        ("a card with 0.3 TB/s, 65 TFLOP/s in both", 3e11, 65e12, 65e12, 109),
    ):
        found = answer(bandwidth, flops_16, flops_8)
        expect(found is not None, "crossover_rows gives None: is the `return` missing?")
        value = float(found)
        exact = flops_16 / (2 * bandwidth)
        expect(
            not math.isclose(value, math.ceil(2 * exact)) or right == math.ceil(2 * exact),
            f"{name}: a multiply-add is two operations; {value:g} counts one",
        )
        expect(
            value != math.ceil(exact / 2) and value != math.ceil(flops_16 / (4 * bandwidth)),
            f"{name}: at {value:g} rows W4A16 stops waiting for its own half bytes; W8A8 still reads longer there",
        )
        if flops_8 != flops_16:
            expect(
                value != math.ceil(flops_8 / (2 * bandwidth)),
                f"{name}: W4A16 computes in 16 bits, and yours takes the rate of 8",
            )
        expect(value == int(value), f"{name}: {value:g} rows; round up to whole ones")
        expect(
            value != math.floor(exact) or math.floor(exact) == right,
            f"{name}: at {value:g} rows W4A16 is still faster; round up",
        )
        expect(value == right, f"{name}: from {right} rows on, and yours gives {value:g}")


@checker
def packed_linear(answer):
    """Words of two group sizes and a wide layer, then the engine on the storyteller in 4 bits."""
    for rows, columns, group in ((6, 64, 32), (16, 96, 16)):
        weight, x = quantise(_seeded(4, rows, columns), Scheme(4, True, "group", group)), _seeded(5, 3, columns)
        words = weight.values.view(torch.int32)
        decoder = SimpleNamespace(weights={"a.weight_packed": words, "a.weight_scale": weight.scales})
        right, asked = F.linear(x, dequantise(weight)), f"packed_linear, W [{rows}, {columns}] in groups of {group}"
        found = answer(decoder, x.clone(), "a")
        expect_tensor(found, right, asked)
        if not torch.allclose(found, right, atol=1e-4):
            scaled = weight.scales.repeat_interleave(group, 1)
            shifted = x @ (dequantise(weight) + 8 * scaled).T
            interleaved = dequantise(weight) / scaled
            interleaved = interleaved.unflatten(1, (-1, 8))[..., AWQ.to(device)].flatten(1) * scaled
            turned = (dequantise(weight) / scaled) * weight.scales.repeat(1, group)
            mistakes = {
                "stored codes are 0 to 15, and 8 stands for 0": shifted,
                "this is AutoAWQ's order; here column i is in bits 4 i": x @ interleaved.T,
                "a scale belongs to neighbouring columns, not to every so many-th": x @ turned.T,
                "the scales were left out": x @ (dequantise(weight) / scaled).T,
            }
            for sentence, value in mistakes.items():
                expect(not torch.allclose(found, value, atol=1e-4), f"{asked}: {sentence}")
            expect(False, f"{asked}: off by up to {(found - right).abs().max().item():.3g}")
    dense = SimpleNamespace(weights={"a.weight": _seeded(6, 4, 8)})
    expect(
        torch.allclose(answer(dense, x[:, :8], "a"), F.linear(x[:, :8], dense.weights["a.weight"]), atol=1e-4),
        "a layer that stayed wide has `a.weight`, which is multiplied as before",
    )
    engine, right = _engine()
    linear = type(engine.decoder).linear
    type(engine.decoder).linear = answer
    try:
        (found,) = engine.generate(["A story about Mia and a red key."], temperature=0, max_tokens=16)
    finally:
        type(engine.decoder).linear = linear
    expect(
        found.output_token_ids == right,
        f"your engine on the storyteller in 4 bits: tokens {found.output_token_ids}, and the package's are {right}",
    )


@cache
def _engine() -> tuple[Engine, list[int]]:
    """The engine with the storyteller's layers in 4 bits, words as in a file, and the tokens of the package."""
    llm = LLM(quantization="w4a16", dtype="float32", device=device.type)
    greedy = SamplingParams(temperature=0, max_tokens=16)
    (output,) = llm.generate(["A story about Mia and a red key."], greedy, use_tqdm=False)
    engine = Engine(storyteller.PATH, device)
    weights = engine.decoder.weights
    for name in [name for name in weights if "_proj." in name]:
        few = quantise(weights.pop(name), Scheme(4, True, "group", 32))
        weights[f"{name}_packed"], weights[f"{name}_scale"] = few.values.view(torch.int32), few.scales
    return engine, output.outputs[0].token_ids
