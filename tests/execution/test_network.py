"""Which interface gloo takes, so that ranks on several machines reach each other."""

from __future__ import annotations

import os
import sys

import pytest

from paged_infer.execution.network import address_towards, interface_of, use_interface_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have other calls for it")
UNUSED = "192.0.2.1"  # of documentation (RFC 5737): no machine has it


def test_an_interface_is_found_by_its_address() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of(UNUSED) is None


def test_gloo_gets_that_interface_unless_the_user_has_named_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    use_interface_of("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    use_interface_of(UNUSED)
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    use_interface_of("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
