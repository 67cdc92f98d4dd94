"""Quantised models on the Triton backend: its products are used, and the tokens are those of the reference."""

from __future__ import annotations

import pytest
import torch

from paged_infer import SamplingParams
from paged_infer.execution.cuda_graphs import uses_graphs
from paged_infer.kernels import attention_backends
from paged_infer.kernels.attention_backends import triton_backend
from paged_infer.kernels.op_sets import TORCH_OPS, TRITON_OPS
from paged_infer.kernels.quant.gemm import TritonProduct
from paged_infer.kernels.triton_runtime import can_run_on


@pytest.mark.skipif(not can_run_on(torch.device("cpu")), reason="needs triton's interpreter")
def test_it_gives_the_tokens_of_the_reference(make_llm, monkeypatch) -> None:
    """The other operations stay in torch, because the interpreter is slow."""
    prompts, params = [[5, 9, 2, 7], [11]], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    found = []
    for ops in (TORCH_OPS._replace(pack_quantised=TRITON_OPS.pack_quantised), TORCH_OPS):
        monkeypatch.setitem(attention_backends._OPS, "torch", ops)
        llm = make_llm("llama3", quantization="w8a8", attention_backend="torch")
        outputs = llm.generate(prompts, params, use_tqdm=False)
        found.append([output.outputs[0].token_ids for output in outputs])
        modules = llm.engine.executor.runner.decoder.modules()
        are_ours = [isinstance(getattr(module, "product", None), TritonProduct) for module in modules]
        assert any(are_ours) == (ops is not TORCH_OPS)
    assert found[0] == found[1]


def test_quantised_experts_prevent_cuda_graphs_with_a_warning(make_llm, caplog) -> None:
    gpu, of_experts = (
        torch.device("cuda"),
        [make_llm("mixtral", quantization=scheme).engine.executor.runner.decoder for scheme in ("w8a16", None)],
    )
    assert [uses_graphs(None, gpu, triton_backend, decoder) for decoder in of_experts] == [False, True]
    assert "quantised experts have no kernel" in caplog.text
    with pytest.raises(ValueError, match="enforce_eager=False requests CUDA graphs, but quantised experts"):
        uses_graphs(False, gpu, triton_backend, of_experts[0])
