"""Which names a server answers to.

A page of another site whose name is made to resolve to this machine (DNS rebinding) reads a local server as if it were
its own. Its requests carry that site's name in ``Host``, so a server that knows its own names can refuse them.
"""

from __future__ import annotations

from collections.abc import Iterable

LOOPBACK = ("localhost", "127.0.0.1", "::1")
ALL = "*"


def host_name(host: str) -> str:
    """The name alone, in lower case.

    >>> host_name("[::1]:8000"), host_name("Localhost:8000"), host_name("::1")
    ('::1', 'localhost', '::1')
    """
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return (host.partition(":")[0] if host.count(":") == 1 else host).removesuffix(".")


def is_allowed(host: str, allowed: Iterable[str]) -> bool:
    """Whether ``host`` (a ``Host`` header) is one of ``allowed``: names, ``*.domain`` for all below it, or ``*``."""
    name = host_name(host)
    return any(
        name == one or one == ALL or (one.startswith("*.") and name.endswith(one[1:]))
        for one in map(host_name, allowed)
    )


def names_of(host: str, address: str) -> tuple[str, ...]:
    """What a server is called that listens on ``host``, which the socket calls ``address``."""
    is_every = address in ("0.0.0.0", "::")
    return (ALL,) if is_every else tuple(dict.fromkeys((*LOOPBACK, host_name(host), address)))
