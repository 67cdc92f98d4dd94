"""ModelConfig: the settings that make one decoder GPT-2, Llama, Gemma, Phi or any other of ``families.FAMILIES``.

The families differ only by the settings below. Each is read from the ``config.json`` that transformers writes; a value
that this decoder does not support is refused by name, so a checkpoint never runs as a different model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from paged_infer.model.config_keys import GENERATION_DEFAULTS, KEYS_WITHOUT_EFFECT, UNSUPPORTED_KEYS
from paged_infer.model.config_reader import ConfigReader, read_json
from paged_infer.model.families import FAMILIES
from paged_infer.model.mla_config import MLAConfig
from paged_infer.model.moe_config import MoEConfig
from paged_infer.model.quantization_config import QuantizationConfig, read_quantization
from paged_infer.model.rope_config import RopeConfig

logger = logging.getLogger(__name__)


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
    norm_offset: float = 0.0  # Gemma: a norm multiplies by 1 + weight
    pre_norm: bool = True  # each sublayer's input is normalised
    post_norm: bool = False  # each sublayer's output is normalised, before it joins the residual stream
    activation: str = "silu"  # a value of families.common.ACTIVATIONS
    gated_mlp: bool = True  # SwiGLU: act(gate) * up; else the plain two-matrix MLP
    learned_positions: bool = False  # GPT-2's table of positions instead of RoPE
    ropes: tuple[RopeConfig | None, ...] = ()  # one per layer, None: no RoPE there; (): that of RoFormer in each
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: Literal["head", "width"] | None = None  # RMSNorm before RoPE, of each head (Qwen3) or all at once (OLMo-2)
    attention_scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    softcap: float | None = None  # Gemma 2: scores become softcap * tanh(scores / softcap)
    attention_sinks: bool = False  # gpt-oss: a learned logit per head joins the softmax's denominator
    logits_softcap: float | None = None  # the same of the logits
    logits_scaling: float = 1.0  # Granite: divides the logits
    embedding_multiplier: float = 1.0  # Granite, Gemma; rounded to the weights' dtype
    residual_multiplier: float = 1.0  # Granite: of each sublayer's output
    mla: MLAConfig | None = None  # its attention instead; num_kv_heads is then num_heads, and head_dim the rotated part
    sliding_windows: tuple[int | None, ...] = ()  # one per layer; None attends to all earlier tokens
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"  # of the saved weights, by config.json
    moe: MoEConfig | None = None  # experts instead of the MLP, in the layers that it names
    quantization: QuantizationConfig | None = None  # how the checkpoint's quantised matrices are stored
    max_model_len: int | None = None  # the longest sequence that is computed, if less than max_position_embeddings

    def __post_init__(self) -> None:
        if not self.ropes:
            rope = None if self.learned_positions else RopeConfig(rotary_dim=self.head_dim)
            object.__setattr__(self, "ropes", (rope,) * self.num_layers)

    @property
    def num_parameters(self) -> int:
        """Weights of the decoder, tied ones counted once."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        attention += self.qkv_bias * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        attention += self.attention_sinks * self.num_heads
        attention += self.output_bias * self.hidden_size
        if self.mla is not None:
            attention = self.mla.num_parameters(self.hidden_size, self.num_heads, has_bias=self.qkv_bias)
        mlp = self.hidden_size * self.intermediate_size * (3 if self.gated_mlp else 2)
        norm = self.hidden_size * (1 if self.norm == "rms" else 2)
        norms = norm * 2 * (self.pre_norm + self.post_norm)
        mlp += self.mlp_bias * (self.hidden_size + self.intermediate_size * (2 if self.gated_mlp else 1))
        heads_normed = {"head": 2, "width": self.num_heads + self.num_kv_heads, None: 0}[self.qk_norm]
        per_layer = attention + norms + heads_normed * self.head_dim
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        embeddings += self.learned_positions * self.max_position_embeddings * self.hidden_size
        num_moe = 0 if self.moe is None else sum(self.moe.layers)
        experts = 0 if self.moe is None else self.moe.num_parameters(self.hidden_size)
        mlps = (self.num_layers - num_moe) * mlp + num_moe * experts
        return embeddings + self.num_layers * per_layer + mlps + norm

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
        if not isinstance(family, str) or family not in FAMILIES:
            raise ValueError(f"model_type={family!r}: must be one of {', '.join(sorted(FAMILIES))}")
        reader = ConfigReader(raw)
        reader.only(**UNSUPPORTED_KEYS)
        settings = FAMILIES[family](reader)
        config = cls(
            family=family,
            **settings,
            bos_token_id=reader.value("bos_token_id"),
            eos_token_ids=_end_tokens(reader.value("eos_token_id"), generation, settings["vocab_size"]),
            dtype=named_dtype(raw) or "float32",
            quantization=read_quantization(reader.value("quantization_config")),
        )
        if config.num_heads % config.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={config.num_heads} is not a multiple of num_key_value_heads={config.num_kv_heads}"
            )
        if unread := [key for key in reader.unread() if key not in KEYS_WITHOUT_EFFECT]:
            logger.warning("config.json: %s: without effect, here and in transformers", ", ".join(unread))
        _warn_about_defaults(raw if generation is None else generation, is_own_file=generation is not None)
        return config


def named_dtype(raw: Mapping[str, Any]) -> str | None:
    """The dtype of the saved weights according to ``config.json``; None if it names none."""
    name = raw.get("dtype") or raw.get("torch_dtype")
    return None if name is None else str(name).removeprefix("torch.")


def _end_tokens(of_model: Any, generation: Mapping[str, Any] | None, vocab_size: int) -> tuple[int, ...]:
    """From ``generation_config.json`` if it exists, even if it names none; otherwise from ``config.json``.

    Ids outside the vocabulary, which a config copied from a larger model may contain, can never be sampled and are
    dropped with a warning.
    """
    eos = of_model if generation is None else generation.get("eos_token_id")
    ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError(f"eos_token_id={eos!r}: must be an integer >= 0 or a list of them")
    if eos is None and of_model is not None:
        logger.warning(
            "generation_config.json sets no eos_token_id, so no token ends a text, as in transformers; "
            "config.json's %s is not used",
            of_model,
        )
    if beyond := [i for i in ids if i >= vocab_size]:
        logger.warning("eos_token_id %s ignored: the vocabulary has %d tokens", ", ".join(map(str, beyond)), vocab_size)
    return tuple(dict.fromkeys(i for i in ids if i < vocab_size))


def _warn_about_defaults(generation: Mapping[str, Any], *, is_own_file: bool) -> None:
    """Warn once about defaults that transformers' ``generate`` would apply and that a request has to set itself."""
    asked = {
        key: value
        for key, value in generation.items()
        if value is not None
        and value != GENERATION_DEFAULTS.get(key)
        and (key in GENERATION_DEFAULTS or (is_own_file and key not in KEYS_WITHOUT_EFFECT))
    }
    if asked:
        logger.warning(
            "%s sets %s: not applied by default; set it in SamplingParams, if there is such a parameter",
            "generation_config.json" if is_own_file else "config.json",
            ", ".join(f"{key}={value!r}" for key, value in sorted(asked.items())),
        )
