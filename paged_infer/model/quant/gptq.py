"""GPTQ (Frantar 2022): quantise W column by column, and compensate for each error in the columns that follow.

    minimise |X W^T - X Q^T|^2,   H = 2 X^T X,   U^T U = H^-1 (U upper triangular)

    for column c:   q = round(w_c)    e = (w_c - q) / U[c, c]    w_j -= e U[c, j] for all j > c

U already contains the inverse of H without the quantised columns, so H^-1 is factored once (section 3.3, step 3).
Within a group, columns are updated one by one; those after it, once per group (step 2, lazy batch updates).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from paged_infer.kernels.quant.weight import QuantisedWeight
from paged_infer.model.quant.scheme import Scheme, encode, grid, to_codes

BLOCK = 128  # without groups, columns between two lazy updates of the rest


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
    """Quantise W [N, K] so that its outputs change little on the calibration inputs X [T, K].

    Args:
        products: X^T X, [K, K].
        damping: this share of the mean of H's diagonal is added to the diagonal, so that H can be inverted.
        act_order: quantise columns in descending order of H's diagonal, the largest inputs first, while most columns
            are left to compensate; the result then has ``columns``.
        name: of W, for error messages.

    Raises:
        ValueError: as ``quantise``; or the products are not finite.
    """
    if not products.isfinite().all():
        raise ValueError(f"{name}: its inputs have values that are infinite or NaN")
    weight, hessian = weight.detach().float().clone(), 2 * products.float()
    order = hessian.diag().argsort(descending=True) if act_order else torch.arange(weight.shape[1])
    weight, hessian = weight[:, order], hessian[order][:, order]
    dead = hessian.diag() == 0  # inputs that were always zero, whose weights have no effect
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(damping * hessian.diag().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)

    scales, zeros = grid(weight, scheme, name)  # a group's are recomputed below, from its updated columns
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
