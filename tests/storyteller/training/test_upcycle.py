"""Claims about upcycling: neurons become experts, and training lowers the distance and the imbalance."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM

from paged_infer import LLM, SamplingParams
from paged_infer.storyteller import PATH
from paged_infer.storyteller.training import train, upcycle, vocabulary
from paged_infer.storyteller.training.batches import Batch, Mix, Rows, stream

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.train_tokenizer(num_stories=300)


@pytest.fixture(scope="module")
def dense(tokenizer) -> Qwen3ForCausalLM:
    """Random, but sure of its tokens, and with MLPs that matter."""
    model = train.new_model(tokenizer.get_vocab_size(), 0, SHAPE).eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(5.0)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 10
    return model


def test_each_neuron_is_in_equally_many_experts_and_no_two_experts_are_equal(dense) -> None:
    model = upcycle.upcycle(dense, 0, EXPERTS)
    for ours, theirs in zip(model.model.layers, dense.model.layers, strict=True):
        gate_up, down, mlp = ours.mlp.experts.gate_up_proj, ours.mlp.experts.down_proj, theirs.mlp
        found = torch.cat([gate_up, upcycle.EXPERT_SCALE**-1 * torch.cat([down.mT, down.mT], dim=1)], dim=2)
        gates, ups = found.chunk(2, dim=1)  # [E, I, 2 hidden]: what a neuron reads, and what it writes
        for part, matrix in ((gates, mlp.gate_proj), (ups, mlp.up_proj)):
            neurons = torch.cat([matrix.weight, mlp.down_proj.weight.T], dim=1)  # [64, 2 hidden]
            distances = torch.cdist(part.flatten(0, 1).double(), neurons.double())
            assert (distances.min(dim=1).values < 1e-5).all()
            assert torch.bincount(distances.argmin(dim=1)).tolist() == [2] * 64
        assert len({tuple(sorted(rows.tolist())) for rows in gates[:, :, 0]}) == 4


def test_all_else_is_the_dense_model_s_and_the_router_prefers_nothing(dense) -> None:
    model = upcycle.upcycle(dense, 0, EXPERTS)
    kept, ours = dense.state_dict(), model.state_dict()
    common = kept.keys() & ours.keys()
    assert all(torch.equal(kept[name], ours[name]) for name in common)
    assert {name.split("mlp.")[-1] for name in ours.keys() - common} == {
        "gate.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
    }
    x = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, scores, chosen = model.model.layers[0].mlp.gate(x)
    assert (logits.softmax(-1) - 0.25).abs().max() < 0.15 and torch.allclose(scores.sum(-1), torch.ones(1000))
    assert torch.bincount(chosen.flatten()).min() > 250


def test_experts_that_would_hold_some_neurons_more_often_are_refused(dense) -> None:
    with pytest.raises(ValueError, match="3 experts of width 32 do not hold an MLP of width 64 equally often"):
        upcycle.upcycle(dense, 0, {**EXPERTS, "num_experts": 3})
    with pytest.raises(ValueError, match="4 experts of width 48"):
        upcycle.upcycle(dense, 0, {**EXPERTS, "moe_intermediate_size": 48})


def test_each_expert_gets_an_orthogonal_update_of_its_own(dense) -> None:
    model = upcycle.upcycle(dense, 0, EXPERTS)
    tools = upcycle.optimizers(model)
    sizes = [sum(p.numel() for group in tool.param_groups for p in group["params"]) for tool in tools]
    assert sum(sizes) == model.num_parameters()
    stack = model.model.layers[0].mlp.experts.gate_up_proj  # [E, 64, 32]
    before, wanted = stack.detach().clone(), torch.randn(stack.shape, generator=torch.Generator().manual_seed(0))
    (stack * wanted).sum().backward()
    tools[0].step()
    rate = tools[0].param_groups[0]["lr"]
    updates = (stack.detach() - (1 - rate * 0.01) * before) / rate
    values = torch.linalg.svdvals(updates) / (0.2 * 64**0.5)
    assert values.min() > 0.6 and values.max() < 1.3


def loss_and_balance(model: Qwen3MoeForCausalLM, dense: Qwen3ForCausalLM, batches: list[Batch]) -> torch.Tensor:
    """Mean over the batches of (distance, balance loss)."""
    loss_of, rows = upcycle.balanced_distance_from(dense), []
    with torch.no_grad():
        for batch in batches:
            uniform = Batch(batch.token_ids, (batch.weights > 0).float())
            loss, distance = loss_of(model, uniform)
            rows.append((distance, (loss - distance) / upcycle.BALANCE))
    return torch.tensor(rows).mean(dim=0)


def test_a_few_steps_lower_the_distance_and_level_a_router_that_has_collapsed(tokenizer, dense, tmp_path) -> None:
    model, inputs = upcycle.upcycle(dense, 0, EXPERTS), list[torch.Tensor]()
    batches = list(stream(Rows(tokenizer, seed=9), [(3, Mix(drills=0.5))], tokens=300))
    gates = [layer.mlp.gate for layer in model.model.layers]
    hooks = [gate.register_forward_hook(lambda _, args, out: inputs.append(args[0].flatten(0, -2))) for gate in gates]
    loss_and_balance(model, dense, batches)
    for place, (gate, hook) in enumerate(zip(gates, hooks, strict=True)):
        hook.remove()
        common = torch.cat(inputs[place :: len(gates)]).float().mean(dim=0)  # what all tokens have, two experts prefer
        gate.weight.data[:2] += 2 * common / common.square().sum()
    before = loss_and_balance(model, dense, batches)
    loss_of = upcycle.balanced_distance_from(dense)
    phases = [(20, Mix(drills=0.5))]
    train.fit(model, tokenizer, phases, tmp_path / "out", 0, 300, 10, 20, loss_of, optimizers_of=upcycle.optimizers)
    after = loss_and_balance(model, dense, batches)
    assert after[0] < 0.9 * before[0]
    assert before[1] > 2.5 and 1.99 < after[1] < before[1] - 0.01  # an even choice of 2 experts gives 2


def test_one_command_writes_a_folder_that_both_load(tmp_path) -> None:
    folder = tmp_path / "moe"
    upcycle.main(out=folder, steps=1, batch_tokens=200, threads=torch.get_num_threads())
    model, report = Qwen3MoeForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.intermediate_size == Qwen3ForCausalLM.from_pretrained(PATH).config.intermediate_size
    llm = LLM(folder, device="cpu", num_blocks=16)
    ids = llm.tokenizer.encode("Once upon a time")
    ours = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)[0].outputs[0]
    theirs = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
    assert ours.token_ids == theirs.tolist()
