"""Building the C kernels: once, anew for another compiler, and with a clear word where it cannot be done."""

from __future__ import annotations

from pathlib import Path

import pytest

from paged_infer.kernels import c_runtime
from paged_infer.kernels.c_runtime import CannotBuild, library, why_not


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch):
    """A cache folder of the test's own, and nothing remembered from before or for later."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remembered = (library, why_not)
    for function in remembered:
        function.cache_clear()
    yield tmp_path / "paged_infer"
    for function in remembered:
        function.cache_clear()


def compiler_script(folder: Path, text: str, monkeypatch) -> None:
    script = folder / "my-cc"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))


def test_it_is_built_once_and_then_loaded(own_cache: Path) -> None:
    if why_not() is not None:
        pytest.skip(why_not())
    (built,) = own_cache.iterdir()
    when = built.stat().st_mtime_ns
    library.cache_clear()
    library()
    assert [*own_cache.iterdir()] == [built] and built.stat().st_mtime_ns == when


def test_without_a_compiler_it_says_so(monkeypatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(c_runtime.shutil, "which", lambda name: None)
    with pytest.raises(CannotBuild, match="no C compiler"):
        library()
    assert "no C compiler" in (why_not() or "")


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    own_cache: Path, tmp_path: Path, monkeypatch
) -> None:
    compiler_script(tmp_path, 'echo "out of vectors" >&2; exit 1', monkeypatch)
    assert "out of vectors" in (why_not() or "")
    assert not [*own_cache.iterdir()]


def test_a_compiler_that_is_not_there_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "no-such-cc"))
    assert "no-such-cc" in (why_not() or "")


def test_a_compiler_without_openmp_is_asked_again_without(tmp_path: Path, monkeypatch) -> None:
    compiler_script(tmp_path, 'case "$*" in *fopenmp*) exit 1;; esac; exec cc "$@"', monkeypatch)
    if c_runtime.shutil.which("cc") is None:
        pytest.skip("no cc")
    assert why_not() is None


def test_another_compiler_does_not_get_the_others_result(
    own_cache: Path, tmp_path: Path, monkeypatch
) -> None:
    if why_not() is not None:
        pytest.skip(why_not())
    compiler_script(tmp_path, '[ "$1" = --version ] && echo other 1.0 && exit 0; exec cc "$@"', monkeypatch)
    for function in (library, why_not):
        function.cache_clear()
    assert why_not() is None and len([*own_cache.iterdir()]) == 2


def test_a_cache_folder_that_cannot_be_written_costs_only_the_memory_of_it(
    tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    if c_runtime.shutil.which("cc") is None:
        pytest.skip("no cc")
    assert why_not() is None
