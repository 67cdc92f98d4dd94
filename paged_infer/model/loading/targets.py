"""Where each tensor of a checkpoint goes in a Decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paged_infer.model.config import ModelConfig
from paged_infer.model.decoder import Decoder
from paged_infer.model.linear import DENSE, Piece
from paged_infer.model.loading.layout import checkpoint_layout

_PANELS = ".panels"  # what ``PackedMethod`` makes of ``.weight``


@dataclass(frozen=True, slots=True)
class Target:
    """Where one tensor of the checkpoint goes: to some rows of a module's parameter."""

    module: nn.Module
    parameter: str
    rows: slice
    piece: Piece

    def load(self, tensor: Tensor) -> None:
        if self.piece.is_zero:
            tensor = torch.zeros_like(tensor)
        if self.piece.order is not None:
            tensor = tensor.index_select(self.piece.row_dim, torch.tensor(self.piece.order))
        if self.parameter == "qk_norm_weight":  # [D] of all heads, or [H D] of each
            tensor = tensor.view(-1, self.module.get_parameter(self.parameter).shape[1])
        getattr(self.module, "method", DENSE).load(self.module, self.parameter, self.rows, self.piece, tensor)


def targets_of(decoder: Decoder) -> dict[str, Target]:
    """Checkpoint name -> what it fills."""
    parameters = {
        name.removesuffix(_PANELS) + ".weight" if name.endswith(_PANELS) else name
        for name, _ in decoder.named_parameters()
    }
    targets: dict[str, Target] = {}
    methods = {name: linear.method for name, linear in decoder.linears()}
    layout = checkpoint_layout(decoder.config, methods.__getitem__, decoder.parallel)
    for our_name, pieces in layout.items():
        row = 0
        parameters.remove(our_name)
        module_name, _, name = our_name.rpartition(".")
        for piece in pieces:
            rows = piece.num_rows
            if name == "qk_norm_weight":
                rows = _heads_of(piece, decoder.own_config)
            targets[piece.name] = Target(decoder.get_submodule(module_name), name, slice(row, row + rows), piece)
            row += rows
    assert not parameters, f"layout names no source for {sorted(parameters)}"
    return targets


def _heads_of(piece: Piece, config: ModelConfig) -> int:
    return config.num_heads if "q_norm" in piece.name else config.num_kv_heads
