"""The network interface over which ranks on several machines reach each other.

gloo takes the interface of the machine's own name. On many machines (Debian, Ubuntu) ``/etc/hosts`` gives that name an
address of the loopback interface, 127.0.1.1, which no other machine reaches.
"""

from __future__ import annotations

import os
import socket
import struct
import sys

_SIOCGIFADDR = 0x8915  # Linux: the address of an interface; see netdevice(7)


def use_interface_of(address: str) -> None:
    """Let gloo use the interface of this machine that has ``address``, unless GLOO_SOCKET_IFNAME names one."""
    if (name := interface_of(address)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def address_towards(host: str) -> str:
    """The address of this machine from which ``host`` is reached. Sends nothing. Raises OSError: there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return probe.getsockname()[0]


def interface_of(address: str) -> str | None:
    """The name of the interface that has an IPv4 address. None if none has it, or where the system is not Linux.

    >>> interface_of("127.0.0.1")
    'lo'
    """
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None
