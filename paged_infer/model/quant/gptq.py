"""GPTQ (Frantar 2022): round column by column, and let the columns that follow make up for each error.

    minimise |X W^T - X Q^T|^2,   H = 2 X^T X,   U^T U = H^-1 (U upper triangular)

    for column c:   q = round(w_c)    e = (w_c - q) / U[c, c]    w_j -= e U[c, j] for all j > c

The inverse of H without the columns that are done is part of U already, so it is factored once (section 3.3, step 3).
Columns of a group are updated one by one, those after the group once a group (step 2, lazy batch updates).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from paged_infer.kernels.quant.weight import QuantisedWeight
from paged_infer.model.quant.scheme import Scheme, encode, grid, to_codes

BLOCK = 128  # columns between two updates of the rest, without groups


@torch.inference_mode()
def gptq(
    weight: Tensor,
    products: Tensor,
    scheme: Scheme,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    name: str = "the weight",
) -> QuantisedWeight:
    """W [N, K] by the inputs that it was calibrated on.

    Args:
        products: X^T X, [K, K].
        damping: of H's mean diagonal, added to its diagonal so that it can be inverted.
        act_order: columns of large inputs first, while most others are left to make up for them; the result has
            ``columns``.

    Raises:
        ValueError: as ``quantise``; or the products are not finite.
    """
    if not products.isfinite().all():
        raise ValueError(f"{name}: its inputs have values that are infinite or NaN")
    weight, hessian = weight.detach().float().clone(), 2 * products.float()
    order = hessian.diag().argsort(descending=True) if act_order else torch.arange(weight.shape[1])
    weight, hessian = weight[:, order], hessian[order][:, order]
    dead = hessian.diag() == 0  # inputs that were always zero: their weights do not matter
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(damping * hessian.diag().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)

    scales, zeros = grid(weight, scheme, name)  # a group's are computed again once its columns are updated
    size, columns = scheme.group(weight.shape[1], name), weight.shape[1]
    block = size if scheme.strategy == "group" else BLOCK
    done = torch.empty_like(weight)
    for start in range(0, columns, block):
        part, end = weight[:, start : start + block], min(start + block, columns)
        group = start // size
        if scheme.strategy == "group":
            scale, zero = grid(part, scheme, name)
            scales[:, group] = scale[:, 0]
            if zeros is not None and zero is not None:
                zeros[:, group] = zero[:, 0]
        scale, zero = scales[:, group], None if zeros is None else zeros[:, group]
        errors = torch.empty_like(part)
        for i, c in enumerate(range(start, end)):
            codes = to_codes(part[:, i], scale, zero, scheme)
            done[:, c] = (codes if zero is None else codes - zero) * scale
            errors[:, i] = (part[:, i] - done[:, c]) / upper[c, c]
            part[:, i:] -= errors[:, i, None] * upper[c, c:end]
        weight[:, end:] -= errors @ upper[start:end, end:]
    result = encode(done, scales, zeros, scheme)
    return replace(result, columns=order.argsort()) if act_order else result
