"""A cache of compiled kernels for the test alone, and scripted compilers.

Compiling takes seconds, so most tests have a compiler that copies what the real one has built once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from paged_infer.kernels.cpu import build as c_runtime
from paged_infer.kernels.cpu import ops as c_ops

COPY = """[ "$1" = --version ] && echo copies 1.0 && exit 0
while [ "$1" != -o ]; do shift; done
cp {built} "$2"
"""


def forget() -> None:
    """As in a new process."""
    for function in (c_runtime.library, c_runtime.unavailable_reason, c_runtime._warn_once, c_ops._is_built):
        function.cache_clear()


def compiler_script(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = folder / "my-cc"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))


@pytest.fixture(scope="session")
def copying(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of a compiler that builds at once."""
    if shutil.which("cc") is None:
        pytest.skip("no cc")
    home, before = tmp_path_factory.mktemp("built"), os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(home)
    try:
        forget()
        assert c_runtime.unavailable_reason() is None
    finally:
        forget()
        os.environ.pop("XDG_CACHE_HOME")
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before
    (built,) = (home / "paged_infer").iterdir()
    return COPY.format(built=built)


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the cache, not there yet; nothing is remembered from before, or for later."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path / "paged_infer"
    forget()


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary directory."""
    folder = tmp_path / "temp"
    folder.mkdir()
    monkeypatch.setattr(c_runtime.tempfile, "tempdir", str(folder))
    return folder
