"""Where keys come from."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest

from rayseek.serve_app.errors import ApiError
from rayseek.serve_app.keys import KeyRing, load_keys


def test_a_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    path = tmp_path / "state" / "api_key"
    (key,) = load_keys(generated=path)
    assert key.startswith("sk-") and len(key) > 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_keys(generated=path) == (key,)
    assert [file.name for file in path.parent.iterdir()] == ["api_key"]


def test_processes_that_start_together_agree(tmp_path: Path) -> None:
    found: list[tuple[str, ...]] = []
    threads = [
        threading.Thread(target=lambda: found.append(load_keys(generated=tmp_path / "key")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1


def test_configured_keys_and_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nsk-b\nsk-a\n")
    assert load_keys(["sk-a"], file, generated=tmp_path / "no") == ("sk-a", "sk-b")
    assert not (tmp_path / "no").exists()
    file.write_text("bad key\n")
    with pytest.raises(ValueError, match="keys"):
        load_keys(file=file, generated=tmp_path / "no")


def test_key_ring() -> None:
    ring = KeyRing(["sk-one", "sk-two"])
    ring.check("Bearer sk-two")
    ring.check("bearer  sk-one ")
    for header in (
        None,
        "",
        "sk-one",
        "Bearer",
        "Bearer sk-on",
        "Bearer sk-onee",
        "Bearer ü\udcff",
    ):
        with pytest.raises(ApiError):
            ring.check(header)
