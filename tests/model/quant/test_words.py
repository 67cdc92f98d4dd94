"""Codes of any width are packed into 32-bit words as compressed-tensors packs them, and unpacking returns them."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from quantised_folders import dense_words

from paged_infer.model.quant.words import pack_words, unpack_words


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 50, 192])
def test_words_are_those_of_compressed_tensors_and_the_codes_come_back(bits: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (3, columns), generator=torch.Generator().manual_seed(columns))
    words = pack_words(codes, bits)
    assert torch.equal(words, pack_to_int32((codes - 2 ** (bits - 1)).to(torch.int8), bits))
    assert torch.equal(words, dense_words(codes.numpy(), bits))
    assert torch.equal(unpack_words(words, bits)[:, :columns], codes.int())
