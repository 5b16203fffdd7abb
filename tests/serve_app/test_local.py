"""The ports that `rayseek serve` chooses for itself."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from rayseek.serve_app import local


def test_a_port_is_not_one_of_those_that_the_system_gives_to_whoever_asks_for_any() -> None:
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if not given.exists():
        pytest.skip("this system does not say which it gives")
    first, _ = map(int, given.read_text().split())
    assert all(local.free_port() < first for _ in range(50))


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_with_a_listener_on_any_interface_is_not_chosen(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local.random, "sample", lambda ports, _: list(ports))
    wanted = local.free_port()
    assert local.free_port(wanted) == wanted
    with socket.create_server((host, wanted)):
        assert local.free_port(wanted) != wanted
        assert local.free_port() != wanted
