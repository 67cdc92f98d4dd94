"""A linear method decides how W is stored, loaded and multiplied; a new one changes no other part of the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checkpoints import FAMILIES
from decoding import IDS, logits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paged_infer.kernels.cpu.build import unavailable_reason
from paged_infer.kernels.op_sets import C_OPS
from paged_infer.model.decoder import Decoder
from paged_infer.model.linear import DENSE, DenseMethod, Linear, PackedMethod, Piece
from paged_infer.model.loading.load import checkpoint_views, load_decoder
from paged_infer.model.loading.targets import targets_of
from paged_infer.model.moe import ExpertStack, MoE


class Doubled(DenseMethod):
    """Stores W doubled under another name, and halves it when it multiplies: exact in floating point."""

    def create(self, linear: Linear, dtype: torch.dtype) -> None:
        linear.doubled = nn.Parameter(torch.empty(linear.out_features, linear.in_features, dtype=dtype))

    def layout(self, pieces: tuple[Piece, ...]) -> dict[str, tuple[Piece, ...]]:
        return {"doubled": pieces}

    def load(self, linear: nn.Module, parameter: str, rows: slice, piece: Piece, tensor: Tensor) -> None:
        super().load(linear, parameter, rows, piece, tensor * 2 if parameter == "doubled" else tensor)

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(linear), linear.bias)

    def dense(self, linear: Linear) -> Tensor:
        return linear.doubled / 2


class Scaled(DenseMethod):
    """Reads int8 values [out, in] and a scale for each row: two tensors of the checkpoint for each matrix."""

    def create(self, linear: Linear, dtype: torch.dtype) -> None:
        shape = (linear.out_features, linear.in_features)
        linear.values = nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
        linear.scales = nn.Parameter(torch.empty(shape[0], 1, dtype=torch.float32))

    def layout(self, pieces: tuple[Piece, ...]) -> dict[str, tuple[Piece, ...]]:
        return {
            "values": tuple(Piece(p.name, p.shape, is_float=False) for p in pieces),
            "scales": tuple(Piece(f"{p.name}_scale", (p.shape[0], 1)) for p in pieces),
        }

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        return F.linear(x, linear.values.to(x.dtype) * linear.scales.to(x.dtype), linear.bias)


class Shard:
    """One of ``size`` equal parts of another method's W: of its rows (dim 0) or of its columns (dim 1)."""

    def __init__(self, inner: DenseMethod, dim: int, rank: int, size: int) -> None:
        self.inner, self.dim, self.rank, self.size = inner, dim, rank, size
        self.layout, self.prepack, self.apply = inner.layout, inner.prepack, inner.apply

    def create(self, linear: Linear, dtype: torch.dtype) -> None:
        linear.out_features //= self.size if self.dim == 0 else 1
        linear.in_features //= self.size if self.dim == 1 else 1
        self.inner.create(linear, dtype)

    def load(self, linear: Linear, parameter: str, rows: slice, piece: Piece, tensor: Tensor) -> None:
        if self.dim == 0:
            rows = slice(rows.start // self.size, rows.stop // self.size)
        part = tensor.chunk(self.size, self.dim ^ piece.row_dim)[self.rank]
        self.inner.load(linear, parameter, rows, piece, part)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_method_of_ones_own_loads_every_family_and_gives_the_same_logits(family, checkpoint) -> None:
    plain = load_decoder(checkpoint(family), torch.float32, method_of=lambda name: DENSE)
    doubled = load_decoder(checkpoint(family), torch.float32, method_of=lambda name: Doubled())
    names = [name for name, _ in doubled.linears()]
    assert len(names) >= 4 * plain.config.num_layers  # with experts, also the router
    assert not {f"{name}.weight" for name in names} & dict(doubled.named_parameters()).keys()
    assert torch.equal(logits(doubled, IDS), logits(plain, IDS))


@pytest.mark.parametrize("family", ["qwen3", "llama-biased"])
def test_a_matrix_may_be_several_tensors_of_other_types(family, checkpoint, tmp_path) -> None:
    """As in every quantised format: here int8 values and a scale a row, except in the down projections."""
    plain = load_decoder(checkpoint(family), torch.float32, method_of=lambda name: DENSE)
    tensors: dict[str, Tensor] = {}
    for file in sorted(checkpoint(family).glob("*.safetensors")):
        tensors |= load_file(file)
    dequantised = {}
    for name, tensor in list(tensors.items()):
        if name.endswith("proj.weight") and "down" not in name:
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensor / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale
            dequantised[name] = tensors[name].float() * scale
    (tmp_path / "config.json").write_bytes((checkpoint(family) / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    def method_of(name: str) -> DenseMethod:
        return DENSE if name.endswith("down") else Scaled()

    ours = load_decoder(tmp_path, torch.float32, method_of=method_of)
    assert ours.get_parameter("layers.0.attention.qkv.values").dtype is torch.int8
    save_file(
        {**{n: t for n, t in tensors.items() if not n.endswith("_scale")}, **dequantised},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    theirs = load_decoder(tmp_path, torch.float32, method_of=lambda name: DENSE)
    assert torch.equal(logits(ours, IDS), logits(theirs, IDS))
    assert not torch.equal(logits(ours, IDS), logits(plain, IDS))
    with pytest.raises(
        ValueError, match=r"missing tensor model\.layers\.0\.self_attn\.q_proj\.weight_scale \[\d+, 1\]"
    ):
        load_decoder(tmp_path, torch.float32, method_of=method_of)


def test_packed_is_what_the_loader_uses_and_holds_each_weight_once(checkpoint) -> None:
    decoder = load_decoder(checkpoint("qwen3"), torch.float32, ops=C_OPS)
    dense = load_decoder(checkpoint("qwen3"), torch.float32, method_of=lambda name: DENSE)
    assert all(type(linear.method) is PackedMethod for _, linear in decoder.linears())
    ours, theirs = checkpoint_views(decoder), checkpoint_views(dense)
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.testing.assert_close(logits(decoder, IDS), logits(dense, IDS), atol=1e-4, rtol=1e-4)
    if unavailable_reason() is None:
        held = {p.data_ptr(): p.numel() for p in decoder.parameters()}
        assert sum(held.values()) < 1.02 * sum(p.numel() for p in dense.parameters())  # panels may be padded
        for _, linear in decoder.linears():
            assert linear.product.panels.data_ptr() in held and "weight" not in dict(linear.named_parameters())


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "gpt-oss", "deepseek2"])
def test_float32_experts_are_held_once_in_panels(family, checkpoint) -> None:
    decoder = load_decoder(checkpoint(family), torch.float32, ops=C_OPS)
    dense = load_decoder(checkpoint(family), torch.float32, method_of=lambda name: DENSE)
    ours, theirs = checkpoint_views(decoder), checkpoint_views(dense)
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.testing.assert_close(logits(decoder, IDS), logits(dense, IDS), atol=1e-4, rtol=1e-4)
    stacks = [module for module in decoder.modules() if isinstance(module, ExpertStack)]
    assert stacks
    if unavailable_reason() is None:
        for stack in stacks:
            assert {name for name, _ in stack.named_parameters()} - {"bias"} == {"panels"}
            rows = stack.out_features // stack.num_experts
            assert stack.panels.numel() <= stack.num_experts * (rows + 31) * stack.in_features  # padding of a panel
        x = torch.randn(3, decoder.config.hidden_size)
        moe = next(module for module in decoder.modules() if isinstance(module, MoE))
        ids, scores = torch.tensor([[0, 1]] * 3), torch.ones(3, 2)
        plain = next(module for module in dense.modules() if isinstance(module, MoE))
        out, expected = (one.experts(x, ids, scores.double()) for one in (moe, plain))  # scores that C does not take
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_layer_that_takes_a_method_again_forgets_what_was_packed() -> None:
    packed, x = PackedMethod(C_OPS.pack), torch.randn(3, 400)
    linear = Linear(400, 400, bias=False, method=packed)
    linear.weight.zero_()
    linear.method.prepack(linear)
    linear.use(packed, torch.float32)
    linear.weight.copy_(torch.eye(400))
    assert torch.equal(linear(x), x)


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_shards_of_the_mlp_add_up_to_the_mlp(family, checkpoint) -> None:
    """Tensor parallelism of two ranks: rows of gate and of up each, columns of down, and a sum of both ranks."""

    def rank(rank: int) -> Decoder:
        shards = {"up": Shard(DENSE, 0, rank, 2), "down": Shard(DENSE, 1, rank, 2)}
        of_name = lambda name: shards.get(name.rpartition(".")[2], DENSE)  # noqa: E731
        return load_decoder(checkpoint(family), torch.float32, method_of=of_name)

    plain = load_decoder(checkpoint(family), torch.float32, method_of=lambda name: DENSE)
    ranks = [rank(0), rank(1)]
    assert ranks[0].layers[1].mlp.up.weight.shape == (272, 192)
    x = torch.randn(5, 192)
    with torch.inference_mode():
        whole, parts = plain.layers[1].mlp(x), [one.layers[1].mlp(x) for one in ranks]
    torch.testing.assert_close(parts[0] + parts[1], whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_covers_every_row_of_every_parameter(family, checkpoint) -> None:
    decoder = load_decoder(checkpoint(family), torch.float32)
    covered: dict[str, int] = {}
    for target in targets_of(decoder).values():
        name = f"{id(target.module)}.{target.parameter}"
        assert target.rows.start == covered.get(name, 0)
        covered[name] = target.rows.stop
        parameter = target.module.get_parameter(target.parameter)
        assert target.rows.stop <= parameter.shape[0]
        if target.rows.stop == parameter.shape[0]:
            del covered[name]
    assert not covered
