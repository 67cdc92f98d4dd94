"""Calibration: run texts through a decoder layer by layer, and collect statistics of each linear layer's inputs.

A layer is calibrated on the outputs of the layers before it, which are quantised by then, so it also compensates for
their errors (as in GPTQ: Frantar 2022, section 4, "Setup").
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paged_infer.cache.none import NoCache
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.model.decoder import Decoder, DecoderLayer
from paged_infer.model.linear import Linear
from paged_infer.model.moe import Experts

Texts = ReadOnlyList[ReadOnlyList[int]]
"""The token ids of each text."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Statistics of the inputs X [T, K] of a linear layer.

    Attributes:
        products: X^T X, [K, K].
        mean: mean |x| of each input channel, [K].
        largest: max |x| of each input channel, [K].
    """

    products: Tensor
    mean: Tensor
    largest: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        x = x.float()
        return cls(x.t() @ x, x.abs().mean(0), x.abs().amax(0))


class CalibratedLayer:
    """One decoder layer with its inputs for the texts, to be run again whenever its weights have changed.

    Attributes:
        linears: its linear layers by name, in the decoder's order; those of experts are stacks.
        module: the decoder layer.
    """

    def __init__(self, module: DecoderLayer, linears: dict[str, Linear], arguments: tuple[object, ...]) -> None:
        self.module, self.linears, self._arguments = module, linears, arguments

    @torch.inference_mode()
    def run(self) -> tuple[Tensor, Tensor]:
        """The layer's output and the residual stream, [T, hidden] each."""
        output: tuple[Tensor, Tensor] = self.module(*self._arguments)
        return output

    def expert_products(self, name: str) -> list[Tensor]:
        """X^T X [K, K] for each of the E experts of the stack ``name``, over the tokens routed to it."""
        experts, found = self.module.get_submodule("mlp.experts"), list[Tensor]()
        assert isinstance(experts, Experts)

        def watch(module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
            x, ids, _ = inputs
            up, bias = experts.up.stacked()
            for expert, weight in enumerate(up):
                rows = x[(ids == expert).any(1)]
                if name.endswith("down"):
                    rows = experts.glu(F.linear(rows, weight, None if bias is None else bias[expert]))
                found.append(rows.float().t() @ rows.float())

        handle = experts.register_forward_pre_hook(watch)
        try:
            self.run()
        finally:
            handle.remove()
        return found

    def moments(self, *names: str) -> dict[str, Moments]:
        """Statistics of the inputs of the linear layers ``names``, computed with the current weights.

        Raises:
            ValueError: the inputs or their products are not finite; the message names the linear layer.
        """
        seen: dict[str, Moments] = {}

        def watch(name: str, module: nn.Module, inputs: tuple[Tensor]) -> None:
            seen[name] = Moments.of(inputs[0])

        handles = [self.linears[name].register_forward_pre_hook(partial(watch, name)) for name in names]
        try:
            self.run()
        finally:
            for handle in handles:
                handle.remove()
        for name, own in seen.items():
            if not own.products.isfinite().all():
                raise ValueError(f"{name}: its inputs have values that are infinite or NaN, or too large to be squared")
        return seen


def calibrated_layers(decoder: Decoder, texts: Texts) -> Iterator[CalibratedLayer]:
    """The layers of ``decoder`` in order. The caller may change a layer; the next one gets the changed layer's outputs.

    Raises:
        ValueError: there is no text, or one is empty.
    """
    token_ids, step = packed_step(texts, decoder.device)
    cache, residual = NoCache(decoder.kv_spec()), None
    with torch.inference_mode():
        x = decoder.embed(token_ids, step.positions)
        ropes = [rotary(step.positions, x.dtype) for rotary in decoder.rotary]
    linears = dict(decoder.linears())
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        rope = None if layer.rope_index is None else ropes[layer.rope_index]
        own = {name: one for name, one in linears.items() if name.startswith(f"layers.{index}.")}
        current = CalibratedLayer(layer, own, (x, residual, rope, cache, step))
        yield current
        x, residual = current.run()


def packed_step(texts: Texts, device: torch.device | str = "cpu") -> tuple[Tensor, AttentionMetadata]:
    """The token ids [T] of all texts, concatenated, and the metadata of a step that computes them without a cache.

    Raises:
        ValueError: there is no text, or one is empty.
    """
    lengths = [len(text) for text in texts]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"calibration: {'an empty text' if lengths else 'no text'}")
    none = torch.empty(0, dtype=torch.int64, device=device)
    step = AttentionMetadata(
        positions=torch.cat([torch.arange(n, device=device) for n in lengths]),
        slot_mapping=none,
        query_start_loc=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_tables=none,
        num_decodes=0,
        max_query_len=max(lengths),
        max_seq_len=max(lengths),
    )
    return torch.tensor([token for text in texts for token in text], device=device), step


@torch.inference_mode()
def log_probs(decoder: Decoder, text: ReadOnlyList[int]) -> Tensor:
    """Log-probabilities of the next token after each token of a text: [T, V] float32."""
    token_ids, step = packed_step([text], decoder.device)
    return decoder.logits(decoder(token_ids, NoCache(decoder.kv_spec()), step)).float().log_softmax(-1)


def divergence(reference: Tensor, found: Tensor) -> Tensor:
    """KL(reference || found) of each token, in nats, from log-probabilities [T, V]: [T]."""
    return (reference.exp() * (reference - found)).sum(-1)
