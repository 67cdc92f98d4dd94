"""Wrong answers to the exercises of chapter 15."""

from __future__ import annotations

import inspect

from planted import wrong
from solutions import ch15


@wrong("unpack_awq", "nibbles are taken in their order")
def takes_nibbles_in_order(qweight):
    return altered(ch15.unpack_awq, "[..., order.argsort()]", "")(qweight)


@wrong("unpack_awq", "the wrong way round")
def applies_the_list_itself(qweight):
    return altered(ch15.unpack_awq, "order.argsort()", "order")(qweight)


@wrong("unpack_awq", "transpose the result")
def forgets_to_transpose(qweight):
    return altered(ch15.unpack_awq, ".flatten(1).T", ".flatten(1)")(qweight)


@wrong("unpack_awq", "0 to 15")
def subtracts_eight(qweight):
    return ch15.unpack_awq(qweight) - 8


@wrong("w8a8_product", "all tokens share one scale")
def shares_a_scale(x, codes, scales):
    return altered(ch15.w8a8_product, "amax(dim=1, keepdim=True)", "amax()")(x, codes, scales)


@wrong("w8a8_product", "x was not rounded")
def leaves_x_wide(x, codes, scales):
    return x @ codes.float().T * scales


@wrong("w8a8_product", "not / 127")
def divides_by_127(x, codes, scales):
    return altered(ch15.w8a8_product, "127.5", "127")(x, codes, scales)


@wrong("w8a8_product", "must not be 0")
def divides_by_zero(x, codes, scales):
    return altered(ch15.w8a8_product, ".clamp(min=1e-30)", "")(x, codes, scales)


@wrong("w8a8_product", "scales of the rows of W were left out")
def forgets_the_weights_scales(x, codes, scales):
    return altered(ch15.w8a8_product, " * scales.float()", "")(x, codes, scales)


@wrong("crossover_rows", "is two operations")
def counts_one_operation(bytes_per_s, flops_16, flops_8):
    return ch15.crossover_rows(bytes_per_s / 2, flops_16, flops_8)


@wrong("crossover_rows", "its own half bytes")
def stops_at_the_first_corner(bytes_per_s, flops_16, flops_8):
    return ch15.crossover_rows(2 * bytes_per_s, flops_16, flops_8)


@wrong("crossover_rows", "takes the rate of 8")
def computes_in_8_bits(bytes_per_s, flops_16, flops_8):
    return ch15.crossover_rows(bytes_per_s, flops_8, flops_8)


@wrong("crossover_rows", "round up")
def rounds_down(bytes_per_s, flops_16, flops_8):
    return altered(ch15.crossover_rows, "math.ceil", "math.floor")(bytes_per_s, flops_16, flops_8)


@wrong("packed_linear", "8 stands for 0")
def forgets_the_eight(decoder, x, name):
    return altered(ch15.packed_linear, ".flatten(1) - 8", ".flatten(1)")(decoder, x, name)


@wrong("packed_linear", "neighbouring columns")
def spreads_the_scales(decoder, x, name):
    old = "codes.unflatten(1, (scales.shape[1], -1)) * scales[:, :, None]"
    return altered(ch15.packed_linear, old, "codes.unflatten(1, (-1, scales.shape[1])) * scales[:, None]")(
        decoder, x, name
    )


@wrong("packed_linear", "scales were left out")
def forgets_the_scales(decoder, x, name):
    return altered(ch15.packed_linear, " * scales[:, :, None]", "")(decoder, x, name)


@wrong("packed_linear", "AutoAWQ's order")
def unpacks_like_awq(decoder, x, name):
    old = "4 * torch.arange(8, device=words.device)"
    return altered(ch15.packed_linear, old, "4 * torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])")(decoder, x, name)


def altered(solution, old, new):
    """The solution with a piece of its source replaced."""
    source = inspect.getsource(solution)
    assert old in source
    names = dict(vars(ch15))
    exec(source.replace(old, new), names)
    return names[solution.__name__]
