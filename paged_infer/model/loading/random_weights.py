"""Random weights instead of a checkpoint's, made in place: the same model on one rank and, in parts, on several."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from paged_infer.model.decoder import Decoder
from paged_infer.model.linear import DENSE, Piece
from paged_infer.model.loading.layout import checkpoint_layout
from paged_infer.model.loading.targets import Target, targets_of


@torch.inference_mode()
def fill_at_random(decoder: Decoder, seed: int) -> None:
    """Matrices normal with a standard deviation of 0.02, norms 1, biases 0; generated on the device.

    Of several ranks, each generates every whole parameter, one at a time, and keeps its part.
    """
    generator = Generator(decoder.device).manual_seed(seed)
    targets = targets_of(decoder)
    for target in targets.values():
        if not target.module.get_parameter(target.parameter).is_floating_point():  # rounded as it is loaded
            whole = torch.empty(target.piece.stored_shape, device=decoder.device).normal_(std=0.02, generator=generator)
            target.load(whole if target.piece.cut is None else target.piece.cut.take(whole))
    whole_layout = checkpoint_layout(decoder.config, lambda name: DENSE)
    for name, parameter in decoder.named_parameters():
        if not parameter.is_floating_point():
            continue
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        elif decoder.parallel.size == 1:
            parameter.normal_(std=0.02, generator=generator)
        else:
            parameter.zero_()  # the padding of a vocabulary
            _fill_part(parameter, whole_layout[name], targets, generator)


def _fill_part(parameter: Tensor, pieces: tuple[Piece, ...], targets: dict[str, Target], generator: Generator) -> None:
    """Make the tensors of a whole parameter as one rank would, and load this rank's part of each."""
    num_rows = [piece.num_rows for piece in pieces]
    columns = [pieces[0].shape[pieces[0].column_dim]] if parameter.dim() > 1 else []
    whole = parameter.new_empty(sum(num_rows), *columns).normal_(std=0.02, generator=generator)
    for piece, rows in zip(pieces, whole.split(num_rows), strict=True):
        tensor, cut = piece.from_rows(rows), targets[piece.name].piece.cut
        if piece.order is not None:
            tensor = tensor.index_select(piece.row_dim, torch.tensor(piece.order, device=rows.device).argsort())
        targets[piece.name].load(tensor if cut is None else cut.take(tensor))
