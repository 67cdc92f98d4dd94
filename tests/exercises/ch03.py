"""Wrong answers to the exercises of chapter 03."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from planted import wrong
from solutions import ch03


@wrong("neighbours_to_halves", "as they were")
def changes_nothing(weight, num_heads):
    return weight


@wrong("neighbours_to_halves", "from one head to another")
def forgets_the_heads(weight, num_heads):
    return torch.cat((weight[0::2], weight[1::2]))


@wrong("neighbours_to_halves", "the way back")
def goes_the_other_way(weight, num_heads):
    return weight.view(num_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@wrong("neighbours_to_halves", r"has shape \(12, 2\), and \(12, 4\) is asked for")
def reorders_columns_and_loses_some(weight, num_heads):
    return weight[:, 0::2]


@wrong("swiglu_width", "rounded down")
def rounds_down(hidden_size, multiple_of):
    return 8 * hidden_size // 3 // multiple_of * multiple_of


@wrong("swiglu_width", "the width of a plain MLP")
def keeps_the_plain_width(hidden_size, multiple_of):
    return -(-4 * hidden_size // multiple_of) * multiple_of


@wrong("swiglu_width", "not a multiple of 256")
def forgets_to_round(hidden_size, multiple_of):
    return 8 * hidden_size // 3


@wrong("swiglu_width", "gives a float")
def divides(hidden_size, multiple_of):
    return 8 * hidden_size / 3


@wrong("mean_vectors", "padding was averaged")
def averages_padding(hidden, lengths):
    return F.normalize(hidden.mean(dim=1), dim=-1)


@wrong("mean_vectors", "not of length 1")
def leaves_the_length(hidden, lengths):
    own = torch.arange(hidden.shape[1]) < lengths[:, None]
    return (hidden * own[..., None]).sum(dim=1) / lengths[:, None]


@wrong("mean_vectors", "vectors of the last tokens")
def takes_the_last_token(hidden, lengths):
    return F.normalize(hidden[torch.arange(len(hidden)), lengths - 1], dim=-1)


@wrong("decoder_layer", "the causal mask is missing")
def sees_later_tokens(x, w, positions, head_dim):
    return altered(x, w, positions, head_dim, "positions > positions[:, None]", "positions < -1")


@wrong("decoder_layer", "positions are counted from 0")
def counts_from_zero(x, w, positions, head_dim):
    return ch03.decoder_layer(x, w, torch.arange(len(x)), head_dim)


@wrong("decoder_layer", "gate and up are exchanged")
def exchanges_gate_and_up(x, w, positions, head_dim):
    return altered(x, w, positions, head_dim, '("gate", "up", "down")', '("up", "gate", "down")')


@wrong("decoder_layer", "dealt out in turn")
def deals_heads_out(x, w, positions, head_dim):
    old, new = "part.repeat_interleave(len(q) // len(k), dim=0)", "part.repeat(len(q) // len(k), 1, 1)"
    return altered(x, w, positions, head_dim, old, new)


@wrong("decoder_layer", "the MLP reads the layer's input")
def reads_the_input_twice(x, w, positions, head_dim):
    return altered(
        x, w, positions, head_dim, "x = x + (weights", "given, x = x, x + (weights", 'norm = rms_norm(x, w["post'
    )


@wrong("decoder_layer", "off by up to")
def leaves_out_the_scale(x, w, positions, head_dim):
    return altered(x, w, positions, head_dim, " / head_dim**0.5", "")


def altered(x, w, positions, head_dim, old, new, then=None):
    """The solution with a piece of its source replaced; ``then``: what reads ``given`` in place of x."""
    source = inspect.getsource(ch03.decoder_layer)
    assert old in source
    source = source.replace(old, new)
    if then is not None:
        assert then in source
        source = source.replace(then, then.replace("(x,", "(given,"))
    names = dict(vars(ch03))
    exec(source, names)
    return names["decoder_layer"](x, w, positions, head_dim)
