"""Ranks that compute one model together give the logits and tokens of one rank, whatever the family or the cache.

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

from paged_infer import storyteller
from paged_infer.cache.contiguous import ContiguousCache
from paged_infer.cache.paged import PagedCache
from paged_infer.cache.spec import Cache
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.attention_backends import ATTENTION_BACKENDS
from paged_infer.kernels.op_sets import C_OPS, TORCH_OPS, Ops
from paged_infer.model.config import ModelConfig
from paged_infer.model.decoder import Decoder
from paged_infer.model.loading import safetensors as on_disk
from paged_infer.model.loading.load import checkpoint_views, load_decoder
from paged_infer.model.parallel import ALONE, Collective, Traffic
from paged_infer.model.rank_config import config_of_rank

WIDTH_NORMS = ("olmo2", "olmo3")
BLOCK = 4


def generated(decoder: Decoder, cache: Cache, num_tokens: int) -> list[int]:
    """Greedy tokens after ``IDS``, which are computed in two chunks; the blocks of a paged cache are in disorder."""
    table = torch.randperm(16, generator=torch.Generator().manual_seed(0), dtype=torch.int32)

    def next_token(token_ids: list[int], start: int) -> int:
        end = start + len(token_ids)
        positions = torch.arange(start, end)
        step = AttentionMetadata(
            positions=positions,
            slot_mapping=table[positions // BLOCK].long() * BLOCK + positions % BLOCK,
            query_start_loc=torch.tensor([0, len(token_ids)], dtype=torch.int32),
            seq_lens=torch.tensor([end], dtype=torch.int32),
            block_tables=table[None],
            num_decodes=int(len(token_ids) == 1),
            max_query_len=len(token_ids),
            max_seq_len=end,
        )
        hidden = decoder(torch.tensor(token_ids), cache, step)
        return int(decoder.logits(hidden[-1:]).argmax())

    next_token(IDS[:11], 0)
    token_ids = [next_token(IDS[11:], 11)]
    while len(token_ids) < num_tokens:
        token_ids.append(next_token(token_ids[-1:], len(IDS) + len(token_ids) - 1))
    return token_ids


def paged(decoder: Decoder, backend: str = "c", kv_cache_dtype: str = "auto") -> PagedCache:
    spec = decoder.kv_spec(kv_cache_dtype)
    return PagedCache(spec, 16, BLOCK, ATTENTION_BACKENDS[backend], ops=decoder.ops)


class Result(NamedTuple):
    logits: Tensor
    traffic: Traffic
    token_ids: list[int]


def result(folder: Path, parallel: Collective = ALONE, ops: Ops = C_OPS) -> Result:
    decoder = load_decoder(folder, torch.float32, ops=ops, parallel=parallel)
    parallel.traffic.reset()
    found = logits(decoder, IDS)
    traffic = Traffic(parallel.traffic.all_reduces, parallel.traffic.all_gathers, parallel.traffic.num_bytes)
    return Result(found, traffic, generated(decoder, paged(decoder), 8))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_give_the_logits_and_tokens_of_one_by_two_sums_a_layer(family, checkpoint) -> None:
    """One more sum for the embedding, one gather for the head; where a norm spans all heads, one more sum a layer."""
    folder = checkpoint(family)
    whole, config = result(folder), ModelConfig.from_pretrained(folder)
    first, second = on_ranks(2, lambda parallel: result(folder, parallel))
    assert torch.equal(first.logits, second.logits)
    torch.testing.assert_close(first.logits, whole.logits, atol=5e-5, rtol=1e-5)
    assert whole.token_ids == first.token_ids == second.token_ids
    layers, of_norms = config.num_layers, family in WIDTH_NORMS
    numbers = (2 * layers + 1) * config.hidden_size + -(-VOCAB // 2) + of_norms * layers * 2  # of a token
    expected = Traffic((2 + of_norms) * layers + 1, 1, numbers * len(IDS) * 4)
    assert first.traffic == second.traffic == expected
    assert whole.traffic.calls == 0


@pytest.fixture(scope="module")
def eight_heads(tmp_path_factory) -> Callable[[str], Path]:
    """A checkpoint of the family with 8 heads, and 2 for keys and values."""

    def make(family: str) -> Path:
        sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
        sizes |= {"hidden_size": 128, "intermediate_size": 256}
        return save_random_checkpoint(family, tmp_path_factory.mktemp("eight"), **sizes)

    return make


@pytest.mark.parametrize(("family", "size"), [("qwen3-untied", 4), ("olmo2", 8), ("phi3", 4), ("gpt-oss", 4)])
def test_key_heads_that_are_fewer_than_ranks_are_held_several_times(family, size, eight_heads) -> None:
    folder = eight_heads(family)
    whole = result(folder)
    ranks = on_ranks(size, lambda parallel: result(folder, parallel))
    assert all(torch.equal(rank.logits, ranks[0].logits) for rank in ranks)
    torch.testing.assert_close(ranks[0].logits, whole.logits, atol=5e-5, rtol=1e-5)
    assert all(rank.token_ids == whole.token_ids for rank in ranks)
    cached = on_ranks(
        size, lambda parallel: Decoder(ModelConfig.from_pretrained(folder), TORCH_OPS, parallel).kv_spec()
    )
    assert {layer.num_kv_heads for spec in cached for layer in spec} == {1}


CACHES: dict[str, Callable[[Decoder], Cache]] = {
    "contiguous": lambda decoder: ContiguousCache(decoder.kv_spec(), 64, [0]),
    "torch": lambda decoder: paged(decoder, "torch"),
    **{kind: lambda decoder, kind=kind: paged(decoder, "c", kind) for kind in ("int8", "fp8", "fp8_e5m2")},  # type: ignore[misc]
}


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, kind) for family in ("gpt2", "gemma2", "gpt-oss") for kind in CACHES]
    + [("deepseek3", "contiguous"), ("deepseek3", "torch")],
)
def test_every_cache_holds_a_ranks_own_heads(family, kind, checkpoint) -> None:
    """Of latents, which are the same for all heads, each rank holds all."""
    ops = C_OPS if kind in ("int8", "fp8", "fp8_e5m2") else TORCH_OPS

    def tokens(parallel: Collective) -> list[int]:
        decoder = load_decoder(checkpoint(family), torch.float32, ops=ops, parallel=parallel)
        return generated(decoder, CACHES[kind](decoder), 8)

    assert on_ranks(2, tokens) == [tokens(ALONE)] * 2


class Counted:
    """A file of safetensors, or a tensor in it, that counts the bytes that are read."""

    def __init__(self, inner: Any, num_read: list[int]) -> None:
        self.inner, self.num_read = inner, num_read

    def __enter__(self) -> Counted:
        self.inner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def get_slice(self, name: str) -> Counted:
        return Counted(self.inner.get_slice(name), self.num_read)

    def get_tensor(self, name: str) -> Tensor:
        return self._read(self.inner.get_tensor(name))

    def __getitem__(self, place: Any) -> Tensor:
        return self._read(self.inner[place])

    def _read(self, tensor: Tensor) -> Tensor:
        self.num_read.append(tensor.nbytes)
        return tensor


def test_a_rank_of_two_has_at_most_55_percent_of_the_weights_and_reads_no_more(monkeypatch) -> None:
    """Of the storyteller, whose norms both have."""
    num_read, opened = list[int](), on_disk.safe_open
    monkeypatch.setattr(on_disk, "safe_open", lambda *args, **options: Counted(opened(*args, **options), num_read))

    def held(parallel: Collective) -> int:
        decoder = load_decoder(storyteller.PATH, torch.float32, ops=C_OPS, parallel=parallel)
        return sum(tensor.nbytes for tensor in (*decoder.parameters(), *decoder.buffers()))

    whole, of_file = held(ALONE), sum(num_read)
    num_read.clear()
    assert all(part <= 0.55 * whole for part in on_ranks(2, held))
    assert of_file <= sum(num_read) <= 1.1 * of_file


def test_random_weights_are_those_of_one_rank(eight_heads) -> None:
    for family in ("qwen3-untied", "gpt-oss", "phi3"):
        folder = eight_heads(family)
        for quantization in (None, "w4a16"):

            def random(parallel: Collective, folder=folder, quantization=quantization) -> Tensor:
                decoder = load_decoder(
                    folder, torch.float32, dummy_seed=5, parallel=parallel, quantization=quantization
                )
                return logits(decoder, IDS)

            for found in on_ranks(4, random):
                torch.testing.assert_close(found, random(ALONE), atol=1e-5, rtol=1e-4)


def test_in_bfloat16_ranks_have_the_same_bits_and_one_ranks_accuracy(checkpoint) -> None:
    def of(parallel: Collective) -> Tensor:
        return logits(load_decoder(checkpoint("llama3"), torch.bfloat16, ops=C_OPS, parallel=parallel), IDS).float()

    first, second = on_ranks(2, of)
    floats = result(checkpoint("llama3")).logits
    assert torch.equal(first, second)
    assert (first - floats).norm() < 1.2 * (of(ALONE) - floats).norm()


def test_a_rows_bits_depend_on_no_other_row(checkpoint) -> None:
    def rows(parallel: Collective) -> list[Tensor]:
        decoder = load_decoder(checkpoint("olmo2"), torch.float32, ops=C_OPS, parallel=parallel)
        return [logits(decoder, IDS[:count])[0] for count in (1, 2, 7, 18)]

    for alone, *others in on_ranks(2, rows):
        assert all(torch.equal(alone, other) for other in others)


def test_only_a_rank_that_is_alone_computes_all_layers_by_one_call(checkpoint) -> None:
    def has_one(parallel: Collective) -> bool:
        return load_decoder(checkpoint("llama3"), torch.float32, ops=C_OPS, parallel=parallel).whole_layers is not None

    assert has_one(ALONE)
    assert on_ranks(2, has_one) == [False, False]


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("llama3", 4, "does not divide num_attention_heads=6; these numbers of ranks would do: 1, 2"),
        ("gpt2-untied", 4, "does not divide intermediate_size=150; these numbers of ranks would do: 1, 2"),
        ("mixtral", 3, "does not divide the experts' intermediate size=52; these numbers of ranks would do: 1, 2"),
        ("qwen2-moe", 3, "does not divide intermediate_size=272; these numbers of ranks would do: 1, 2"),
        ("deepseek2", 3, "does not divide intermediate_size=272; these numbers of ranks would do: 1, 2"),
        ("llama3", 0, "must be at least 1"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_with_what_would_do(family, size, message, checkpoint) -> None:
    with pytest.raises(ValueError, match=f"^tensor_parallel_size={size}: {message}$"):
        config_of_rank(ModelConfig.from_pretrained(checkpoint(family)), size)


def test_key_heads_and_a_vocabulary_that_do_not_fit_are_refused() -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 1, "head_dim": 8}
    sizes |= {"family": "llama", "max_position_embeddings": 64, "num_heads": 12, "num_kv_heads": 4}
    message = r"tensor_parallel_size=6: neither divides num_key_value_heads=4 nor is a multiple of it; .*: 1, 2, 4, 12$"
    with pytest.raises(ValueError, match=message):
        config_of_rank(ModelConfig(vocab_size=100, **sizes), 6)
    with pytest.raises(ValueError, match=r"tensor_parallel_size=4: too many for vocab_size=3; .*: 1, 2$"):
        config_of_rank(ModelConfig(vocab_size=3, **sizes), 4)


def test_what_needs_the_whole_model_is_refused_on_a_rank(checkpoint) -> None:
    def views(parallel: Collective) -> None:
        checkpoint_views(load_decoder(checkpoint("llama3"), torch.float32, parallel=parallel))

    with pytest.raises(ValueError, match="tensor_parallel_size=2: a rank has no whole tensors; it must be 1"):
        on_ranks(2, views)
