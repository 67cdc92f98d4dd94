"""Check the ``Host`` header against the server's allowed names.

A web page of another site, whose name is made to resolve to this machine (DNS rebinding), could read a local server as
if it were its own origin. Its requests carry that site's name in ``Host``, so a list of allowed hosts stops them.
"""

from __future__ import annotations

from collections.abc import Iterable

LOOPBACK = ("localhost", "127.0.0.1", "::1")
ALL = "*"


def host_name(host: str) -> str:
    """The name without the port, in lower case.

    >>> host_name("[::1]:8000"), host_name("Localhost:8000"), host_name("::1")
    ('::1', 'localhost', '::1')
    """
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return (host.partition(":")[0] if host.count(":") == 1 else host).removesuffix(".")


def is_allowed(host: str, allowed: Iterable[str]) -> bool:
    """Whether ``host`` (a ``Host`` header) matches ``allowed``: names, ``*.domain`` for its subdomains, or ``*``."""
    name = host_name(host)
    return any(
        name == one or one == ALL or (one.startswith("*.") and name.endswith(one[1:]))
        for one in map(host_name, allowed)
    )


def names_of(host: str, address: str) -> tuple[str, ...]:
    """The default names of a server that listens on ``host``, whose socket is bound to ``address``."""
    is_every = address in ("0.0.0.0", "::")
    return (ALL,) if is_every else tuple(dict.fromkeys((*LOOPBACK, host_name(host), address)))
