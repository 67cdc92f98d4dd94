"""The C kernels for other processors: with each set of instructions, products are right and rows keep their bits.

A build for less than this machine has runs here, too.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from c_building import forget

from paged_infer import LLM, SamplingParams
from paged_infer.kernels import attention_backends
from paged_infer.kernels.cpu import build
from paged_infer.kernels.cpu.linear import PanelProduct
from paged_infer.kernels.op_sets import C_OPS
from paged_infer.kernels.quant.product import no_kernel

PROCESSORS = {
    "x86-64": ["-march=x86-64"],
    "with AVX2": ["-march=x86-64-v3"],
    "with AVX-512": ["-march=x86-64-v4"],  # without VNNI and BF16
    "with AVX512-VNNI": ["-march=x86-64-v4", "-mavx512vnni"],
    "with AVX-VNNI": ["-march=x86-64-v3", "-mavxvnni"],
    "without AMX": ["-march=native", "-mno-amx-bf16", "-mno-amx-int8"],
}
NEEDS = {
    "with AVX2": "avx2",
    "with AVX-512": "avx512vl",
    "with AVX512-VNNI": "avx512_vnni",
    "with AVX-VNNI": "avx_vnni",
    "without AMX": "amx_bf16",
}

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or build.unavailable_reason() is not None, reason="no C kernels, or no x86-64"
)


@pytest.fixture(params=PROCESSORS)
def processor(request, tmp_path_factory, monkeypatch) -> Iterator[str]:
    """Its kernels are compiled once for all tests."""
    needed = NEEDS.get(request.param)
    if needed is not None and needed not in build._processor().split():
        pytest.skip(f"the processor has no {needed}")
    others = [flag for flag in build.FLAGS if not flag.startswith("-march")]
    monkeypatch.setattr(build, "FLAGS", others + PROCESSORS[request.param])
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # of pytest-xdist: its processes share the folder above
        folder = folder.parent
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "kernels"))
    forget()
    yield request.param
    forget()


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


def test_each_branch_of_the_integer_products_is_compiled_for_one_of_these_processors() -> None:
    source = Path(build.__file__).with_name("quant.c")
    function = re.compile(r"void add_products\(.*?\n\}", re.DOTALL)
    written = function.search(source.read_text())
    assert written is not None
    num_branches = len(re.findall(r"^#(?:if|elif|else)", written[0], re.MULTILINE))
    bodies = set()
    for flags in PROCESSORS.values():
        command = [*shlex.split(os.environ.get("CC", "cc")), "-E", "-P", *flags, "-DFLOAT32", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        compiled = function.search(done.stdout)
        assert compiled is not None
        bodies.add(" ".join(compiled[0].split()))
    assert len(bodies) == num_branches > 1
