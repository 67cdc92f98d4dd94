"""The RoPE settings of a config.json: ``rope_scaling``, ``rope_parameters`` and ``rope_theta``."""

from __future__ import annotations

import logging
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


def read_rope(config: ConfigReader, max_position_embeddings: int) -> dict[str, Any]:
    """The RoPE settings of ``ModelConfig``, by transformers' rules.

    ``rope_scaling`` (before transformers 5) replaces ``rope_parameters`` (transformers 5) as a whole, including its
    ``rope_theta``. A top-level ``rope_theta`` is used only if the chosen dict has none.

    Raises:
        ValueError: a RoPE type, key or value that this decoder does not support.
    """
    name, rope = _chosen(config)
    theta = rope.value("rope_theta", config.value("rope_theta", DEFAULT_THETA))
    settings: dict[str, Any] = {"rope_theta": ConfigReader({"rope_theta": theta}).number("rope_theta")}
    old_kind = rope.value("type", "default")
    kind = rope.value("rope_type", old_kind)
    config.only(partial_rotary_factor=1.0)
    rope.only(partial_rotary_factor=1.0)
    if kind == "linear":
        settings["rope_linear_factor"] = rope.number("factor")
    elif kind == "llama3":
        settings["rope_llama3"] = _llama3(config, rope, max_position_embeddings)
    elif kind != "default":
        raise ValueError(f"rope_type={kind!r}: must be one of default, linear, llama3")
    if unread := rope.unread():
        raise ValueError(f"{name} has {', '.join(unread)}, which rope_type={kind!r} does not use")
    return settings


def _chosen(config: ConfigReader) -> tuple[str, ConfigReader]:
    """The name of the dict that applies, and the dict."""
    scaling, parameters = config.value("rope_scaling"), config.value("rope_parameters")
    name, raw = ("rope_scaling", scaling) if scaling else ("rope_parameters", parameters or {})
    if not isinstance(raw, dict):
        raise ValueError(f"{name}={raw!r}: must be an object")
    nested = sorted(key for key, value in raw.items() if isinstance(value, dict))
    if nested:
        raise ValueError(f"{name} is nested ({', '.join(nested)}); only one RoPE for all layers is supported")
    if scaling and parameters and scaling != parameters:
        logger.warning("rope_scaling=%s replaces rope_parameters=%s, as in transformers", scaling, parameters)
    return name, ConfigReader(raw, name)


def _llama3(config: ConfigReader, rope: ConfigReader, max_position_embeddings: int) -> Llama3RopeScaling:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if not low < high:
        raise ValueError(f"low_freq_factor={low}: must be less than high_freq_factor={high}")
    inside = rope.size("original_max_position_embeddings", max_position_embeddings)
    return Llama3RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=config.size("original_max_position_embeddings", inside),
    )
