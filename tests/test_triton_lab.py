"""What triton_lab reports of a kernel: its loads and stores, its launches, and what the compiler makes of it."""

from __future__ import annotations

import pytest
import torch
from triton_lab import H100, _in_child, compiled, launches, watched

from paged_infer.kernels.triton_runtime import HAS_TRITON, INTERPRETED, launch, tl, triton

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@triton.jit
def twice_kernel(x_ptr, out_ptr, num_items, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < num_items)
    tl.store(out_ptr + place, x + tl.load(x_ptr), mask=place < num_items)


def arguments():
    return torch.arange(1.0, 7.0, device=device), torch.zeros(2, 4, device=device)


def check(seen):
    assert (seen.num_read, seen.num_written, seen.num_moved) == (6 + 2, 6, 14)
    assert seen.reads[0].tolist() == [3, 1, 1, 1, 1, 1]  # both programs load the first element once more
    assert seen.writers[1].tolist() == [[0, 0, 0, 0], [1, 1, -1, -1]]
    assert not seen.reads[1].any() and (seen.writers[0] == -1).all()


def test_loads_and_stores_are_counted_and_the_kernel_has_run():
    x, out = arguments()
    check(watched(twice_kernel, (2,), x, out, 6, BLOCK=4))
    assert out.flatten().tolist() == [2, 3, 4, 5, 6, 7, 0, 0]


def test_a_child_process_counts_the_same():
    """Which is what happens where this process compiles kernels."""
    x, out = (argument.cpu() for argument in arguments())
    check(_in_child("_interpret", twice_kernel, ((2,), [x, out, 6], {"BLOCK": 4}), "1"))


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter is replaced for the time of a launch")
def test_afterwards_nothing_is_counted_any_more():
    from triton.runtime.interpreter import interpreter_builder

    before = interpreter_builder.create_masked_load
    watched(twice_kernel, (2,), *arguments(), 6, BLOCK=4)
    assert interpreter_builder.create_masked_load == before


def test_launches_are_named_and_run():
    x, out = arguments()
    with launches() as names:
        launch(twice_kernel, (2,), x, out, 6, BLOCK=4)
    launch(twice_kernel, (2,), x, out, 6, BLOCK=4)
    assert names == ["twice_kernel"] and out[0, 0] == 2


def test_the_compiler_is_asked_without_a_gpu():
    variants = [{"BLOCK": 1024, "num_warps": warps} for warps in (1, 8)]
    few, many = compiled(twice_kernel, *arguments(), 6, variants=variants, arch=H100)
    assert (few["num_warps"], many["num_warps"]) == (1, 8)
    assert few["registers"] > many["registers"] > 0
    assert few["shared_bytes"] == 0 and few["spill_bytes"] == 0 and many["blocks_per_sm"] == 8


def test_what_fails_in_the_child_is_an_error_here():
    with pytest.raises(RuntimeError, match="ended with status 1"):
        compiled(twice_kernel, *arguments(), 6, variants=[{"BLOCK": 3}])
