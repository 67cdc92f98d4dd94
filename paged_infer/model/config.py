"""ModelConfig: what one decoder needs to know to be GPT-2, Llama, Mistral, Qwen2 or Qwen3.

The families differ only by the settings below. Each is read from the ``config.json`` that transformers writes; a value
that this decoder does not compute is refused by name, so a checkpoint never runs as something that it is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True, slots=True)
class Llama3RopeScaling:
    """Llama 3.1's stretch of the rotary wavelengths, as its checkpoints ask for it (``rope_type`` "llama3").

    Wavelengths over ``original_max_position / low_freq_factor`` grow by ``factor``, those under
    ``original_max_position / high_freq_factor`` stay, and between the two the change is gradual.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer. Sizes are in elements, ``sliding_windows`` in tokens (the token itself counted)."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: str = "rms"  # "rms" or "layer" (LayerNorm with bias)
    norm_eps: float = 1e-6
    activation: str = "silu"  # a value of ACTIVATIONS
    gated_mlp: bool = True  # SwiGLU: act(gate) * up; else the plain two-matrix MLP
    learned_positions: bool = False  # GPT-2's table of positions instead of RoPE
    rope_theta: float = 10_000.0
    rope_linear_factor: float = 1.0
    rope_llama3: Llama3RopeScaling | None = None
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3: RMSNorm of each query and key head before RoPE
    sliding_windows: tuple[int | None, ...] = ()  # one a layer; None attends to everything before
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"  # what the checkpoint says it was saved in

    @property
    def num_parameters(self) -> int:
        """Weights of the decoder, tied ones counted once."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = self.hidden_size * self.intermediate_size * (3 if self.gated_mlp else 2)
        norms = self.hidden_size * (2 if self.norm == "rms" else 4)
        biases = self.qkv_bias * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        biases += self.output_bias * self.hidden_size
        biases += self.mlp_bias * (self.hidden_size + self.intermediate_size * (2 if self.gated_mlp else 1))
        per_layer = attention + mlp + norms + biases + self.qk_norm * 2 * self.head_dim
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        embeddings += self.learned_positions * self.max_position_embeddings * self.hidden_size
        return embeddings + self.num_layers * per_layer + norms // 2

    @classmethod
    def from_pretrained(cls, folder: Path) -> ModelConfig:
        """Read ``folder/config.json``, and the end tokens of ``generation_config.json`` where there is one."""
        path = folder / "config.json"
        raw = read_json(path)
        generation_path = folder / "generation_config.json"
        if generation_path.is_file():
            generation = read_json(generation_path)
            raw["eos_token_id"] = generation.get("eos_token_id", raw.get("eos_token_id"))
        try:
            return cls.from_hf(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Settings from a ``config.json`` as a dict.

        Raises:
            ValueError: an unknown family (the message lists the known ones), a setting that is missing, or a value
                that this decoder does not compute.
        """
        family = raw.get("model_type")
        if family not in _FAMILIES:
            raise ValueError(f"model_type={family!r} is not known; known: {', '.join(sorted(_FAMILIES))}")
        try:
            settings = _FAMILIES[family](raw)
        except KeyError as error:
            raise ValueError(f"lacks {error.args[0]!r}") from None
        config = cls(family=family, **settings, **_end_tokens(raw), dtype=_dtype(raw))
        if config.num_heads % config.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={config.num_heads} is no multiple of num_key_value_heads={config.num_kv_heads}"
            )
        return config


def read_json(path: Path) -> dict[str, Any]:
    """The object in a checkpoint's JSON file; a ValueError that names the file if there is none."""
    if not path.is_file():
        raise ValueError(
            f"{path.parent}: no {path.name} there, so it is not a checkpoint in Hugging Face format"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


def _end_tokens(raw: Mapping[str, Any]) -> dict[str, Any]:
    eos = raw.get("eos_token_id")
    eos_ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return {"bos_token_id": raw.get("bos_token_id"), "eos_token_ids": eos_ids}


def _dtype(raw: Mapping[str, Any]) -> str:
    return str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")


def _activation(raw: Mapping[str, Any], key: str, default: str) -> str:
    name = raw.get(key, default)
    if name not in ACTIVATIONS:
        raise ValueError(f"{key}={name!r} is not known; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _refuse_unless(raw: Mapping[str, Any], **expected: Any) -> None:
    for key, value in expected.items():
        if raw.get(key, value) not in (value, None):
            raise ValueError(f"{key}={raw[key]!r} is not supported; only {value!r} is")


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings: ``rope_parameters`` (transformers 5) and ``rope_theta`` with ``rope_scaling`` (before)."""
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    _refuse_unless({**raw, **scaling}, partial_rotary_factor=1.0)
    rope: dict[str, Any] = {
        "rope_theta": float(scaling.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    }
    if kind == "linear":
        rope["rope_linear_factor"] = float(scaling["factor"])
    elif kind == "llama3":
        rope["rope_llama3"] = Llama3RopeScaling(
            factor=scaling["factor"],
            low_freq_factor=scaling["low_freq_factor"],
            high_freq_factor=scaling["high_freq_factor"],
            original_max_position=scaling["original_max_position_embeddings"],
        )
    elif kind != "default":
        raise ValueError(f"rope_type={kind!r} is not known; known: default, linear, llama3")
    return rope


def _windows(raw: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Which layers slide, as transformers decides it: ``layer_types`` first, else ``max_window_layers``."""
    num_layers, window = raw["num_hidden_layers"], raw.get("sliding_window")
    if "use_sliding_window" in raw and not raw["use_sliding_window"]:
        window = None
    kinds = raw.get("layer_types")
    if kinds is None:
        first = raw.get("max_window_layers", 0) if "use_sliding_window" in raw else 0
        kinds = [
            "sliding_attention" if window and layer >= first else "full_attention"
            for layer in range(num_layers)
        ]
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ValueError(f"layer_types holds {sorted(unknown)}; known: full_attention, sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _llama_like(raw: Mapping[str, Any]) -> dict[str, Any]:
    heads = raw["num_attention_heads"]
    return {
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["hidden_size"],
        "intermediate_size": raw["intermediate_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
        "max_position_embeddings": raw["max_position_embeddings"],
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "activation": _activation(raw, "hidden_act", "silu"),
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "sliding_windows": (None,) * raw["num_hidden_layers"],
        **_rope(raw),
    }


def _llama(raw: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_unless(raw, pretraining_tp=1)
    bias = raw.get("attention_bias", False)
    return {**_llama_like(raw), "qkv_bias": bias, "output_bias": bias, "mlp_bias": raw.get("mlp_bias", False)}


def _mistral(raw: Mapping[str, Any]) -> dict[str, Any]:
    # A missing sliding_window means transformers' default of 4,096; null means none.
    return {**_llama_like(raw), "sliding_windows": _windows({"sliding_window": 4096, **raw})}


def _qwen2(raw: Mapping[str, Any]) -> dict[str, Any]:
    raw = {"use_sliding_window": False, "max_window_layers": 28, **raw}
    return {**_llama_like(raw), "qkv_bias": True, "sliding_windows": _windows(raw)}


def _qwen3(raw: Mapping[str, Any]) -> dict[str, Any]:
    raw = {"use_sliding_window": False, "max_window_layers": 28, "head_dim": 128, **raw}
    bias = raw.get("attention_bias", False)
    return {
        **_llama_like(raw),
        "qk_norm": True,
        "qkv_bias": bias,
        "output_bias": bias,
        "sliding_windows": _windows(raw),
    }


def _gpt2(raw: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_unless(
        raw, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
    )
    hidden, heads, num_layers = raw["n_embd"], raw["n_head"], raw["n_layer"]
    return {
        "vocab_size": raw["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": raw.get("n_inner") or 4 * hidden,
        "num_layers": num_layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": raw["n_positions"],
        "norm": "layer",
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "activation": _activation(raw, "activation_function", "gelu_new"),
        "gated_mlp": False,
        "learned_positions": True,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": raw.get("tie_word_embeddings", True),
        "sliding_windows": (None,) * num_layers,
    }


_FAMILIES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
