"""Ranks that compute one model together give the logits and tokens of one rank, whatever the family, weights or cache.

Sums of parts round differently, so bits may differ from one rank's, but not between the ranks. These are threads, which
meet in memory (``ranks``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from checkpoints import FAMILIES, VOCAB, save_random_checkpoint
from decoding import IDS, logits
from ranks import on_ranks
from torch import Tensor

from paged_infer.model.config import ModelConfig
from paged_infer.model.decoder import Decoder
from paged_infer.model.loading.load import load_decoder
from paged_infer.model.parallel import Collective, Traffic

WIDTH_NORMS = ("olmo2", "olmo3")


class Rank(NamedTuple):
    logits: Tensor
    traffic: Traffic
    num_bytes: int
    config: ModelConfig


def ranks_of(folder: Path, size: int = 2, **options: Any) -> list[Rank]:
    def work(parallel: Collective) -> Rank:
        decoder = load_decoder(folder, torch.float32, parallel=parallel, **options)
        found = logits(decoder, IDS)
        return Rank(found, parallel.traffic, num_bytes(decoder), decoder.config)

    return on_ranks(size, work)


def num_bytes(decoder: Decoder) -> int:
    return sum(tensor.nbytes for tensor in (*decoder.parameters(), *decoder.buffers()))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_give_the_logits_of_one_by_two_sums_a_layer(family, checkpoint) -> None:
    """One more sum for the embedding, one gather for the head; where a norm spans all heads, one more sum a layer."""
    whole = load_decoder(checkpoint(family), torch.float32)
    expected, layers = logits(whole, IDS), whole.config.num_layers
    first, second = ranks_of(checkpoint(family))
    assert torch.equal(first.logits, second.logits)
    torch.testing.assert_close(first.logits, expected, atol=5e-5, rtol=1e-5)
    assert torch.equal(first.logits.argmax(-1), expected.argmax(-1))
    sums = (3 if family in WIDTH_NORMS else 2) * layers + 1
    of_norms = layers * len(IDS) * 2 * 4 if family in WIDTH_NORMS else 0
    wide, own_logits = whole.config.hidden_size, -(-VOCAB // 2)
    moved = 4 * len(IDS) * ((2 * layers + 1) * wide + own_logits) + of_norms
    assert first.traffic == second.traffic == Traffic(sums, 1, moved)


EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module")
def eight_heads(tmp_path_factory) -> Callable[..., Path]:
    """A checkpoint of the family with 8 heads, and 2 for keys and values."""

    def make(family: str, **settings: Any) -> Path:
        folder = tmp_path_factory.mktemp("eight")
        return save_random_checkpoint(family, folder, **{**EIGHT, "head_dim": 16, **settings})

    return make


@pytest.mark.parametrize(("family", "size"), [("qwen3-untied", 4), ("olmo2", 8), ("phi3", 4), ("gpt-oss", 4)])
def test_more_ranks_than_heads_of_keys_hold_them_several_times(family, size, eight_heads) -> None:
    folder = eight_heads(family)
    expected = logits(load_decoder(folder, torch.float32), IDS)
    ranks = ranks_of(folder, size)
    assert all(torch.equal(rank.logits, ranks[0].logits) for rank in ranks)
    torch.testing.assert_close(ranks[0].logits, expected, atol=5e-5, rtol=1e-5)
