"""ModelConfig: what one decoder needs to know to be GPT-2, Llama, Mistral, Qwen2 or Qwen3.

The families differ only by the settings below. Each is read from the ``config.json`` that transformers writes; a value
that this decoder does not compute is refused by name, so a checkpoint never runs as something that it is not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paged_infer.model.config_keys import ASKS_FOR_MORE, CHANGES_NOTHING, GENERATION_DEFAULTS
from paged_infer.model.config_reader import ConfigReader, read_json
from paged_infer.model.rope_config import Llama3RopeScaling, read_rope

logger = logging.getLogger(__name__)

MAX_LAYERS = 10_000  # far beyond any real model; each layer is a Python module
Windows = tuple[int | None, ...]
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


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
        path, generation_path = folder / "config.json", folder / "generation_config.json"
        raw = read_json(path)
        generation = read_json(generation_path) if generation_path.is_file() else None
        try:
            return cls.from_hf(raw, generation)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """Settings from a ``config.json`` as a dict, and its ``generation_config.json`` if there is one.

        Warnings name the keys that have no effect (transformers ignores them, too) and the generation defaults that a
        request has to set itself.

        Raises:
            ValueError: an unknown family (the message lists the known ones), a setting that is missing or malformed, or
                a value that this decoder does not support.
        """
        family = raw.get("model_type")
        if not isinstance(family, str) or family not in _FAMILIES:
            raise ValueError(f"model_type={family!r} is not known; known: {', '.join(sorted(_FAMILIES))}")
        reader = ConfigReader(raw)
        reader.only(**ASKS_FOR_MORE)
        settings = _FAMILIES[family](reader)
        config = cls(
            family=family,
            **settings,
            bos_token_id=reader.value("bos_token_id"),
            eos_token_ids=_end_tokens(reader.value("eos_token_id"), generation, settings["vocab_size"]),
            dtype=named_dtype(raw) or "float32",
        )
        if config.num_heads % config.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={config.num_heads} is no multiple of num_key_value_heads={config.num_kv_heads}"
            )
        if not config.learned_positions and config.head_dim % 2:
            raise ValueError(f"head_dim={config.head_dim}: must be even, because RoPE rotates pairs")
        if unread := [key for key in reader.unread() if key not in CHANGES_NOTHING]:
            logger.warning("config.json: nothing reads %s, here or in transformers", ", ".join(unread))
        _name_defaults(raw if generation is None else generation, is_own_file=generation is not None)
        return config


def named_dtype(raw: Mapping[str, Any]) -> str | None:
    """The dtype of the saved weights according to ``config.json``; None if it names none."""
    name = raw.get("dtype") or raw.get("torch_dtype")
    return None if name is None else str(name).removeprefix("torch.")


def _end_tokens(of_model: Any, generation: Mapping[str, Any] | None, vocab_size: int) -> tuple[int, ...]:
    """From ``generation_config.json`` if there is one, even if it names none; otherwise from ``config.json``.

    Ids outside the vocabulary, which a config copied from a larger model may contain, can never be sampled and are
    dropped with a warning.
    """
    eos = of_model if generation is None else generation.get("eos_token_id")
    ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError(f"eos_token_id={eos!r}: must be an integer >= 0 or a list of them")
    if eos is None and of_model is not None:
        logger.warning(
            "generation_config.json names no eos_token_id, so no token ends a text, as in transformers; "
            "config.json's %s is not used",
            of_model,
        )
    if beyond := [i for i in ids if i >= vocab_size]:
        logger.warning("eos_token_id %s ignored: the vocabulary has %d tokens", ", ".join(map(str, beyond)), vocab_size)
    return tuple(dict.fromkeys(i for i in ids if i < vocab_size))


def _name_defaults(generation: Mapping[str, Any], *, is_own_file: bool) -> None:
    """Warn once about defaults that transformers' ``generate`` would apply and that a request has to set itself."""
    asked = {
        key: value
        for key, value in generation.items()
        if value is not None
        and value != GENERATION_DEFAULTS.get(key)
        and (key in GENERATION_DEFAULTS or (is_own_file and key not in CHANGES_NOTHING))
    }
    if asked:
        logger.warning(
            "%s asks for %s: not applied by default; set it in SamplingParams, where there is such a parameter",
            "generation_config.json" if is_own_file else "config.json",
            ", ".join(f"{key}={value!r}" for key, value in sorted(asked.items())),
        )


def _activation(config: ConfigReader, key: str, default: str) -> str:
    name = config.value(key, default)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{key}={name!r} is not known; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _windows(config: ConfigReader, num_layers: int, window: int | None, first: int = 0) -> Windows:
    """Which layers use a sliding window: those that ``layer_types`` names, or else all from ``first`` on."""
    kinds = config.value("layer_types")
    if kinds is None:
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ValueError(f"layer_types={kinds!r}: must be a list of num_hidden_layers={num_layers} names")
    unknown = {str(kind) for kind in kinds} - {"sliding_attention", "full_attention"}
    if unknown:
        raise ValueError(f"layer_types holds {sorted(unknown)}; known: full_attention, sliding_attention")
    if window is None and "sliding_attention" in kinds:
        raise ValueError("layer_types holds sliding_attention, but no sliding_window is in use")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _one_window(config: ConfigReader, num_layers: int, window: int | None) -> Windows:
    """For families whose layers are all alike: in transformers, only the cache reads their ``layer_types``."""
    windows = _windows(config, num_layers, window)
    if set(windows) != {window}:
        raise ValueError(f"layer_types={config.value('layer_types')!r} contradicts sliding_window={window}")
    return windows


def _head_dim(head_dim: int | None, hidden_size: int, num_heads: int) -> int:
    if head_dim is None and hidden_size % num_heads:
        raise ValueError(f"hidden_size={hidden_size} is no multiple of num_attention_heads={num_heads}")
    return head_dim or hidden_size // num_heads


def _llama_like(config: ConfigReader, head_dim: int | None = None) -> dict[str, Any]:
    heads, hidden = config.size("num_attention_heads"), config.size("hidden_size")
    max_position_embeddings = config.size("max_position_embeddings")
    return {
        "vocab_size": config.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": config.size("intermediate_size"),
        "num_layers": config.size("num_hidden_layers", most=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": config.size_or_none("num_key_value_heads") or heads,
        "head_dim": _head_dim(config.size_or_none("head_dim", head_dim), hidden, heads),
        "max_position_embeddings": max_position_embeddings,
        "norm_eps": config.number("rms_norm_eps", 1e-6),
        "activation": _activation(config, "hidden_act", "silu"),
        "tie_word_embeddings": config.flag("tie_word_embeddings", False),
        **read_rope(config, max_position_embeddings),
    }


def _llama(config: ConfigReader) -> dict[str, Any]:
    config.only(pretraining_tp=1, sliding_window=None)
    settings, bias = _llama_like(config), config.flag("attention_bias", False)
    return {
        **settings,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": config.flag("mlp_bias", False),
        "sliding_windows": _one_window(config, settings["num_layers"], None),
    }


def _mistral(config: ConfigReader) -> dict[str, Any]:
    # A missing sliding_window means transformers' default of 4,096; null means none.
    settings, window = _llama_like(config), config.size_or_none("sliding_window", 4096)
    return {**settings, "sliding_windows": _one_window(config, settings["num_layers"], window)}


def _qwen_windows(config: ConfigReader, num_layers: int) -> Windows:
    window, first = config.size_or_none("sliding_window", 4096), config.size("max_window_layers", 28, least=0)
    if not config.flag("use_sliding_window", False):
        window = None
    return _windows(config, num_layers, window, first)


def _qwen2(config: ConfigReader) -> dict[str, Any]:
    settings = _llama_like(config)
    return {**settings, "qkv_bias": True, "sliding_windows": _qwen_windows(config, settings["num_layers"])}


def _qwen3(config: ConfigReader) -> dict[str, Any]:
    settings, bias = _llama_like(config, head_dim=128), config.flag("attention_bias", False)
    return {
        **settings,
        "qk_norm": True,
        "qkv_bias": bias,
        "output_bias": bias,
        "sliding_windows": _qwen_windows(config, settings["num_layers"]),
    }


def _gpt2(config: ConfigReader) -> dict[str, Any]:
    # transformers' cache, which all families share, would keep no more than such a window.
    config.only(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, sliding_window=None)
    short = {
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
        "n_positions": "max_position_embeddings",
    }
    # transformers reads both names; the long one takes precedence.
    names = {key: key if config.value(long) is None else long for key, long in short.items()}
    hidden, heads = config.size(names["n_embd"]), config.size(names["n_head"])
    num_layers = config.size(names["n_layer"], most=MAX_LAYERS)
    return {
        "vocab_size": config.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": config.size_or_none("n_inner") or 4 * hidden,
        "num_layers": num_layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": _head_dim(None, hidden, heads),
        "max_position_embeddings": config.size(names["n_positions"]),
        "norm": "layer",
        "norm_eps": config.number("layer_norm_epsilon", 1e-5),
        "activation": _activation(config, "activation_function", "gelu_new"),
        "gated_mlp": False,
        "learned_positions": True,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": config.flag("tie_word_embeddings", True),
        "sliding_windows": _one_window(config, num_layers, None),
    }


_FAMILIES: dict[str, Callable[[ConfigReader], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
