"""What `rayseek serve` looks at before it starts anything: its ports, its model's files."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from rayseek.cluster.config import Config
from rayseek.serve_app import local
from rayseek.serve_app.start import started


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
    assert local.free_port() != wanted, "somebody is to listen there"
    assert local.free_port(wanted) == wanted
    with socket.create_server((host, wanted)):
        assert local.free_port(wanted) != wanted
        assert local.free_port() != wanted


@pytest.mark.parametrize("text", [None, '{"model":'])
def test_a_model_without_a_tokenizer_is_refused_at_once(
    tiny_path: Path, tmp_path: Path, text: str | None
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_path, model)
    (model / "tokenizer.json").unlink()
    if text is not None:
        (model / "tokenizer.json").write_text(text)
    wanted = {"model": {"path": model}, "ingress": {"port": local.free_port()}}
    with (
        pytest.raises(ValueError, match="cannot load a tokenizer"),
        started(Config.model_validate(wanted)),
    ):
        pass
