"""Compiled kernels on disk: a folder of the user's own, and files that are checked before they are loaded.

    $XDG_CACHE_HOME/paged_infer or ~/.cache/paged_infer     a real folder, ours, written by nobody else (0700)
        kernels-<key>-<digest>.so                           key: what it was built from; digest: of its bytes

A shared library is code that runs with the rights of the process. So a folder or a file of another user, or one that
others may write to, is refused, and a file whose bytes do not have the digest of its name (truncated, empty, changed)
is built again. The folder is opened once, and everything after the check goes through its descriptor: a folder that is
put in its place meanwhile is never read. A file is written under another name and renamed, so it is whole or absent,
and processes that build the same at the same time replace each other's file by an equal one.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KEPT_S = 30 * 24 * 3600  # since a process last loaded it; other machines and compilers may share the folder
_OURS = re.compile(r"kernels-(?P<key>[0-9a-f]+)(-(?P<digest>[0-9a-f]+))?\.so(?P<aside>\.[0-9a-f]+)?")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class CacheRefused(Exception):
    """The folder cannot be used; the message names it and the reason."""


@dataclass(frozen=True, slots=True)
class KernelCache:
    """The checked folder, held open."""

    folder: Path
    descriptor: int

    @classmethod
    @contextlib.contextmanager
    def opened(cls) -> Iterator[KernelCache]:
        """Make the folder where there is none, check it, and hold it open.

        Raises:
            CacheRefused: there is no place for it, or it is not ours alone.
        """
        folder = _folder()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            reason = "it is a symbolic link" if os.path.islink(folder) else error.strerror
            raise CacheRefused(f"{folder}: {reason}") from None
        try:
            if (reason := _not_ours(os.fstat(descriptor))) is not None:
                raise CacheRefused(f"{folder}: {reason}")
            yield cls(folder, descriptor)
        finally:
            os.close(descriptor)

    def load(self, key: str) -> ctypes.CDLL | None:
        """The library that was built from what ``key`` stands for, if it is there and whole."""
        for name in sorted(os.listdir(self.descriptor)):
            match = _OURS.fullmatch(name)
            if match and match["key"] == key and not match["aside"] and self._is_whole(name, match["digest"]):
                with contextlib.suppress(OSError):  # removed meanwhile, or nothing may be executed there
                    return self._load(name)
        return None

    def store(self, key: str, library: bytes) -> ctypes.CDLL:
        """Keep a library, remove what is no longer of use, and load it.

        Raises:
            OSError: it cannot be written, or not be loaded from there.
        """
        name = f"kernels-{key}-{_digest(library)}.so"
        aside = f"{name}.{secrets.token_hex(8)}"
        try:
            with open(aside, "xb", opener=self._open) as file:
                file.write(library)
            os.rename(aside, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        finally:
            self._remove(aside)
        self._clean(key)
        return self._load(name)

    def _load(self, name: str) -> ctypes.CDLL:
        """Through the descriptor where the system can: the path may lead elsewhere by now."""
        through = f"/proc/self/fd/{self.descriptor}"
        return ctypes.CDLL(os.path.join(through if os.path.isdir(through) else self.folder, name))

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600, dir_fd=self.descriptor)

    def _is_whole(self, name: str, digest: str | None) -> bool:
        """Whether the file is ours and its bytes are those that were written; if so, note that it is in use."""
        try:
            with open(name, "rb", opener=self._open) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode) or _not_ours(status) or _digest(file.read()) != digest:
                    return False
                with contextlib.suppress(OSError):  # a folder that can be read only
                    os.utime(file.fileno(), (time.time(), status.st_mtime))
        except OSError:
            return False
        return True

    def _clean(self, key: str) -> None:
        """Remove what is damaged of ``key``, and what no process has loaded for long."""
        for name in os.listdir(self.descriptor):
            match = _OURS.fullmatch(name)
            if match is None:
                continue
            is_damaged = (
                match["key"] == key and not match["aside"] and not self._is_whole(name, match["digest"])
            )
            if is_damaged or self._is_forgotten(name):
                self._remove(name)

    def _is_forgotten(self, name: str) -> bool:
        try:
            status = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except OSError:
            return False
        return time.time() - status.st_atime > KEPT_S

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self.descriptor)


def _folder() -> Path:
    if not hasattr(os, "O_NOFOLLOW"):
        raise CacheRefused("this system cannot say whose a folder is")
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification: a relative one is ignored
        return Path(base) / "paged_infer"
    try:
        return Path.home() / ".cache" / "paged_infer"
    except RuntimeError:
        raise CacheRefused("there is no home folder, and XDG_CACHE_HOME names no other") from None


def _not_ours(status: os.stat_result) -> str | None:
    """Why a folder or file is not ours alone; None if it is."""
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}, and this is user {os.geteuid()}"
    if status.st_mode & _OTHERS_WRITE:
        return f"others may write to it (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def _digest(library: bytes) -> str:
    return hashlib.sha256(library).hexdigest()[:32]
