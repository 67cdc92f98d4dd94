"""What the GPU tests of kernels share: random tensors on the device, and how near a result must be.

Those tests need nothing but torch, triton and pytest (no hypothesis, no conftest), so that ``make gpu`` can run them on
a bare machine.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    rng = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, device=DEVICE, generator=rng).to(dtype)


def assert_near(out: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[out.dtype]
    torch.testing.assert_close(out.double(), expected.double(), atol=tolerance, rtol=tolerance)
