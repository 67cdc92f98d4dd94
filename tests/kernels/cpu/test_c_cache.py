"""The cache of compiled kernels: damaged files are built again, and files that are not private are never loaded."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from c_building import cache_folder, compiler_script, copying, forget, temp

from paged_infer.kernels.cpu import cache as c_cache
from paged_infer.kernels.cpu.build import library, unavailable_reason
from paged_infer.kernels.cpu.cache import CacheUnavailable, KernelCache

__all__ = ["cache_folder", "copying", "temp"]  # fixtures


@pytest.fixture(autouse=True)
def folder(cache_folder: Path, tmp_path: Path, copying: str, monkeypatch) -> Path:
    compiler_script(tmp_path, copying, monkeypatch)
    return cache_folder


@pytest.fixture
def built(folder: Path) -> Path:
    """The library, as another process has left it: this one has not mapped the file."""
    assert unavailable_reason() is None
    forget()
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole)
    path.chmod(0o600)
    return path


def warning(caplog) -> str:
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    return record.getMessage()


def test_folder_and_file_are_the_users_alone(folder: Path) -> None:
    assert unavailable_reason() is None
    (built,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(built.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:-1],
        lambda whole: whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:],
        lambda whole: whole + b"\0",
        lambda whole: b"not a library",
    ],
)
def test_a_damaged_file_is_built_again(built: Path, folder: Path, damage, caplog) -> None:
    whole = built.read_bytes()
    built.write_bytes(damage(whole))
    assert unavailable_reason() is None and not caplog.records
    assert [*folder.iterdir()] == [built] and built.read_bytes() == whole


def test_a_truncated_file_is_built_again_and_ends_no_process(built: Path, folder: Path) -> None:
    whole = built.read_bytes()
    built.write_bytes(whole[: len(whole) // 2])
    code = "from paged_infer.kernels.cpu.build import library; print(library().panel_width())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip().isdigit(), done
    assert [*folder.iterdir()] == [built] and built.read_bytes() == whole


def test_a_damaged_file_of_another_name_is_removed(built: Path, folder: Path) -> None:
    """With a compiler whose result differs each time."""
    damaged = built.rename(built.with_name(built.name[:-10] + "0000000.so"))
    assert unavailable_reason() is None
    assert not damaged.exists() and [*folder.iterdir()] == [built]


@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_a_link_to_a_file_of_another_name_is_not_loaded(built: Path, folder: Path, tmp_path, make) -> None:
    planted = tmp_path / "planted.so"
    planted.write_bytes(b"not what was built")
    built.unlink()
    make(planted, built)
    assert unavailable_reason() is None
    assert not built.is_symlink() and built.stat().st_nlink == 1 and built.stat().st_size > 10_000
    assert planted.read_bytes() == b"not what was built"


def test_a_link_to_a_whole_library_is_not_loaded_either(built: Path, tmp_path: Path) -> None:
    elsewhere = built.rename(tmp_path / "elsewhere.so")
    built.symlink_to(elsewhere)
    assert unavailable_reason() is None and not built.is_symlink()


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_to_is_built_again(built: Path, mode: int) -> None:
    inode = built.stat().st_ino
    built.chmod(mode)
    assert unavailable_reason() is None
    assert stat.S_IMODE(built.stat().st_mode) == 0o600 and built.stat().st_ino != inode


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_may_write_to_is_not_used(
    built: Path, folder: Path, temp: Path, mode: int, caplog
) -> None:
    inode = built.stat().st_ino
    folder.chmod(mode)
    assert unavailable_reason() is None  # compiled for this process
    assert built.stat().st_ino == inode and [*folder.iterdir()] == [built] and not [*temp.iterdir()]
    line = warning(caplog)
    assert str(folder) in line and f"mode {mode:o}" in line and "again in each process" in line


def test_a_folder_of_another_user_is_not_used(built: Path, folder: Path, monkeypatch, caplog) -> None:
    owner = folder.stat().st_uid
    monkeypatch.setattr(c_cache.os, "geteuid", lambda: owner + 1)
    with (
        pytest.raises(CacheUnavailable, match=f"belongs to user {owner}, and this is user {owner + 1}"),
        KernelCache.opened(),
    ):
        pass
    assert unavailable_reason() is None
    assert f"belongs to user {owner}" in warning(caplog)


def test_a_file_of_another_user_in_a_folder_of_ours_is_built_again(built: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to give a file away")
    inode = built.stat().st_ino
    os.chown(built, 12345, 12345)
    assert unavailable_reason() is None
    assert built.stat().st_uid == 0 and built.stat().st_ino != inode


def test_a_folder_that_is_a_link_is_not_used(folder: Path, tmp_path: Path, caplog) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    assert unavailable_reason() is None
    assert not [*(tmp_path / "elsewhere").iterdir()] and "symbolic link" in warning(caplog)


def test_a_folder_put_in_the_place_of_the_checked_one_is_not_read(built: Path, folder: Path) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("a library is loaded by its path here")
    key = built.name.split("-")[1]
    with KernelCache.opened() as cache:
        folder.rename(folder.with_name("moved"))
        folder.mkdir()
        (folder / built.name).write_bytes(b"planted")
        assert cache.load(key) is not None
        cache.store("0" * 16, (folder.with_name("moved") / built.name).read_bytes())
    assert [path.name for path in folder.iterdir()] == [built.name]


@pytest.mark.parametrize("home", ["no folder", "no home"])
def test_without_a_cache_folder_nothing_is_left_behind(
    home: str, temp: Path, tmp_path: Path, monkeypatch, caplog
) -> None:
    if home == "no folder":
        (tmp_path / "file").write_text("not a folder")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # as in a container with any user id
    assert unavailable_reason() is None and library().panel_width() > 0
    assert not [*temp.iterdir()]
    assert "again in each process" in warning(caplog)


def test_a_cache_that_cannot_be_written_or_run_from_costs_only_the_memory_of_it(
    folder: Path, temp: Path, monkeypatch, caplog
) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(c_cache.os, "rename", full)
    assert unavailable_reason() is None
    assert "No space left on device" in warning(caplog)
    assert not [*folder.iterdir(), *temp.iterdir()]


def test_a_relative_cache_home_is_ignored(tmp_path: Path, monkeypatch) -> None:
    """What lies in the current folder is not the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert unavailable_reason() is None
    assert not (tmp_path / "cache").exists() and [*(tmp_path / "home/.cache/paged_infer").iterdir()]


def test_what_nobody_has_loaded_for_long_is_removed_when_something_is_built(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    names = [f"kernels-{'a' * 16}.so", f"kernels-{'b' * 16}-{'c' * 32}.so", f"kernels-{'d' * 16}-{'e' * 32}.so.0f"]
    for name in (*names, "notes.txt"):
        (folder / name).write_text("x")
        os.utime(folder / name, (0, 0))
    recent = folder / f"kernels-{'f' * 16}-{'0' * 32}.so"
    recent.write_text("of another machine")
    assert unavailable_reason() is None
    left = {path.name for path in folder.iterdir()}
    assert not left & {*names} and {"notes.txt", recent.name} < left and len(left) == 3


def test_what_is_loaded_is_kept(built: Path, folder: Path) -> None:
    os.utime(built, (0, 0))
    assert unavailable_reason() is None  # loaded, by a process that builds nothing
    with KernelCache.opened() as cache:
        cache.store("0" * 16, built.read_bytes())
    assert built.exists() and len([*folder.iterdir()]) == 2
