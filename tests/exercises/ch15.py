"""Wrong answers to the exercises of chapter 15."""

from __future__ import annotations

import inspect

from planted import Planted, wrong
from solutions import ch15


def altered(solution, old, new):
    """The solution with a piece of its source replaced."""
    source = inspect.getsource(solution)
    assert old in source
    names = dict(vars(ch15))
    exec(source.replace(old, new), names)
    return names[solution.__name__]


def replaced(name, exercise, fault, old, new):
    """The solution with a piece of its source replaced, as a wrong answer of this name."""
    return Planted(exercise, fault, name, altered(getattr(ch15, exercise), old, new))


takes_nibbles_in_order = replaced(
    "takes_nibbles_in_order", "unpack_awq", "nibbles are taken in their order", "[..., order.argsort()]", ""
)
applies_the_list_itself = replaced(
    "applies_the_list_itself", "unpack_awq", "the wrong way round", "order.argsort()", "order"
)
forgets_to_transpose = replaced(
    "forgets_to_transpose", "unpack_awq", "transpose the result", ".flatten(1).T", ".flatten(1)"
)


@wrong("unpack_awq", "0 to 15")
def subtracts_eight(qweight):
    return ch15.unpack_awq(qweight) - 8


shares_a_scale = replaced(
    "shares_a_scale", "w8a8_product", "all tokens share one scale", "amax(dim=1, keepdim=True)", "amax()"
)


@wrong("w8a8_product", "x was not rounded")
def leaves_x_wide(x, codes, scales):
    return x @ codes.float().T * scales


divides_by_127 = replaced("divides_by_127", "w8a8_product", "not / 127", "127.5", "127")
divides_by_zero = replaced("divides_by_zero", "w8a8_product", "must not be 0", ".clamp(min=1e-30)", "")
forgets_the_weights_scales = replaced(
    "forgets_the_weights_scales", "w8a8_product", "scales of the rows of W were left out", " * scales.float()", ""
)


@wrong("crossover_rows", "is two operations")
def counts_one_operation(bytes_per_s, flops_16, flops_8):
    return ch15.crossover_rows(bytes_per_s / 2, flops_16, flops_8)


@wrong("crossover_rows", "its own half bytes")
def stops_at_the_first_corner(bytes_per_s, flops_16, flops_8):
    return ch15.crossover_rows(2 * bytes_per_s, flops_16, flops_8)


@wrong("crossover_rows", "takes the rate of 8")
def computes_in_8_bits(bytes_per_s, flops_16, flops_8):
    return ch15.crossover_rows(bytes_per_s, flops_8, flops_8)


rounds_down = replaced("rounds_down", "crossover_rows", "round up", "math.ceil", "math.floor")
forgets_the_eight = replaced("forgets_the_eight", "packed_linear", "8 stands for 0", ".flatten(1) - 8", ".flatten(1)")


@wrong("packed_linear", "neighbouring columns")
def spreads_the_scales(decoder, x, name):
    old = "codes.unflatten(1, (scales.shape[1], -1)) * scales[:, :, None]"
    return altered(ch15.packed_linear, old, "codes.unflatten(1, (-1, scales.shape[1])) * scales[:, None]")(
        decoder, x, name
    )


forgets_the_scales = replaced(
    "forgets_the_scales", "packed_linear", "scales were left out", " * scales[:, :, None]", ""
)


@wrong("packed_linear", "AutoAWQ's order")
def unpacks_like_awq(decoder, x, name):
    old = "4 * torch.arange(8, device=words.device)"
    return altered(ch15.packed_linear, old, "4 * torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])")(decoder, x, name)
