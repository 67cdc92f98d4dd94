"""The RoPE settings of a config.json: ``rope_scaling``, ``rope_parameters``, ``rope_theta``.

Every kind ends as a ``RopeConfig``: an angle per position for each pair of dimensions, and a factor of cos and sin.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from paged_infer.model.config_reader import ConfigReader

logger = logging.getLogger(__name__)

DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class Llama3RopeScaling:
    """Llama 3.1's scaling of the rotary wavelengths (``rope_type`` "llama3").

    Wavelengths over ``original_max_position / low_freq_factor`` grow by ``factor``, those under
    ``original_max_position / high_freq_factor`` stay, and between the two the change is gradual.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class YarnRopeScaling:
    """YaRN (Peng et al. 2023, section 3.2): pair i of the rotated dimensions is slowed by ``factor`` if i > ``high``.

    Pairs below ``low``, which turn often within the original context, stay; between the two the change is linear.
    ``mscale_all_dim``: DeepSeek's growth of the scores with the factor, by the square of ``yarn_mscale``; 0: none.
    """

    factor: float
    low: float
    high: float
    mscale_all_dim: float = 0.0


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024): a factor for each pair's wavelength, [rotary_dim / 2], in two lists.

    ``short`` applies up to the original length. transformers chooses a list in every step, by the longest sequence,
    and leaves the keys in its cache as they are; here it is chosen once, by ``max_model_len``, as in vLLM.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_position: int

    def chosen(self, max_model_len: int) -> tuple[float, ...]:
        return self.long if max_model_len > self.original_max_position else self.short


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """The rotary positions of a layer: of the first ``rotary_dim`` dimensions of each query and key head.

    Attributes:
        interleaved: the checkpoint rotates pairs (2 i, 2 i + 1) instead of (i, i + rotary_dim / 2).
        attention_factor: multiplies cos and sin, and so the scores by its square (YaRN, section 3.3).
        max_position: positions that YaRN stretches the model to, if more than its config's.
    """

    rotary_dim: int
    theta: float = DEFAULT_THETA
    interleaved: bool = False
    linear_factor: float = 1.0
    llama3: Llama3RopeScaling | None = None
    yarn: YarnRopeScaling | None = None
    longrope: LongRopeScaling | None = None
    attention_factor: float = 1.0
    max_position: int = 0


def read_rope(
    config: ConfigReader,
    head_dim: int,
    max_position: int,
    *,
    theta: float = DEFAULT_THETA,
    partial: bool = False,
    aliases: Mapping[str, str] | None = None,
    default: Mapping[str, Any] | None = None,
    original: int | None = None,
) -> RopeConfig:
    """The one RoPE of all layers, by transformers' rules.

    ``rope_scaling`` (before transformers 5) replaces ``rope_parameters`` (transformers 5) as a whole, including its
    ``rope_theta``. A top-level ``rope_theta`` or ``partial_rotary_factor`` is used only if the chosen dict has none; a
    top-level ``original_max_position_embeddings`` is used even if it has one.

    Args:
        max_position: ``max_position_embeddings`` of the config.
        theta: the family's default.
        partial: whether the family may rotate a part of each head.
        aliases: the family's own names of kinds.
        default: its ``rope_parameters`` if the config has none.
        original: the family's default of ``original_max_position_embeddings``.

    Raises:
        ValueError: a RoPE type, key or value that this decoder does not support.
    """
    name, raw = _chosen(config, default)
    nested = sorted(key for key, value in raw.items() if isinstance(value, dict))
    if nested:
        raise ValueError(f"{name} is nested ({', '.join(nested)}); this family has one RoPE for all layers")
    raw.setdefault("rope_theta", ConfigReader({"rope_theta": config.value("rope_theta", theta)}).number("rope_theta"))
    part = config.value("partial_rotary_factor")
    original = config.value("original_max_position_embeddings", original)
    if part is not None:
        raw.setdefault("partial_rotary_factor", part)
    if original is not None:
        raw["original_max_position_embeddings"] = original
    if not partial:
        ConfigReader(raw).only(partial_rotary_factor=1.0)
    kind = raw.get("rope_type", raw.get("type", "default"))
    if aliases and isinstance(kind, str) and kind in aliases:
        raw |= {"rope_type": aliases[kind]}
    return _rope(ConfigReader(raw, name), name, head_dim, max_position)


def read_ropes_by_layer_type(
    config: ConfigReader, head_dim: int, max_position: int, *, full: float, sliding: Any
) -> tuple[RopeConfig, RopeConfig]:
    """Those of the ``full_attention`` and of the ``sliding_attention`` layers (Gemma 3, OLMo-3).

    Before transformers 5, ``rope_theta`` and ``rope_scaling`` were those of the full layers.

    Args:
        full, sliding: their thetas if ``rope_parameters`` has none.
    """
    nested = _object(config.value("rope_parameters"), "rope_parameters")
    if unknown := nested.keys() - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"rope_parameters has {sorted(unknown)}: must be an object of full_attention and sliding_attention"
        )
    scaling = _object(config.value("rope_scaling"), "rope_scaling")
    raw = {
        kind: _object(nested.get(kind), f"rope_parameters {kind}") for kind in ("full_attention", "sliding_attention")
    }
    raw["full_attention"] |= scaling
    raw["full_attention"].setdefault("rope_theta", config.value("rope_theta", full))
    raw["sliding_attention"].setdefault("rope_theta", sliding)
    of_full, of_sliding = (
        _nested_rope(ConfigReader(x, f"rope_parameters {kind}"), kind, head_dim, max_position)
        for kind, x in raw.items()
    )
    return of_full, of_sliding


def _nested_rope(rope: ConfigReader, name: str, head_dim: int, max_position: int) -> RopeConfig:
    rope.only(truncate=True)  # transformers reads it outside, where it is never set
    return _rope(rope, name, head_dim, max_position)


def _object(value: Any, name: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}={value!r}: must be an object")
    return dict(value or {})


def _chosen(config: ConfigReader, default: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """The name of the dict that applies, and a copy of the dict."""
    scaling, parameters = config.value("rope_scaling"), config.value("rope_parameters")
    parameters = default if parameters is None else parameters
    name, raw = ("rope_scaling", scaling) if scaling else ("rope_parameters", parameters)
    chosen = _object(raw, name)
    if scaling and config.value("rope_parameters") and scaling != parameters:
        logger.warning("rope_scaling=%s replaces rope_parameters=%s, as in transformers", scaling, parameters)
    return name, chosen


def _rope(rope: ConfigReader, name: str, head_dim: int, max_position: int) -> RopeConfig:
    old_kind = rope.value("type", "default")
    kind = rope.value("rope_type", old_kind)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"rope_type={kind!r}: must be one of {', '.join(_KINDS)}")
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim}: must be even, because RoPE rotates pairs")
    theta, part = rope.number("rope_theta", DEFAULT_THETA), rope.number("partial_rotary_factor", 1.0)
    rotary_dim = int(head_dim * part)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            f"partial_rotary_factor={part} of head_dim={head_dim} gives {rotary_dim} rotated dimensions: "
            f"must be an even number from 2 to {head_dim}"
        )
    settings = _KINDS[kind](rope, rotary_dim, theta, max_position)
    if kind in ("default", "linear", "dynamic"):
        rope.value("original_max_position_embeddings")  # named by some configs; these kinds do not use it
    if unread := rope.unread():
        raise ValueError(f"{name} has {', '.join(unread)}, which rope_type={kind!r} does not use")
    return RopeConfig(rotary_dim=rotary_dim, theta=theta, **settings)


def _default(rope: ConfigReader, rotary_dim: int, theta: float, max_position: int) -> dict[str, Any]:
    return {}


def _linear(rope: ConfigReader, rotary_dim: int, theta: float, max_position: int) -> dict[str, Any]:
    return {"linear_factor": rope.number("factor")}


def _dynamic(rope: ConfigReader, rotary_dim: int, theta: float, max_position: int) -> dict[str, Any]:
    """NTK scaling of sequences beyond the original length, which is also the model's limit here: it never starts.

    Beyond it, a cached key would depend on how long the sequence was when the key was computed.
    """
    rope.number("factor")
    return {}


def _llama3(rope: ConfigReader, rotary_dim: int, theta: float, max_position: int) -> dict[str, Any]:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if not low < high:
        raise ValueError(f"low_freq_factor={low}: must be less than high_freq_factor={high}")
    original = rope.size("original_max_position_embeddings", max_position)
    return {"llama3": Llama3RopeScaling(rope.number("factor"), low, high, original)}


def _yarn(rope: ConfigReader, rotary_dim: int, theta: float, max_position: int) -> dict[str, Any]:
    original = rope.size("original_max_position_embeddings", max_position)
    factor = rope.number_or_none("factor") or max_position / original
    if theta <= 1:
        raise ValueError(f"rope_theta={theta}: must be greater than 1 for rope_type='yarn'")
    fast, slow = rope.number_or_none("beta_fast") or 32.0, rope.number_or_none("beta_slow") or 1.0
    mscale, mscale_all = rope.number_or_none("mscale"), rope.number_or_none("mscale_all_dim")
    attention_factor = rope.number_or_none("attention_factor")
    if attention_factor is None:
        attention_factor = yarn_mscale(factor)
        if mscale and mscale_all:  # DeepSeek-V2 and V3
            attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all)

    def pair_that_turns(times: float) -> float:
        """The pair, as a fraction, that makes this many turns within the original context."""
        return rotary_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(fast), pair_that_turns(slow)
    if rope.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    yarn = YarnRopeScaling(factor, low, high, mscale_all or 0.0)
    return {"yarn": yarn, "attention_factor": attention_factor, "max_position": int(original * factor)}


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's growth of the attention's temperature with the context (section 3.3): 0.1 mscale ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(rope: ConfigReader, rotary_dim: int, theta: float, max_position: int) -> dict[str, Any]:
    original = rope.size("original_max_position_embeddings", max_position, least=2)
    factor = rope.number_or_none("factor") or max_position / original
    attention_factor = rope.number_or_none("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (_pair_factors(rope, key, rotary_dim // 2) for key in ("short_factor", "long_factor"))
    return {"longrope": LongRopeScaling(short, long, original), "attention_factor": attention_factor}


def _pair_factors(rope: ConfigReader, key: str, length: int) -> tuple[float, ...]:
    factors = rope.value(key)
    is_list = isinstance(factors, list) and len(factors) == length
    if not is_list or not all(type(x) in (int, float) and 0 < x < 3e38 for x in factors):
        raise ValueError(f"rope_type='longrope' {key}={factors!r}: must be a list of {length} numbers > 0")
    return tuple(map(float, factors))


_KINDS: dict[str, Callable[[ConfigReader, int, float, int], dict[str, Any]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
