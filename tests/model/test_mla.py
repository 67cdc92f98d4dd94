"""Latent attention: both forms, every cache and every way to cut a prompt give one result, which is transformers'."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from paged_infer.cache.contiguous import ContiguousCache
from paged_infer.cache.none import NoCache
from paged_infer.cache.paged import PagedCache
from paged_infer.cache.spec import kv_bytes_per_token
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.attention.mla import dense_reference, latent_decode_reference
from paged_infer.kernels.attention_backends import ATTENTION_BACKENDS
from paged_infer.model import mla as mla_module
from paged_infer.model.config import ModelConfig
from paged_infer.model.decoder import Decoder
from paged_infer.model.layers import RotaryEmbedding
from paged_infer.model.loading.load import load_decoder
from paged_infer.model.mla import LatentAttention

FAMILIES = ["deepseek2", "deepseek2-yarn", "deepseek3", "deepseek3-plain"]
LENGTH = 37

# The config.json of DeepSeek-V3 and of V2-Lite, without what has no effect.
V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "attention_bias": False, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1,
    "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1,
    "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
V2_LITE: dict[str, Any] = {
    "model_type": "deepseek_v2", "attention_bias": False, "aux_loss_alpha": 0.001, "bos_token_id": 100000,
    "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 1408,
    "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707}, "rope_theta": 10000,
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False,
    "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip


@pytest.fixture(scope="module")
def attention_of(checkpoint):
    """A family's name -> its decoder, layer 0's attention, the rotary embedding, and hidden states [LENGTH, hidden]."""

    def load(name: str) -> tuple[Decoder, LatentAttention, RotaryEmbedding, Tensor]:
        decoder = load_decoder(checkpoint(name), torch.float32)
        hidden = torch.randn(LENGTH, decoder.config.hidden_size, generator=torch.Generator().manual_seed(1))
        return decoder, decoder.layers[0].attention, decoder.rotary[0], hidden

    return load


def whole(attention: LatentAttention, rotary: RotaryEmbedding, hidden: Tensor) -> Tensor:
    """Of all tokens at once, without a cache."""
    step = AttentionMetadata.unpaged(torch.arange(len(hidden)))
    return attention(hidden, rotary(step.positions, hidden.dtype), NoCache([]), step)


def chunk(first: int, end: int, block_size: int, table: list[int]) -> AttentionMetadata:
    """Tokens first..end of the one sequence."""
    position = torch.arange(first, end)
    tables = torch.tensor([table], dtype=torch.int32)
    return AttentionMetadata(
        positions=position,
        slot_mapping=tables[0, position // block_size].long() * block_size + position % block_size,
        query_start_loc=torch.tensor([0, end - first], dtype=torch.int32),
        seq_lens=torch.tensor([end], dtype=torch.int32),
        block_tables=tables,
        num_decodes=int(end - first == 1),
        max_query_len=end - first,
        max_seq_len=end,
    )


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_the_module_computes_what_that_of_transformers_computes(name, attention_of, transformers_model) -> None:
    _, attention, rotary, hidden = attention_of(name)
    model = transformers_model(name).model
    positions = torch.arange(LENGTH)[None]
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
    expected, _ = model.layers[0].self_attn(
        hidden_states=hidden[None], position_embeddings=model.rotary_emb(hidden[None], positions), attention_mask=mask
    )
    torch.testing.assert_close(whole(attention, rotary, hidden), expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_absorbed_and_expanded_are_equal_to_1e_5(name, attention_of) -> None:
    _, attention, rotary, hidden = attention_of(name)
    q, latent = attention.project(hidden, rotary(torch.arange(LENGTH), hidden.dtype))
    expanded = attention.attend_expanded(q[None], latent.transpose(0, 1), dense_reference)[0]
    rows = chunk(0, LENGTH, LENGTH, [0])  # one block holds all; then each token is a row of its own
    rows.seq_lens, rows.block_tables = torch.arange(1, LENGTH + 1), torch.zeros(LENGTH, 1, dtype=torch.int32)
    options = {"v_dim": attention.v_dim, "scale": attention.scale}
    absorbed = attention.leave(latent_decode_reference(attention.absorb(q), latent[None], rows, **options))
    torch.testing.assert_close(absorbed, expanded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "sdpa", "c", "triton"])
@pytest.mark.parametrize("cuts", [(), (1,), (20, 21, 22, 23), (7, 14, 21, 28, 35), (2, 36)])
@torch.inference_mode()
def test_however_a_prompt_is_cut_the_paged_cache_gives_what_no_cache_gives(backend, cuts, attention_of) -> None:
    decoder, attention, rotary, hidden = attention_of("deepseek3")
    expected = whole(attention, rotary, hidden)
    cache = PagedCache(decoder.kv_spec(), 20, 3, ATTENTION_BACKENDS[backend])
    for keys in cache.keys:
        keys[:-1] = torch.nan  # what an earlier owner may have left
    table = torch.randperm(20, generator=torch.Generator().manual_seed(2)).tolist()
    bounds = [0, *cuts, LENGTH]
    for first, end in pairwise(bounds):
        step = chunk(first, end, 3, table)
        out = attention(hidden[first:end], rotary(step.positions, hidden.dtype), cache, step)
        torch.testing.assert_close(out, expected[first:end], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_chunk_beside_decodes_and_other_chunks_gives_what_it_gives_alone(attention_of) -> None:
    """One step: a decode, a chunk of 3 after 20 tokens (absorbed) and a whole prompt (expanded)."""
    decoder, attention, rotary, hidden = attention_of("deepseek2-yarn")
    cache = PagedCache(decoder.kv_spec(), 40, 3, ATTENTION_BACKENDS["sdpa"])
    expected = whole(attention, rotary, hidden)
    tables = torch.arange(39, dtype=torch.int32).view(3, 13)
    for row, (before, _) in enumerate([(30, 1), (20, 3), (0, 0)]):
        if before:
            step = chunk(0, before, 3, tables[row].tolist())
            attention(hidden[:before], rotary(step.positions, hidden.dtype), cache, step)
    parts = [
        chunk(first, end, 3, tables[row].tolist()) for row, (first, end) in enumerate([(30, 31), (20, 23), (0, 9)])
    ]
    step = AttentionMetadata(
        positions=torch.cat([part.positions for part in parts]),
        slot_mapping=torch.cat([part.slot_mapping for part in parts]),
        query_start_loc=torch.tensor([0, 1, 4, 13], dtype=torch.int32),
        seq_lens=torch.cat([part.seq_lens for part in parts]),
        block_tables=tables,
        num_decodes=1,
        max_query_len=9,
        max_seq_len=31,
    )
    tokens = torch.cat([part.positions for part in parts])
    out = attention(hidden[tokens], rotary(step.positions, hidden.dtype), cache, step)
    torch.testing.assert_close(out, expected[tokens], atol=1e-5, rtol=1e-5)
    plan = step.plan["latent"]
    assert plan.tokens.tolist() == [0, 3, 2, 1] and [tokens for tokens, _ in plan.chunks] == [slice(4, 13)]


class KeysAndValues:
    """A cache of one sequence that knows nothing of latents."""

    def __init__(self) -> None:
        self.k = self.v = None

    def attend(self, layer, q, k, v, step, *, scale):
        self.k = k if self.k is None else torch.cat((self.k, k))
        self.v = v if self.v is None else torch.cat((self.v, v))
        scores = torch.einsum("nhd,md->hnm", q, self.k[:, 0]) * scale
        hidden = torch.arange(len(self.k)) > step.positions[:, None]
        return torch.einsum("hnm,md->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), self.v[:, 0])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["contiguous", "own"])
@torch.inference_mode()
def test_a_contiguous_cache_and_one_that_knows_only_keys_and_values_give_the_same(kind, name, attention_of) -> None:
    decoder, attention, rotary, hidden = attention_of(name)
    cache = KeysAndValues() if kind == "own" else ContiguousCache(decoder.kv_spec(), LENGTH, [0])
    outputs = []
    for first, end in ((0, 20), (20, 30), (30, 31), (31, LENGTH)):
        step = AttentionMetadata.unpaged(torch.arange(first, end), end=end)
        outputs.append(attention(hidden[first:end], rotary(step.positions, hidden.dtype), cache, step))
    torch.testing.assert_close(torch.cat(outputs), whole(attention, rotary, hidden), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_heads_are_expanded_a_few_at_a_time_without_a_change(attention_of, monkeypatch) -> None:
    _, attention, rotary, hidden = attention_of("deepseek2")
    expected = whole(attention, rotary, hidden)
    monkeypatch.setattr(mla_module, "_MAX_EXPANDED", 4 * LENGTH * 22)
    torch.testing.assert_close(whole(attention, rotary, hidden), expected)


def test_deepseeks_configs_give_their_published_sizes_and_576_elements_a_token() -> None:
    big, lite = ModelConfig.from_hf(V3), ModelConfig.from_hf(V2_LITE)
    assert round(big.num_parameters / 1e9) == 671 and round(lite.num_parameters / 1e9, 1) == 15.7
    with torch.device("meta"):
        spec = Decoder(lite).to(torch.bfloat16).kv_spec()
    assert kv_bytes_per_token(spec) == 27 * 576 * 2
    assert big.mla is not None and big.mla.cached_dim == 576
    growth = 0.1 * torch.tensor(40.0).log().item() + 1  # YaRN's, of mscale_all_dim 1
    assert big.attention_scale == pytest.approx(192**-0.5 * growth**2)
    assert big.ropes[0] is not None and big.ropes[0].interleaved and big.ropes[0].attention_factor == 1
    assert big.moe is not None and big.moe.layers == (False,) * 3 + (True,) * 58
    assert lite.moe is not None and lite.moe.shared_intermediate_size == 2 * 1408


@pytest.mark.parametrize(
    ("raw", "changes", "message"),
    [
        (V3, {"kv_lora_rank": None}, "kv_lora_rank=None"),
        (V3, {"qk_rope_head_dim": 63}, "head_dim=63: must be even"),
        (V3, {"num_key_value_heads": 8}, "num_key_value_heads=8 is not supported; only num_attention_heads=128 is"),
        (V3, {"n_group": 7}, "num_experts=256: must be a multiple of n_group=7"),
        (V3, {"topk_group": 9}, "topk_group=9"),
        (V3, {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        (V3, {"topk_method": "greedy"}, "topk_method='greedy' is not supported"),
        (V3, {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
        (V3, {"num_local_experts": 8}, "num_local_experts=8 is not supported; only 256 is"),
        (V3, {"rope_interleave": 1}, "rope_interleave=1"),
        (V3, {"sliding_window": 9, "layer_types": ["sliding_attention"] * 61}, "layer_types"),
        (V2_LITE, {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
        (V2_LITE, {"topk_method": "noaux_tc"}, "topk_method='noaux_tc': must be greedy or group_limited_greedy"),
        (V2_LITE, {"mlp_bias": True}, "mlp_bias=True is not supported"),
        (V2_LITE, {"num_experts_per_tok": None}, "num_experts_per_tok=None"),
        (V2_LITE, {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}}, "mscale_all_dim"),
    ],
)
def test_what_transformers_does_not_compute_is_refused_by_name(raw, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(raw | changes)
