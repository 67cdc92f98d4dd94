"""The cache of compiled kernels: a private folder of the user, with files that are verified before they are loaded.

    $XDG_CACHE_HOME/paged_infer or ~/.cache/paged_infer     a real folder that only the user can write to (0700)
        kernels-<key>-<digest>.so                           key: hash of the build inputs; digest: hash of the file

A shared library is code that runs with the rights of the process. So a folder or file that belongs to another user, or
that other users can write to, is refused, and a file that does not match the digest in its name (truncated, empty,
changed) is built again. The folder is opened once and accessed through its descriptor after the check, so a folder that
replaces it later is never read. (Without /proc, only the final ``dlopen`` uses the path.) A file is written under a
temporary name and renamed, so it is complete or absent, and processes that build the same kernels at the same time
replace each other's file safely.
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

KEPT_S = 30 * 24 * 3600  # since a file was last loaded; other machines and compilers may share the folder
_OURS = re.compile(r"kernels-(?P<key>[0-9a-f]+)(-(?P<digest>[0-9a-f]+))?\.so(?P<temporary>\.[0-9a-f]+)?")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class CacheUnavailable(Exception):
    """The folder cannot be used; the message names it and the reason."""


@dataclass(frozen=True, slots=True)
class KernelCache:
    """The checked folder, held open."""

    folder: Path
    descriptor: int

    @classmethod
    @contextlib.contextmanager
    def opened(cls) -> Iterator[KernelCache]:
        """Create the folder if it is missing, check it, and hold it open.

        Raises:
            CacheUnavailable: it cannot be created or opened, or it is not private to this user.
        """
        folder = _folder()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            reason = "it is a symbolic link" if os.path.islink(folder) else error.strerror
            raise CacheUnavailable(f"{folder}: {reason}") from None
        try:
            if (reason := _not_ours(os.fstat(descriptor))) is not None:
                raise CacheUnavailable(f"{folder}: {reason}")
            yield cls(folder, descriptor)
        finally:
            os.close(descriptor)

    def load(self, key: str) -> ctypes.CDLL | None:
        """The library that was built for ``key``; None if it is missing or damaged."""
        for name in sorted(os.listdir(self.descriptor)):
            match = _OURS.fullmatch(name)
            if match and match["key"] == key and not match["temporary"] and self._is_whole(name, match["digest"]):
                with contextlib.suppress(OSError):  # removed since, or mounted noexec
                    return self._load(name)
        return None

    def store(self, key: str, library: bytes) -> ctypes.CDLL:
        """Store a library, remove damaged and stale files, and load it.

        Raises:
            OSError: it cannot be written, or cannot be loaded from there.
        """
        name = f"kernels-{key}-{_digest(library)}.so"
        temporary = f"{name}.{secrets.token_hex(8)}"
        try:
            with open(temporary, "xb", opener=self._open) as file:
                file.write(library)
            os.rename(temporary, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        finally:
            self._remove(temporary)
        self._clean(key)
        return self._load(name)

    def _load(self, name: str) -> ctypes.CDLL:
        """Load through the descriptor where there is /proc: the path may name another folder by now."""
        through = f"/proc/self/fd/{self.descriptor}"
        return ctypes.CDLL(os.path.join(through if os.path.isdir(through) else self.folder, name))

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600, dir_fd=self.descriptor)

    def _is_whole(self, name: str, digest: str | None) -> bool:
        """Whether the file is private and matches its digest; if so, its access time is set to now."""
        try:
            with open(name, "rb", opener=self._open) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode) or _not_ours(status) or _digest(file.read()) != digest:
                    return False
                with contextlib.suppress(OSError):  # a read-only folder
                    os.utime(file.fileno(), (time.time(), status.st_mtime))
        except OSError:
            return False
        return True

    def _clean(self, key: str) -> None:
        """Remove damaged files of ``key``, and all files that no process has loaded within ``KEPT_S``."""
        for name in os.listdir(self.descriptor):
            match = _OURS.fullmatch(name)
            if match is None:
                continue
            is_damaged = match["key"] == key and not match["temporary"] and not self._is_whole(name, match["digest"])
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
        raise CacheUnavailable("this platform cannot open a folder safely (no O_NOFOLLOW)")
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification: a relative one is ignored
        return Path(base) / "paged_infer"
    try:
        return Path.home() / ".cache" / "paged_infer"
    except RuntimeError:
        raise CacheUnavailable("there is no home folder, and XDG_CACHE_HOME is not an absolute path") from None


def _not_ours(status: os.stat_result) -> str | None:
    """Why a folder or file is not private to this user; None if it is."""
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}, and this is user {os.geteuid()}"
    if status.st_mode & _OTHERS_WRITE:
        return f"other users can write to it (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def _digest(library: bytes) -> str:
    return hashlib.sha256(library).hexdigest()[:32]
