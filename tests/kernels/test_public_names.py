"""``paged_infer.kernels`` exports the kernels and their references as functions, imported at their first use."""

from __future__ import annotations

import subprocess
import sys
from inspect import isfunction
from pathlib import Path

import pytest

from paged_infer import kernels

KERNELS = [
    "flash_attention",
    "paged_attention",
    "add_rms_norm",
    "copy_blocks",
    "qk_norm_rope",
    "sample",
    "silu_mul",
    "store_kv",
]


@pytest.mark.parametrize("name", [*KERNELS, *(f"{name}_reference" for name in KERNELS), "register_attention_backend"])
def test_every_public_name_is_a_function_and_listed(name: str) -> None:
    function = getattr(kernels, name)
    assert isfunction(function) and function.__name__ == name
    assert name in dir(kernels) and name in kernels.__all__


def test_no_submodule_can_replace_a_public_name() -> None:
    submodules = {path.stem for path in Path(kernels.__file__).parent.iterdir()}
    assert submodules.isdisjoint(kernels.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="flash_attentions"):
        kernels.flash_attentions  # noqa: B018


NAME, MODULE = "from paged_infer.kernels import flash_attention", "import paged_infer.kernels.attention.flash_attention"


@pytest.mark.parametrize(
    "code",
    [
        "import sys, paged_infer.kernels as k; dir(k); assert 'torch' not in sys.modules",
        f"{NAME}; {MODULE}; assert callable(paged_infer.kernels.flash_attention) and callable(flash_attention)",
        f"{MODULE}; {NAME}; assert callable(paged_infer.kernels.flash_attention) and callable(flash_attention)",
    ],
    ids=["imports no torch", "name first", "module first"],
)
def test_in_a_new_process(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)
