"""The caller's own logits processors: ``SamplingParams.logits_processors``.

They run in the model's process, on a copy of one row at a time: none can reach another request's logits, and an error
ends only its own request. A CUDA graph ends with the logits, so they can also run after one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paged_infer.control.step import SamplingRow


def apply_own_processors(logits: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, dict[int, str]]:
    """Apply the processors to the rows of the requests that have them.

    Args:
        logits: [R, V], any float type, any device; not modified.
        rows: the parameters of each of the R rows.

    Returns:
        [R, V], in float32 or wider, or ``logits`` itself if no row has a processor; and row -> why its processors
        failed. Such a row is NaN.
    """
    asking = [i for i, row in enumerate(rows) if row.params.logits_processors]
    errors: dict[int, str] = {}
    if not asking:
        return logits, errors
    wide = torch.promote_types(logits.dtype, torch.float32)
    edited = logits.to(wide, copy=True, memory_format=torch.contiguous_format)
    for i in asking:
        try:
            edited[i] = _processed(edited[i].clone(), rows[i])
        except Exception as error:  # the caller's code raises anything, and only this request may fail
            errors[i] = f"its logits processor failed: {type(error).__name__}: {error}"
            edited[i] = torch.nan
    return edited, errors


def _processed(row_logits: Tensor, row: SamplingRow) -> Tensor:
    """[V] -> [V]"""
    shape = row_logits.shape
    for processor in row.params.logits_processors:
        row_logits = processor(list(row.output_token_ids), row_logits)
        if not isinstance(row_logits, Tensor) or row_logits.shape != shape:
            found = tuple(row_logits.shape) if isinstance(row_logits, Tensor) else type(row_logits).__name__
            raise ValueError(f"it must return logits of shape {tuple(shape)}, not {found}")
    return row_logits
