"""Wrong answers to the exercises of chapter 14."""

from __future__ import annotations

import inspect

from planted import wrong
from solutions import ch14


@wrong("kv_bytes", "keys and values of 128 heads")
def expands_the_latent(config, num_tokens):
    heads = config["num_key_value_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return 2 * 2 * config["num_hidden_layers"] * heads * head_dim * num_tokens


@wrong("kv_bytes", "values were counted as well as their latent")
def counts_values_twice(config, num_tokens):
    extra = 2 * config["num_hidden_layers"] * config.get("kv_lora_rank", 0) * num_tokens
    return ch14.kv_bytes(config, num_tokens) + extra


@wrong("kv_bytes", "KV heads are stored")
def counts_query_heads(config, num_tokens):
    return ch14.kv_bytes({**config, "num_key_value_heads": config["num_attention_heads"]}, num_tokens)


@wrong("kv_bytes", "half of what it should be")
def ignores_head_dim(config, num_tokens):
    return ch14.kv_bytes({name: value for name, value in config.items() if name != "head_dim"}, num_tokens)


@wrong("kv_bytes", "one layer's, and there are 32")
def forgets_the_layers(config, num_tokens):
    return ch14.kv_bytes({**config, "num_hidden_layers": 1}, num_tokens)


@wrong("activation_gib", "as wide as the stream")
def takes_the_experts_width(config, num_tokens):
    hidden, dense, _ = ch14.activation_gib(config, num_tokens)
    return hidden, dense, 2 * num_tokens * config["num_experts_per_tok"] * config["moe_intermediate_size"] / 2**30


@wrong("activation_gib", "to few experts, not to all")
def sends_a_token_to_all(config, num_tokens):
    return ch14.activation_gib({**config, "num_experts_per_tok": config["n_routed_experts"]}, num_tokens)


@wrong("activation_gib", "GB of 1e9 bytes")
def divides_by_a_billion(config, num_tokens):
    return tuple(gib * 2**30 / 1e9 for gib in ch14.activation_gib(config, num_tokens))


@wrong("activation_gib", "which are 2 bytes")
def counts_four_bytes(config, num_tokens):
    return tuple(2 * gib for gib in ch14.activation_gib(config, num_tokens))


@wrong("product_us", "the longer one counts")
def adds_both(rows, width, bytes_per_s, operations_per_s):
    moving = 2 * (2 * rows * width + width**2) / bytes_per_s
    return 1e6 * (moving + 2 * rows * width**2 / operations_per_s), "memory"


@wrong("product_us", "two operations")
def counts_one_operation(rows, width, bytes_per_s, operations_per_s):
    return ch14.product_us(rows, width, bytes_per_s, 2 * operations_per_s)


@wrong("product_us", "not the weights alone")
def moves_the_weights_alone(rows, width, bytes_per_s, operations_per_s):
    moving, computing = 2 * width**2 / bytes_per_s, 2 * rows * width**2 / operations_per_s
    return 1e6 * max(moving, computing), "memory" if moving > computing else "compute"


@wrong("product_us", "limited by memory")
def always_says_compute(rows, width, bytes_per_s, operations_per_s):
    return ch14.product_us(rows, width, bytes_per_s, operations_per_s)[0], "compute"


@wrong("moe_mlp", "only if norm_topk_prob is true")
def always_divides(decoder, x, layer):
    return altered(decoder, x, layer, "if decoder.config.norm_topk_prob:", "if True:")


@wrong("moe_mlp", "divide the scores by their sum")
def never_divides(decoder, x, layer):
    return altered(decoder, x, layer, "if decoder.config.norm_topk_prob:", "if False:")


@wrong("moe_mlp", "counts by its score")
def adds_results_up(decoder, x, layer):
    return altered(decoder, x, layer, "scores[token, rank, None] * ", "")


@wrong("moe_mlp", "read the normed rows")
def forgets_the_norm(decoder, x, layer):
    return altered(decoder, x, layer, 'decoder.norm(x, f"layers.{layer}.post_attention_layernorm")', "x")


@wrong("moe_mlp", r"experts \[0, 1, 2, 3, 4, 5\] were computed")
def computes_every_expert(decoder, x, layer):
    return altered(decoder, x, layer, "chosen.unique().tolist()", "range(6)")


@wrong("moe_mlp", "in your engine storyteller-moe continues with tokens")
def takes_the_same_layer_always(decoder, x, layer):
    return ch14.moe_mlp(decoder, x, 1)


def altered(decoder, x, layer, old, new):
    """The solution with a piece of its source replaced."""
    source = inspect.getsource(ch14.moe_mlp)
    assert old in source
    names = dict(vars(ch14))
    exec(source.replace(old, new), names)
    return names["moe_mlp"](decoder, x, layer)
