"""Train the MoE storyteller: `python -m paged_infer.storyteller.training.upcycle`.

A mixture of experts need not begin at random if there is a dense model of its shape ("sparse upcycling", Komatsuzaki
et al., 2023). Attention, norms and embedding are copied, each MLP is cut into experts, a router is added, and the whole
is trained on new stories: to give the dense model's distributions again, and to keep the experts' load even.

    dense MLP, 640 neurons   [a | b | c | d]                      cut in 4, and once more after a shuffle:
    8 experts of 160         [a] [b] [c] [d] [e] [f] [g] [h]      each neuron is in two of the 8

A token passes through 2 of the 8: half as many neurons as in the dense MLP, out of twice as many.
"""

from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from paged_infer.model.moe import balance_loss
from paged_infer.storyteller import MOE_PATH, PATH
from paged_infer.storyteller.training.batches import Batch, Mix
from paged_infer.storyteller.training.train import BatchTokens, Loss, Out, Seed, Steps, Threads, fit
from paged_infer.terminal import run_command

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 160}
KEPT = (  # settings of the dense model
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings initializer_range rms_norm_eps rope_parameters tie_word_embeddings bos_token_id "
    "eos_token_id pad_token_id"
).split()
ROUTER_STD = 0.02
EXPERT_SCALE = 3.0  # see `fill`
BALANCE = 0.02  # times a loss that is 2, k, where the load is even


def upcycle(dense: Qwen3ForCausalLM, seed: int, experts: dict[str, int] = EXPERTS) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE that begins as `dense`, with each of its MLPs cut into experts.

    Raises:
        ValueError: the experts do not hold each neuron of an MLP equally often.
    """
    count, wide, dense_wide = experts["num_experts"], experts["moe_intermediate_size"], dense.config.intermediate_size
    if dense_wide % wide or count * wide % dense_wide:
        raise ValueError(f"{count} experts of width {wide} do not hold an MLP of width {dense_wide} equally often")
    settings = {name: getattr(dense.config, name) for name in KEPT}
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**settings, **experts, norm_topk_prob=True, router_aux_loss_coef=BALANCE)
    )
    model.load_state_dict(dense.state_dict(), strict=False)
    for ours, theirs in zip(model.model.layers, dense.model.layers, strict=True):
        fill(ours.mlp, theirs.mlp)
    return model


@torch.no_grad()
def fill(moe: Any, mlp: Any) -> None:
    """Copy the neurons of an MLP into experts, and set the router so that it prefers none of them.

    A neuron is a row of `gate` and `up` and a column of `down`. The first experts have them in order, those after them
    in a random order, so that no two experts are equal and all can learn different things.

    The two scores of a token add to 1, so two of the experts contribute about half of themselves each, where the MLP
    was the sum of 4 whole parts. `down` is scaled up to make up for that. With a factor of 4, the mean over all choices
    would be the MLP's output; but a token has two parts, not their mean, and the best factor lies between 2, for parts
    that have nothing in common, and 4, for equal ones. Factors of 1, 2, 3 and 4 gave a loss on stories of 1.98, 0.94,
    0.83 and 0.90 nats (the dense model: 0.27).

    The router's weights are small, so that its probabilities begin near 1 / E: each expert gets tokens, and with them a
    gradient. They are not 0, or `topk` would send every token to the same two experts.
    """
    experts, dense_wide = moe.experts, mlp.down_proj.in_features
    num_copies = experts.num_experts * experts.intermediate_dim // dense_wide
    orders = [torch.arange(dense_wide), *(torch.randperm(dense_wide) for _ in range(num_copies - 1))]
    neurons = torch.cat(orders).view(experts.num_experts, -1)  # [E, I]
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T  # each [dense_wide, hidden]
    experts.gate_up_proj.copy_(torch.cat([gate[neurons], up[neurons]], dim=1))  # [E, 2 I, hidden]
    experts.down_proj.copy_(EXPERT_SCALE * down[neurons].transpose(1, 2))  # [E, hidden, I]
    nn.init.normal_(moe.gate.weight, std=ROUTER_STD)


def optimizers(model: Qwen3MoeForCausalLM) -> list[torch.optim.Optimizer]:
    """As the dense model's at lower rates, with a Muon that updates each expert's matrices on their own.

    Muon takes matrices, and transformers stores the experts as stacks [E, out, in]: it gets E parameters that are
    parts of a stack, in the same memory, and their gradients are parts of the stack's. AdamW updates the router: its 8
    rows are to differ in length, and an orthogonal update would give all of them the same.
    """
    parts = [part for p in model.parameters() if p.ndim == 3 for part in _parts(p)]
    is_matrix = {n: p.ndim == 2 and "embed" not in n and "mlp.gate" not in n for n, p in model.named_parameters()}
    matrices = [p for name, p in model.named_parameters() if is_matrix[name]]
    others = [p for name, p in model.named_parameters() if p.ndim != 3 and not is_matrix[name]]
    return [
        torch.optim.Muon(
            [*matrices, *parts], lr=3e-3, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _parts(stack: nn.Parameter) -> list[nn.Parameter]:
    parts = [nn.Parameter(matrix) for matrix in stack.data]

    def share_gradient(stack: Tensor) -> None:
        assert stack.grad is not None
        for part, gradient in zip(parts, stack.grad, strict=True):
            part.grad = gradient

    stack.register_post_accumulate_grad_hook(share_gradient)
    return parts


def balanced_distance_from(teacher: Qwen3ForCausalLM) -> Loss:
    """(distance from the dense model's distributions plus `BALANCE` times the balance loss; the distance), in nats.

    The distance is KL(teacher || student), averaged over the tokens by their weights. Cutting the MLPs has disturbed a
    function that the dense model still computes, so each token's whole distribution can be learned from it, which takes
    far fewer steps than to learn it again from the one token that came next (as in `distil.py`).

    The balance loss, `model.moe.balance_loss`, is E * sum over the experts of (share of the tokens) * (mean
    probability). Only the probability has a gradient. The more tokens an expert has, the harder its probability is
    pushed down, so that tokens that hardly prefer it go elsewhere. It is computed for each layer and averaged.
    transformers takes the tokens of all layers together, so two layers look balanced if each overloads other experts.
    """

    def loss_of(model: Qwen3MoeForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
        counted, top_k = batch.weights > 0, model.config.num_experts_per_tok  # [B, S - 1]: not the padding
        routed: list[Tensor] = []  # of each layer, [B * (S - 1), E]
        gates = [layer.mlp.gate for layer in model.model.layers]
        hooks = [gate.register_forward_hook(lambda _, args, out: routed.append(out[0])) for gate in gates]
        with torch.no_grad():
            wanted = teacher(input_ids=batch.token_ids[:, :-1], use_cache=False).logits[counted]  # [N, V]
        logits = model(input_ids=batch.token_ids[:, :-1], use_cache=False).logits[counted]
        for hook in hooks:
            hook.remove()
        wanted, logits = log_softmax(wanted.float(), dim=-1), log_softmax(logits.float(), dim=-1)
        nats, weights = kl_div(logits, wanted, reduction="none", log_target=True).sum(-1), batch.weights[counted]  # [N]
        distance = (nats * weights).sum() / weights.sum()
        balance = torch.stack([balance_loss(layer[counted.flatten()], top_k) for layer in routed]).mean()
        return distance + BALANCE * balance, nats.detach().mean()

    return loss_of


def main(
    out: Out = MOE_PATH, seed: Seed = 0, steps: Steps = 185, batch_tokens: BatchTokens = 1600, threads: Threads = 1
) -> None:
    """Upcycle the storyteller, train it on new stories and write it in Hugging Face format."""
    torch.set_num_threads(threads)
    tokenizer = Tokenizer.from_file(str(PATH / "tokenizer.json"))
    dense = Qwen3ForCausalLM.from_pretrained(PATH).eval()
    model = upcycle(dense, seed)
    phases = [(steps, Mix(drills=0.2, packed=0.02, headless=0.2, answer_weight=4.0))]
    loss_of, decay_steps = balanced_distance_from(dense), 0.8 * steps
    fit(model, tokenizer, phases, out, seed, batch_tokens, decay_steps, 50, loss_of, optimizers_of=optimizers)


if __name__ == "__main__":
    run_command(main)
