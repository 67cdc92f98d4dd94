"""What ``bench quantisation`` compares: schemes by name, each with a method, and engines by their options.

int4              one scale per row               int4-asym       with zero points
int4-tensor       one scale per matrix            int4-narrow     codes -7 .. 7 instead of -8 .. 7
int4-g32          one scale per 32 columns        int4-g          one scale per --group-size columns
fp8-e4m3  fp8-e5m2  nf4                           w8a16  w4a16  w8a8: int8, int4-g32, and int8 with int8 activations
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from paged_infer.config import EngineConfig, EngineOptions
from paged_infer.model.quant.post_training import METHODS
from paged_infer.model.quant.scheme import Scheme

KERNELS = ("w8a16", "w4a16", "w8a8")  # values of ``LLM(quantization=...)`` that round a float checkpoint
GROUP_SIZE = 32
_NAMED = {
    "w8a16": Scheme(8),
    "w8a8": Scheme(8),
    "w4a16": Scheme(4, True, "group", 32),
    "fp8-e4m3": Scheme(8, codes="float8_e4m3fn"),
    "fp8-e5m2": Scheme(8, codes="float8_e5m2"),
    "nf4": None,
}
_INTEGERS = re.compile(r"int(\d+)(-tensor|-g\d*)?(-asym|-narrow)?")
_RTN, _CALIBRATED = ("rtn",), ("rtn", "awq", "gptq")
USUAL: dict[str, tuple[str, ...]] = {
    "int8-tensor-narrow": _RTN,
    "w8a16": _RTN,
    "w8a8": ("rtn", "smoothquant"),
    "fp8-e4m3": _RTN,
    "fp8-e5m2": _RTN,
    "int4-tensor-narrow": _RTN,
    "int4-narrow": _RTN,
    "int4-asym": _RTN,
    "int4-g64-narrow": _RTN,
    "int4-g32-narrow": _RTN,
    "w4a16": _CALIBRATED,
    "nf4": _RTN,
    "int4-g32-asym": _CALIBRATED,
    "int3-g32-asym": _CALIBRATED,
    "int2-g32-asym": _CALIBRATED,
}


@dataclass(frozen=True, slots=True)
class Case:
    """A scheme with a method. ``grid`` is None for NF4."""

    scheme: str
    method: str
    grid: Scheme | None

    @property
    def is_plain(self) -> bool:
        """Whether q, k and v (and gate and up) are quantised one by one, as the checkpoint has them."""
        return self.grid is None or self.grid.strategy == "tensor"

    @property
    def rounds_inputs(self) -> bool:
        return self.scheme == "w8a8"


def read_cases(schemes: Iterable[str], methods: Iterable[str], group_size: int | None) -> list[Case]:
    """Each scheme with each method.

    Args:
        schemes: names of schemes; empty: those of ``USUAL``.
        methods: names of methods; empty: those that ``USUAL`` has for the scheme, or "rtn".
        group_size: for schemes such as "int4-g"; None: ``GROUP_SIZE``.

    Raises:
        ValueError: an unknown scheme or method, or a scheme that a method does not support.
    """
    schemes, methods = tuple(schemes) or tuple(USUAL), tuple(methods)
    if unknown := [one for one in methods if one not in METHODS]:
        raise ValueError(f"method={', '.join(unknown)}: must be one of {', '.join(METHODS)}")
    if group_size is not None and not any(re.search("-g(-|$)", one) for one in schemes):
        raise ValueError(f"group_size={group_size}: needs a scheme with -g and no number, such as int4-g")
    cases = [
        Case(name, method, read_scheme(name, group_size or GROUP_SIZE))
        for name in schemes
        for method in methods or USUAL.get(name, _RTN)
    ]
    if odd := [case for case in cases if case.is_plain and case.method != "rtn"]:
        raise ValueError(f"scheme={odd[0].scheme}, method={odd[0].method}: nf4 and -tensor support only rtn")
    return cases


def read_scheme(name: str, group_size: int) -> Scheme | None:
    """The scheme of a name; None for NF4. Raises ValueError for an unknown name, or numbers in it out of range."""
    if name in _NAMED:
        return _NAMED[name]
    found = _INTEGERS.fullmatch(name)
    if found is None:
        raise ValueError(
            f"scheme={name!r}: must be one of {', '.join(_NAMED)}, or int2 to int8, with -tensor, -g or -g32 and then "
            "-asym or -narrow as wanted, such as int4-g32-asym"
        )
    bits, shared, rest = int(found[1]), found[2] or "", found[3]
    ways: dict[str, Any] = {"symmetric": rest != "-asym", "narrow_range": rest == "-narrow"}
    if shared == "-tensor":
        return Scheme(bits, strategy="tensor", **ways)
    if shared:
        return Scheme(bits, strategy="group", group_size=int(shared[2:] or group_size), **ways)
    return Scheme(bits, **ways)


def read_engines(cases: Iterable[Case], dtypes: Iterable[str], given: Iterable[str], is_gguf: bool) -> dict[str, Any]:
    """Names and options of the engines whose speed is measured: floats and the schemes with kernels, in each dtype.

    Args:
        given: further engines, each as a JSON object of ``LLM``'s options.
        is_gguf: the model is a GGUF file, so an engine with ``quantization="gguf"`` is measured, too.

    Raises:
        ValueError: not a JSON object of options that an engine takes.
    """
    chosen = [name for name in KERNELS if any(case.scheme == name for case in cases)]
    quantizations = [None, *chosen, *(["gguf"] if is_gguf else [])]
    found: dict[str, EngineOptions] = {}
    for dtype in dtypes:
        for one in quantizations:
            found[dtype if one is None else f"{one} {dtype}"] = {"dtype": dtype, "quantization": one}
    for text in given:
        try:
            options = json.loads(text)
            EngineConfig.from_options(**options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"--engine {text!r}: {error}") from None
        found[", ".join(str(value) for value in options.values()) or "default"] = options
    return found
