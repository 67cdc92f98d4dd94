"""The C kernels for other processors: with each set of instructions, products are right and rows keep their bits.

A build for less than this machine has runs here, too.
"""

from __future__ import annotations

import platform

import pytest
import torch
from c_building import cache_folder, forget  # noqa: F401  (a fixture)

from paged_infer import LLM, SamplingParams
from paged_infer.kernels import attention_backends
from paged_infer.kernels.cpu import build
from paged_infer.kernels.cpu.linear import PanelProduct
from paged_infer.kernels.op_sets import C_OPS
from paged_infer.kernels.quant.product import no_kernel

PROCESSORS = {
    "x86-64": ["-march=x86-64"],
    "with AVX2": ["-march=x86-64-v3"],
    "with AVX-512": ["-march=x86-64-v4"],
    "with AVX-VNNI": ["-march=x86-64-v3", "-mavxvnni"],
    "without AMX": ["-march=native", "-mno-amx-bf16", "-mno-amx-int8"],
}
NEEDS = {"with AVX2": "avx2", "with AVX-512": "avx512vl", "with AVX-VNNI": "avx_vnni", "without AMX": "amx_bf16"}

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or build.unavailable_reason() is not None, reason="no C kernels, or no x86-64"
)


@pytest.fixture(params=PROCESSORS)
def processor(request, cache_folder, monkeypatch) -> str:  # noqa: F811
    needed = NEEDS.get(request.param)
    if needed is not None and needed not in build._processor().split():
        pytest.skip(f"the processor has no {needed}")
    others = [flag for flag in build.FLAGS if not flag.startswith("-march")]
    monkeypatch.setattr(build, "FLAGS", others + PROCESSORS[request.param])
    forget()
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_right_and_a_row_keeps_its_bits(processor, dtype) -> None:
    torch.manual_seed(0)
    for rows, width, height in ((1, 64, 33), (5, 96, 203), (16, 33, 32), (17, 576, 80), (300, 192, 100)):
        weight, bias = torch.randn(height, width).to(dtype), torch.randn(height).to(dtype)
        x = torch.randn(rows, width).to(dtype)
        product = PanelProduct.of(weight, bias)
        out = product(x)
        exact = x.double() @ weight.double().T + bias.double()
        rtol = 1e-5 if dtype is torch.float32 else 2**-8 * 1.01
        torch.testing.assert_close(out.double(), exact, rtol=rtol, atol=1e-4)
        for row in {0, rows // 2, rows - 1}:
            assert torch.equal(product(x[row : row + 1])[0], out[row])


def test_an_engine_gives_the_tokens_that_torch_gives(processor, checkpoint, monkeypatch) -> None:
    """W8A8 needs inputs of the same bits, so only its products are torch's."""

    def tokens(scheme: str | None, backend: str) -> list[list[int]]:
        llm = LLM(
            str(checkpoint("qwen3")),
            attention_backend=backend,
            num_blocks=64,
            max_num_seqs=8,
            device="cpu",
            quantization=scheme,
        )
        prompts = [[*range(5, 5 + n)] for n in (1, 4, 37)]
        params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        return [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]

    for scheme in (None, "w8a16"):
        assert tokens(scheme, "c") == tokens(scheme, "torch")
    in_c = tokens("w8a8", "c")
    monkeypatch.setitem(attention_backends._OPS, "c", C_OPS._replace(pack_quantised=no_kernel))
    assert tokens("w8a8", "c") == in_c
