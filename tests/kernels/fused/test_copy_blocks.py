"""copy_blocks: the named blocks of every cache, and nothing else, in one launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_infer.kernels.fused.copy_blocks import copy_blocks, copy_blocks_reference
from paged_infer.kernels.triton_runtime import launches_go_to

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)


@st.composite
def pairs(draw, num_blocks: int) -> tuple[list[int], list[int]]:
    """Sources, which may repeat, and destinations, which are none of them and do not repeat."""
    order = draw(st.permutations(range(num_blocks)))
    num_read = draw(st.integers(1, num_blocks))
    written = order[num_read:][: draw(st.integers(0, 4))]
    return [draw(st.sampled_from(order[:num_read])) for _ in written], written


@pytest.mark.parametrize("copy", [copy_blocks, copy_blocks_reference])
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from([1, 3, 16]), st.integers(1, 3), st.sampled_from([1, 5, 8, 24])), max_size=4
    ),
    num_blocks=st.integers(1, 7),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    data=st.data(),
)
@settings(max_examples=25)
def test_destinations_become_their_sources_in_caches_of_any_shape_and_dtype(
    copy, shapes, num_blocks, index_dtype, data
) -> None:
    caches = [torch.randint(0, 200, (num_blocks, *shape)).to(data.draw(st.sampled_from(DTYPES))) for shape in shapes]
    before = [cache.clone() for cache in caches]
    read, written = data.draw(pairs(num_blocks))
    copy(caches, torch.tensor(read, dtype=index_dtype), torch.tensor(written, dtype=index_dtype))
    for cache, old in zip(caches, before, strict=True):
        for block in range(num_blocks):
            origin = read[written.index(block)] if block in written else block
            assert torch.equal(cache[block], old[origin])


def test_nan_and_its_bits_are_copied_too() -> None:
    bits = torch.tensor([[0x7FC00001], [0], [-1]], dtype=torch.int32)
    cache = bits.view(torch.float32)
    copy_blocks([cache], torch.tensor([0]), torch.tensor([1]))
    assert bits.flatten().tolist() == [0x7FC00001, 0x7FC00001, -1]


def test_a_block_larger_than_a_program_is_copied_whole() -> None:
    cache = torch.randn(3, 16, 5, 32)  # 10,240 bytes a block
    copy_blocks([cache], torch.tensor([2]), torch.tensor([0]))
    assert torch.equal(cache[0], cache[2]) and not torch.equal(cache[0], cache[1])


def test_all_layers_take_one_launch() -> None:
    grids = []
    caches = [torch.zeros(8, 16, 8, 128, device="meta") for _ in range(2 * 28)]
    with launches_go_to(lambda kernel, grid, args, named: grids.append(grid), (9, 0)):
        index = torch.empty(5, dtype=torch.int32, device="meta")
        copy_blocks(caches, index, index)
    assert grids == [(5, 56, 16)]


CACHES = [torch.zeros(4, 2, 2, 4), torch.zeros(4, 2, 2, 4)]
GOOD: dict[str, Any] = {"caches": CACHES, "sources": torch.tensor([0, 0]), "destinations": torch.tensor([1, 2])}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sources": torch.tensor([0])}, r"sources \[1\], destinations \[2\]"),
        ({"sources": torch.tensor([[0, 0]]), "destinations": torch.tensor([[1, 2]])}, r"sources \[1, 2\]"),
        ({"sources": torch.tensor([0.0, 0.0])}, "sources torch.float32"),
        ({"caches": [CACHES[0], torch.zeros(3, 2, 2, 4)]}, r"cache 1 \[3, 2, 2, 4\]"),
        ({"caches": [torch.zeros(4, 2, 4, 2).mT]}, r"strides \(16, 8, 1, 2\)"),
        ({"caches": [torch.zeros(4, 2, device="meta")]}, "cache 0 torch.float32 on meta"),
        ({"destinations": torch.tensor([1, 4])}, r"blocks \[4\] must be within 0\.\.3"),
        ({"sources": torch.tensor([0, -1])}, r"blocks \[-1\] must be within 0\.\.3"),
        ({"destinations": torch.tensor([1, 1])}, r"\[1, 1\] is repeated"),
        ({"destinations": torch.tensor([1, 0])}, r"one of the sources \[0, 0\]"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shape(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        copy_blocks(**{**GOOD, **wrong})
