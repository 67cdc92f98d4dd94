"""A quantised matrix has one form in memory, which ``dequantise`` decodes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paged_infer.kernels.quant.weight import QuantisedWeight, dequantise, pack_int4, unpack_int4


def test_it_stands_for_code_minus_zero_times_the_scale_of_its_group() -> None:
    values = torch.tensor([[-2, 1, 0, 3]], dtype=torch.int8)
    weight = QuantisedWeight(values, torch.tensor([[0.5, 2.0]]), torch.tensor([[1.0, 0.0]]), 3, 2, (1, 4))
    assert dequantise(weight).tolist() == [[-1.5, 0.0, 0.0, 6.0]]


def test_packed_codes_are_unsigned_with_the_even_column_in_the_low_bits() -> None:
    values = torch.tensor([[0xF0, 0x9A]], dtype=torch.uint8)
    symmetric = QuantisedWeight(values, torch.ones(1, 1), None, 4, 4, (1, 4))
    assert dequantise(symmetric).tolist() == [[-8.0, 7.0, 2.0, 1.0]]
    assert dequantise(replace(symmetric, zeros=torch.tensor([[10.0]]))).tolist() == [[-10.0, 5.0, 0.0, -1.0]]


def test_columns_list_the_stored_column_of_each_input() -> None:
    weight = QuantisedWeight(
        torch.tensor([[1, 2, 3]], dtype=torch.int8), torch.ones(1, 1), None, 8, 3, (1, 3), torch.tensor([2, 0, 1])
    )
    assert dequantise(weight).tolist() == [[3.0, 1.0, 2.0]]


@given(st.lists(st.integers(0, 15), min_size=2, max_size=40).filter(lambda codes: len(codes) % 2 == 0))
def test_packing_is_undone_by_unpacking(codes: list[int]) -> None:
    packed = pack_int4(torch.tensor([codes]))
    assert packed.shape == (1, len(codes) // 2)
    assert unpack_int4(packed).tolist() == [codes]


def test_an_odd_number_of_columns_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="3 columns"):
        pack_int4(torch.zeros(2, 3))


@pytest.mark.parametrize("name", ["values", "scales", "zeros", "columns"])
def test_a_tensor_of_another_shape_is_named(name: str) -> None:
    good = QuantisedWeight(
        torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, 2), torch.zeros(2, 2), 8, 4, (2, 8), torch.arange(8)
    )
    with pytest.raises(ValueError, match=f"{name} has shape .* for W \\[2, 8\\]"):
        replace(good, **{name: torch.ones(3, 3, dtype=torch.int8)})
    with pytest.raises(ValueError, match="group_size=3: must divide the 8 columns"):
        replace(good, group_size=3)
