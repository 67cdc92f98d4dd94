"""QuantizationConfig: which matrices of a checkpoint are quantised, and how, by config.json's ``quantization_config``.

Each key is read or refused by name, so a checkpoint never runs as a different model. The supported formats are those of
compressed-tensors (``pack-quantized``, ``int-quantized``, ``float-quantized``), AutoAWQ (``gemm``), GPTQ, DeepSeek's
block-wise float8 (``fp8``) and gpt-oss' MXFP4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from paged_infer.model.config_reader import ConfigReader

Kind = Literal["packed", "plain", "awq", "gptq", "fp8", "mxfp4"]
Rule = Literal["name", "module", "part"]

_UP_TO_A_DOT = r"(?:{})(?:(?<=\.)|(?=\.|$))"  # transformers 5.23, ``should_convert_module``, read


@dataclass(frozen=True, slots=True)
class StoredAs:
    """How a checkpoint stores one matrix [N, K].

    Attributes:
        kind: which tensors there are, and how their bits are packed; see ``quant.formats``.
        bits: bits of a code.
        group_size: columns that share a scale; None: all columns of a row.
        has_zeros: asymmetric: there are zero points.
        has_order: there is ``g_idx``, the group of each column.
        is_float: the codes are float8 e4m3.
        per_tensor: the matrix has one scale.
        zero_offset: added to each stored zero point; 1 for GPTQ v1.
        block: for float8, the rows and columns that share a scale.
        activations: what x is rounded to, token by token, before the product; None: it is not (weight-only).
    """

    kind: Kind
    bits: int
    group_size: int | None = None
    has_zeros: bool = False
    has_order: bool = False
    is_float: bool = False
    per_tensor: bool = False
    zero_offset: int = 0
    block: tuple[int, int] | None = None
    activations: Literal["int8", "float8"] | None = None


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """How each linear layer is stored.

    Attributes:
        method: ``quant_method``.
        groups: targets, and how the layers that they match are stored; the first match applies.
        ignore: targets of the layers that stay floats.
        rule: when a target matches a layer's name. "name": it is the name, or "re:" and a regular expression for its
            beginning; "module": it is the end of the name, or a regular expression for its beginning up to a dot;
            "part": it is part of the name, or a regular expression for its beginning.
    """

    method: str
    groups: tuple[tuple[tuple[str, ...], StoredAs], ...]
    ignore: tuple[str, ...] = ()
    rule: Rule = "part"

    def of(self, module: str) -> StoredAs | None:
        """How a linear layer is stored, by its name, such as ``model.layers.0.mlp.up_proj``; None: as floats."""
        if any(self._matches(pattern, module) for pattern in self.ignore):
            return None
        for targets, stored in self.groups:
            if any(target == "Linear" or self._matches(target, module) for target in targets):
                return stored
        return None

    def _matches(self, pattern: str, module: str) -> bool:
        if self.rule == "name":
            return pattern == module or (pattern.startswith("re:") and re.match(pattern[3:], module) is not None)
        if self.rule == "module":
            return module.endswith(pattern) or re.match(_UP_TO_A_DOT.format(pattern), module) is not None
        return pattern in module or re.match(pattern, module) is not None


def read_quantization(raw: Any) -> QuantizationConfig | None:
    """``raw`` is the value of ``quantization_config`` in a config.json; None, if there is none, gives None.

    Raises:
        ValueError: a method, format, key or value that is not supported; the message names it.
    """
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise ValueError(f"quantization_config={raw!r}: must be an object")
    keys = ConfigReader(raw, "quantization_config")
    method = keys.value("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(f"quantization_config quant_method={method!r}: must be one of {', '.join(_METHODS)}")
    config = _METHODS[method](keys)
    keys.refuse_unread()
    return config


def _names(keys: ConfigReader, key: str, form: str = "{}") -> tuple[str, ...]:
    value = keys.value(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{keys.name}{key}={value!r}: must be a list of names")
    for name in value:
        try:
            re.compile(form.format(name.removeprefix("re:")))
        except re.error as error:
            raise ValueError(f"{keys.name}{key}: {name!r} is not a valid pattern ({error})") from None
    return tuple(value)


def _group_size(keys: ConfigReader) -> int | None:
    """The columns of a group; -1: a whole row, which gives None."""
    return None if keys.value("group_size") == -1 else keys.size("group_size")


def _compressed_tensors(keys: ConfigReader) -> QuantizationConfig:
    keys.only(kv_cache_scheme=None, sparsity_config={}, transform_config={})
    # "frozen": calibration is over. If such a folder's tensors are not compressed, their names and dtypes are refused.
    keys.choice("quantization_status", ("compressed", "frozen", None))
    for key in ("global_compression_ratio", "version"):  # without effect
        keys.value(key)
    top, groups = keys.value("format"), keys.value("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"quantization_config config_groups={groups!r}: must be an object that is not empty")
    found = dict[str, StoredAs]()
    for name, raw in groups.items():
        where = f"quantization_config.{name}"
        if not isinstance(raw, Mapping):
            raise ValueError(f"{where}={raw!r}: must be an object")
        group = ConfigReader(raw, where)
        form = group.value("format") or top
        targets = _names(group, "targets")
        if unknown := [one for one in targets if one != "Linear" and not one.startswith("re:") and "." not in one]:
            raise ValueError(f"{where} targets={unknown[0]!r}: must be Linear, a layer's name, or re: and a pattern")
        found |= dict.fromkeys(targets, _compressed(group, form, where))
        group.only(output_activations=None)
        group.refuse_unread()
    # Whole names come first, then patterns, then Linear, whatever group they are in (0.20.1, ``match_targets``, read).
    order = sorted(found, key=lambda target: (target == "Linear", target.startswith("re:"), target))
    groups_in_order = tuple(((target,), found[target]) for target in order)
    return QuantizationConfig("compressed-tensors", groups_in_order, _names(keys, "ignore"), "name")


_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def _compressed(group: ConfigReader, form: Any, where: str) -> StoredAs:
    """One entry of ``config_groups``."""
    if form not in _FORMATS:
        raise ValueError(f"{where} format={form!r}: must be one of {', '.join(_FORMATS)}")
    raw = group.value("weights")
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where} weights={raw!r}: must be an object")
    keys = ConfigReader(raw, f"{where}.weights")
    for key in ("observer", "observer_kwargs", "scale_dtype", "zp_dtype"):  # of calibration, or known from the tensors
        keys.value(key)
    is_float = keys.choice("type", ("int", "float"), "int") == "float"
    if is_float is (form in ("pack-quantized", "int-quantized")) and form != "naive-quantized":
        raise ValueError(f"{where} format={form!r} with weights of type {keys.value('type')!r} is not supported")
    bits = keys.size("num_bits", 8, most=8)
    if bits < 2 or (is_float and bits != 8):
        raise ValueError(f"{where}.weights num_bits={bits}: must be {8 if is_float else '2 to 8'}")
    symmetric = keys.flag("symmetric", True)
    keys.only(dynamic=False)
    if is_float and not symmetric:
        raise ValueError(f"{where}.weights symmetric=False is not supported for floats")
    allowed = ("tensor", "channel", "block") if is_float else ("tensor", "channel", "group")
    given = keys.value("group_size")
    inferred = "tensor" if given is None else "channel" if given == -1 else "group"
    strategy = inferred if keys.value("strategy") is None else keys.choice("strategy", allowed)
    size = None if given is None else _group_size(keys)
    if strategy != "group" and size is not None:
        raise ValueError(f"{where}.weights group_size={size} does not go with strategy={strategy!r}")
    if strategy == "group" and size is None:
        raise ValueError(f"{where}.weights strategy='group' lacks group_size")
    block = _block(keys, "block_structure") if strategy == "block" else None
    keys.only(block_structure=None) if block is None else None
    order = keys.choice("actorder", (None, "weight", "static", "group", "dynamic", False))
    keys.refuse_unread()
    return StoredAs(
        "packed" if form == "pack-quantized" else "plain",
        bits,
        size,
        has_zeros=not symmetric,
        has_order=order in ("group", "dynamic"),
        is_float=is_float,
        per_tensor=strategy == "tensor",
        block=block,
        activations=_compressed_activations(group, where),
    )


def _compressed_activations(group: ConfigReader, where: str) -> Literal["int8", "float8"] | None:
    raw = group.value("input_activations")
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where} input_activations={raw!r}: must be an object or null")
    keys = ConfigReader(raw, f"{where}.input_activations")
    for key in ("observer", "observer_kwargs", "scale_dtype", "zp_dtype"):
        keys.value(key)
    if keys.value("dynamic") is not True:
        raise ValueError(
            f"{where}.input_activations dynamic={keys.value('dynamic')!r}: static scales are not supported"
        )
    keys.only(num_bits=8, symmetric=True, group_size=None, block_structure=None, actorder=None)
    keys.choice("strategy", ("token",))  # without one, compressed-tensors takes one scale for all tokens
    kind = keys.choice("type", ("int", "float"), "int")
    keys.refuse_unread()
    return "int8" if kind == "int" else "float8"


def _block(keys: ConfigReader, key: str) -> tuple[int, int]:
    value = keys.value(key)
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise ValueError(f"{keys.name}{key}={value!r}: must be two integers >= 1")
    return value[0], value[1]


def _awq(keys: ConfigReader) -> QuantizationConfig:
    for key in ("version", "format", "checkpoint_format"):  # as AutoAWQ, transformers and GPTQModel call it
        if (form := keys.value(key)) is not None and str(form).lower() != "gemm":
            raise ValueError(f"quantization_config {key}={form!r} is not supported; only 'gemm' is")
    keys.only(bits=4, zero_point=True, desc_act=False, lm_head=False, dynamic={}, pack_dtype="int32")
    if keys.value("backend") == "llm-awq":  # it orders the codes of a word differently
        raise ValueError("quantization_config backend='llm-awq' is not supported")
    for key in (*_WITHOUT_EFFECT, "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "sym"):
        keys.value(key)
    stored = StoredAs("awq", 4, _group_size(keys), has_zeros=True)
    return QuantizationConfig("awq", ((("Linear",), stored),), _names(keys, "modules_to_not_convert"))


# How the checkpoint was calibrated, which kernels are to run it, and what wrote it.
_WITHOUT_EFFECT = (
    "act_group_aware backend batch_size block_name_to_quantize cache_block_outputs damp_percent damp_auto_increment "
    "dataset disable_exllama exllama_config group_aware max_input_length meta model_file_base_name model_name_or_path "
    "model_seqlen module_name_preceding_first_block mse pad_token_id quantizer static_groups tokenizer "
    "true_sequential use_cuda_fp16 use_exllama v2_memory_device offload_to_disk"
).split()


def _gptq(keys: ConfigReader) -> QuantizationConfig:
    for key in _WITHOUT_EFFECT:
        keys.value(key)
    keys.only(lm_head=False, dynamic={}, is_marlin_format=False, pack_dtype="int32", quant_method="gptq")
    bits = keys.choice("bits", (2, 4, 8))
    name = "checkpoint_format" if keys.value("checkpoint_format") is not None else "format"
    version = keys.choice(name, ("gptq", "gptq_v2"), "gptq")
    for key in ("checkpoint_format", "format"):
        if keys.value(key) not in (None, version):
            raise ValueError(f"quantization_config {key}={keys.value(key)!r} contradicts {version!r}")
    keys.flag("desc_act", False), keys.flag("sym", True)  # g_idx and zero points are stored in either case
    inside = keys.value("modules_in_block_to_quantize")
    targets: tuple[str, ...] = ("Linear",)
    if inside is not None:
        parts = inside if isinstance(inside, list) else [inside]
        names = [one for part in parts for one in (part if isinstance(part, list) else [part])]
        if not isinstance(inside, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{keys.name}modules_in_block_to_quantize={inside!r}: must be lists of names")
        targets = tuple(rf".*\.{re.escape(name)}$" for name in names)
    stored = StoredAs(
        "gptq", bits, _group_size(keys), has_zeros=True, has_order=True, zero_offset=1 if version == "gptq" else 0
    )
    return QuantizationConfig("gptq", ((targets, stored),))


def _fp8(keys: ConfigReader) -> QuantizationConfig:
    keys.only(fmt="e4m3", scale_fmt="float", expert_dtype="fp8", dequantize=False, modules_to_convert=[])
    if (scheme := keys.value("activation_scheme", "dynamic")) != "dynamic":
        raise ValueError(f"quantization_config activation_scheme={scheme!r}: static scales are not supported")
    stored = StoredAs("fp8", 8, is_float=True, block=_block(keys, "weight_block_size"))
    ignore = [one for key in ("modules_to_not_convert", "ignored_layers") for one in _names(keys, key, _UP_TO_A_DOT)]
    return QuantizationConfig("fp8", ((("Linear",), stored),), tuple(ignore), "module")


def _mxfp4(keys: ConfigReader) -> QuantizationConfig:
    keys.only(dequantize=False)
    ignore = _names(keys, "modules_to_not_convert", _UP_TO_A_DOT)
    return QuantizationConfig("mxfp4", ((("Linear",), StoredAs("mxfp4", 4, 32)),), ignore, "module")


_METHODS = {"compressed-tensors": _compressed_tensors, "awq": _awq, "gptq": _gptq, "fp8": _fp8, "mxfp4": _mxfp4}
