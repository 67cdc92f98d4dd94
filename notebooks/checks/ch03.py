"""Checkers of chapter 03, the decoder."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from checks import checker, device, expect, expect_tensor


@checker
def neighbours_to_halves(answer):
    """Rows of W_Q, [heads * D, hidden], from rotary pairs (2i, 2i + 1) to pairs (i, i + D / 2), head by head."""
    weight = torch.arange(2 * 6).float()[:, None] * torch.tensor([1.0, -1.0, 0.5, 2.0])  # row r is r times that
    right = weight.view(2, 3, 2, 4).transpose(1, 2).reshape(12, 4)
    found = answer(weight.clone(), 2)
    expect_tensor(found, right, "neighbours_to_halves of weight [12, 4] with 2 heads")
    across_heads = torch.cat((weight[0::2], weight[1::2]))
    inverse = weight.view(2, 2, 3, 4).transpose(1, 2).reshape(12, 4)
    expect(not found.equal(weight), "the rows are as they were")
    expect(not found.equal(across_heads), "rows moved from one head to another: reorder each head by itself")
    expect(not found.equal(inverse), "this is the way back, from halves to neighbours")
    expect(
        sorted(found[:, 0].tolist()) == sorted(weight[:, 0].tolist()),
        "a row was lost or is there twice: the rows only change places",
    )
    order, wanted = found[:, 0].int().tolist(), right[:, 0].int().tolist()
    expect(found.equal(right), f"two heads of 6 rows: the rows stand in the order {order} instead of {wanted}")


@checker
def swiglu_width(answer):
    """2/3 of 4 * hidden_size, rounded up to a multiple."""
    for hidden, multiple, wanted in ((4096, 256, 11_008), (192, 64, 512), (100, 8, 272), (100, 1, 267)):
        found = answer(hidden, multiple)
        case = f"hidden_size {hidden}, multiple_of {multiple}"
        expect(found is not None, "swiglu_width gives None: is the `return` missing?")
        expect(isinstance(found, int), f"{case} gives a {type(found).__name__}, and an int is asked for")
        expect(found % multiple == 0, f"{case} gives {found}, which is not a multiple of {multiple}")
        expect(
            not 4 * hidden <= found < 4 * hidden + multiple,
            f"{case} gives {found}, the width of a plain MLP: three matrices of it are half as much again",
        )
        expect(
            not (found == wanted - multiple and 3 * found < 8 * hidden),
            f"{case} gives {found}, which is rounded down: fewer parameters than the plain MLP has",
        )
        expect(found == wanted, f"{case} gives {found} instead of {wanted}")


@checker
def mean_vectors(answer):
    """hidden [B, T, hidden], padded on the right -> the mean of each text's own rows, of length 1."""
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([5, 2, 3])
    own = torch.arange(5) < lengths[:, None]  # [B, T]
    mean = (hidden * own[..., None]).sum(dim=1) / lengths[:, None]
    right = F.normalize(mean, dim=-1)
    asked = "mean_vectors of hidden [3, 5, 4] with lengths [5, 2, 3]"
    found = answer(hidden.clone().to(device), lengths.clone().to(device))
    expect_tensor(found, right, asked)
    found = found.cpu()
    expect(not found.isnan().any(), f"{asked} holds NaN: a sum was divided by 0")
    last = hidden[torch.arange(3), lengths - 1]
    mistakes = {
        "the means are right, and not of length 1: divide each by its own length": mean,
        "padding was averaged, too: a text's own tokens are the first ones of its row": F.normalize(
            hidden.mean(dim=1), dim=-1
        ),
        "these are the vectors of the last tokens: all tokens of a text count": F.normalize(last, dim=-1),
        "columns were scaled to length 1, and each text's vector is a row": F.normalize(mean, dim=0),
    }
    if not torch.allclose(found, right, atol=1e-5):
        for sentence, value in mistakes.items():
            expect(not torch.allclose(found, value, atol=1e-5), sentence)
    for text, length in enumerate(lengths.tolist()):
        same = torch.allclose(found[text], right[text], atol=1e-5)
        expect(same, f"{asked}: the vector of text {text}, of {length} tokens, is another one")


@checker
def decoder_layer(answer):
    """One layer of a Qwen3 of 4 query heads, 2 of keys and values, 8 numbers each, for tokens that begin at 3."""
    w = _weights(hidden=24, num_heads=4, num_kv_heads=2, dim=8, wide=40)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(7))
    positions = torch.tensor([3, 4, 7, 8, 9])
    right = _layer(x, w, positions)
    asked = "decoder_layer of x [5, 24], 4 query heads and 2 of keys and values of 8 numbers"

    def ask(num_tokens):
        on_device = (x[:num_tokens].clone().to(device), {name: tensor.to(device) for name, tensor in w.items()})
        return answer(*on_device, positions[:num_tokens].clone().to(device), 8)

    found = ask(5)
    expect_tensor(found, right, asked)
    found = found.cpu()
    mistakes = {
        "the stream is not added to: x + attention(...), then x + MLP(...)": _layer(x, w, positions, adds=False),
        "the MLP reads the layer's input: it reads what attention has added to": (
            _layer(x, w, positions, sequential=False)
        ),
        "every token sees all tokens: the causal mask is missing": _layer(x, w, positions, causal=False),
        "positions are counted from 0: two distances between the given ones are larger than 1": (
            _layer(x, w, torch.arange(5))
        ),
        "queries and keys were not turned by their positions": _layer(x, w, positions * 0),
        "query and key heads are not normalised before they are turned (q_norm, k_norm)": (
            _layer(x, w, positions, qk_norm=False)
        ),
        "gate and up are exchanged": _layer(x, w, positions, gate="up", up="gate"),
        "query heads are dealt out in turn: 0 and 1 share the first head of keys, 2 and 3 the second": (
            _layer(x, w, positions, interleaved=False)
        ),
        "the two norms are exchanged: input_layernorm comes before attention": (
            _layer(x, w, positions, norms=("post_attention_layernorm", "input_layernorm"))
        ),
    }
    if not torch.allclose(found, right, atol=1e-4):
        for sentence, value in mistakes.items():
            expect(not torch.allclose(found, value, atol=1e-4), sentence)
    worst = (found - right).abs().amax(dim=-1)
    expect(torch.allclose(found, right, atol=1e-4), f"{asked}: rows are off by up to {worst.max():.2g}")
    expect(
        torch.allclose(ask(3).cpu(), right[:3], atol=1e-4), "right for 5 tokens, and for their first 3 something else"
    )


def _weights(hidden: int, num_heads: int, num_kv_heads: int, dim: int, wide: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (num_heads * dim, hidden),
        "self_attn.k_proj": (num_kv_heads * dim, hidden),
        "self_attn.v_proj": (num_kv_heads * dim, hidden),
        "self_attn.o_proj": (hidden, num_heads * dim),
        "self_attn.q_norm": (dim,),
        "self_attn.k_norm": (dim,),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    return {f"{n}.weight": torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for n, shape in shapes.items()}


def _layer(
    x: Tensor,
    w: dict[str, Tensor],
    positions: Tensor,
    *,
    adds: bool = True,
    sequential: bool = True,
    causal: bool = True,
    qk_norm: bool = True,
    interleaved: bool = True,
    gate: str = "gate",
    up: str = "up",
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm"),
    dim: int = 8,
) -> Tensor:
    """The layer, or one of the mistakes in it."""

    def norm(y: Tensor, name: str) -> Tensor:
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    def linear(y: Tensor, name: str) -> Tensor:
        return y @ w[f"{name}_proj.weight"].T

    def turn(heads: Tensor) -> Tensor:
        angles = positions[:, None] * 10_000.0 ** -(torch.arange(dim // 2) / (dim // 2))
        turned = torch.complex(*heads.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), -1)

    read = norm(x, norms[0])
    q, k, v = (linear(read, f"self_attn.{name}").unflatten(1, (-1, dim)).transpose(0, 1) for name in "qkv")
    if qk_norm:
        q, k = norm(q, "self_attn.q_norm"), norm(k, "self_attn.k_norm")
    group = len(q) // len(k)
    k, v = (part.repeat_interleave(group, 0) if interleaved else part.repeat(group, 1, 1) for part in (turn(k), v))
    scores = turn(q) @ k.transpose(1, 2) / math.sqrt(dim)
    if causal:
        scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
    out = linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), "self_attn.o")
    after = x + out if adds else out
    read = norm(after if sequential else x, norms[1])
    out = linear(F.silu(linear(read, f"mlp.{gate}")) * linear(read, f"mlp.{up}"), "mlp.down")
    return after + out if adds else out
