"""Where keys come from, who they let in, and what happens when their file changes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from rayseek.serve_app.cli import main
from rayseek.serve_app.errors import ApiError
from rayseek.serve_app.keys import (
    FIRST,
    KeyRing,
    add_key,
    digest,
    first_key,
    read_keys,
    revoke_key,
    write_keys,
)
from rayseek.serve_app.start import key_file


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def edit(file: Path, text: str) -> None:
    """As an editor does, with an mtime that differs however fast the test is."""
    before = file.stat().st_mtime_ns
    file.write_text(text)
    os.utime(file, ns=(before + 10**9, before + 10**9))


def refused(ring: KeyRing, key: str) -> bool:
    try:
        ring.check(f"Bearer {key}")
    except ApiError as error:
        assert error.status == 401 and error.headers["WWW-Authenticate"] == "Bearer"
        return True
    return False


def test_the_first_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    file, plain = tmp_path / "state" / "keys.yaml", tmp_path / "state" / "api_key"
    key = first_key(file, plain)
    assert key is not None and key.startswith("sk-") and len(key) > 32
    assert [stat.S_IMODE(f.stat().st_mode) for f in (file, plain)] == [0o600, 0o600]
    assert key not in file.read_text() and not list(file.parent.glob(".*[0-9a-f]" * 1 + "?" * 20))
    assert first_key(file, plain) == key
    assert KeyRing((), file).check(f"Bearer {key}").name == FIRST


def test_a_first_key_in_the_clear_from_before_stays_valid(tmp_path: Path) -> None:
    (tmp_path / "api_key").write_text("sk-old\n")
    assert first_key(tmp_path / "keys.yaml", tmp_path / "api_key") == "sk-old"
    assert not refused(KeyRing((), tmp_path / "keys.yaml"), "sk-old")


def test_a_revoked_first_key_does_not_come_back(tmp_path: Path) -> None:
    file, plain = tmp_path / "keys.yaml", tmp_path / "api_key"
    first = first_key(file, plain)
    assert first is not None
    revoke_key(file, FIRST, plain)
    assert not plain.exists()
    again = first_key(file, plain)
    assert again not in (None, first)
    other = add_key(file, "other")
    revoke_key(file, FIRST, plain)
    assert first_key(file, plain) is None
    assert not refused(KeyRing((), file), other)


def test_processes_that_start_together_agree(tmp_path: Path) -> None:
    found: list[str | None] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(first_key(tmp_path / "keys.yaml", tmp_path / "api_key"))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1


def test_no_writer_undoes_another(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    threads = [threading.Thread(target=add_key, args=(file, f"k{i}")) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in read_keys(file)} == {f"k{i}" for i in range(12)}


def test_headers(tmp_path: Path) -> None:
    ring = KeyRing(["sk-one", "sk-two"])
    assert ring.check("Bearer sk-two").name == "config.1"
    ring.check("bearer  sk-one ")
    ring.check(None, "sk-one")
    ring.check("Basic xyz", "sk-one")
    for header in (
        None,
        "",
        "sk-one",
        "Bearer",
        "Bearer sk-on",
        "Bearer sk-onee",
        "Bearer ü\udcff",
        f"Bearer {digest('sk-one')}",
    ):
        with pytest.raises(ApiError):
            ring.check(header)
    with pytest.raises(ApiError):
        ring.check("Bearer sk-no", "sk-one")  # a wrong one is not made good by another


def test_the_file_is_read_again_when_it_changes(tmp_path: Path, caplog: Any) -> None:
    file, clock = tmp_path / "keys.yaml", Clock()
    first = add_key(file, "a", requests_per_minute=5)
    ring = KeyRing(["sk-config"], file, clock)
    assert len(ring) == 2 and not refused(ring, first)
    second = add_key(file, "b")
    assert refused(ring, second)  # looked at less than a second ago
    clock.now += 1.01
    assert not refused(ring, second) and not refused(ring, first)

    good = file.read_text()
    for broken in ("keys: [", "keys:\n- name: a\n", "nonsense: 1\n", good + good[-300:]):
        edit(file, broken)
        caplog.clear()
        clock.now += 1.01
        assert not refused(ring, first) and not refused(ring, second)
        clock.now += 1.01
        assert not refused(ring, first)
        assert caplog.text.count("the keys stay as they were") == 1
    file.unlink()
    clock.now += 1.01
    caplog.clear()
    assert not refused(ring, first)
    clock.now += 1.01
    assert not refused(ring, first) and caplog.text.count("stay as they were") == 1

    file.write_text(good)
    revoke_key(file, "a", tmp_path / "api_key")
    clock.now += 1.01
    assert refused(ring, first) and not refused(ring, second) and not refused(ring, "sk-config")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keys: [", "keys.yaml"),
        ("keys:\n- {name: a, sha256: x}\n", "sha256"),
        ("keys:\n- {name: a, sha256: '" + "0" * 64 + "', requests_per_minute: 0}\n", "greater"),
        ("keys:\n- {name: a, sha256: '" + "0" * 64 + "', rpm: 1}\n", "rpm"),
        ("keys:\n" + "".join(f"- {{name: a, sha256: '{i:064x}'}}\n" for i in (1, 2)), "two keys"),
    ],
)
def test_a_broken_file_at_the_start_is_an_error(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        KeyRing((), file)


def test_written_files_are_whole_and_private(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.touch(0o644)
    add_key(file, "a", models=("deepseek-v3",), concurrent=2)
    (key,) = read_keys(file)
    assert key.models == ("deepseek-v3",) and key.concurrent == 2
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(ValueError, match="exists"):
        add_key(file, "a")
    with pytest.raises(ValueError, match="concurrent"):
        add_key(file, "b", concurrent=0)
    write_keys(file, ())
    assert read_keys(file) == ()


def test_commands(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "rayseek").mkdir()
    (tmp_path / "rayseek" / "api_key").write_text("sk-old\n")  # a service ran before
    main(["keys", "add", "ann", "--requests-per-minute", "7", "--models", "deepseek-v3", "b"])
    key = capsys.readouterr().out.strip()
    main(["keys", "list"])
    listed = capsys.readouterr().out
    assert FIRST in listed and "ann" in listed and "requests_per_minute=7" in listed
    assert key not in listed and digest(key) not in listed
    file = tmp_path / "rayseek" / "keys.yaml"
    assert {entry.sha256 for entry in read_keys(file)} == {digest("sk-old"), digest(key)}
    main(["keys", "revoke", "ann"])
    for wrong in (["revoke", "ann"], ["add", "bad name"], ["add", "x", "--concurrent", "-1"],
                  ["list", "--file", str(tmp_path)]):  # fmt: skip
        with pytest.raises(SystemExit):
            main(["keys", *wrong])
    assert "no key named 'ann'" in capsys.readouterr().err


def test_which_file(tmp_path: Path, monkeypatch: Any) -> None:
    from rayseek.cluster.config import Config

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    default = tmp_path / "rayseek" / "keys.yaml"
    assert key_file(Config()) == default
    with_keys = Config.model_validate({"api": {"keys": ("sk-a",)}})
    assert key_file(with_keys) is None
    add_key(default, "a")
    assert key_file(with_keys) == default
    own = Config.model_validate({"api": {"key_file": str(tmp_path / "own.yaml")}})
    assert key_file(own) == tmp_path / "own.yaml"


def test_the_command_line_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys; from rayseek.serve_app.cli import main; main(['keys', 'add', 'x', '--file',"
    code += f" {str(tmp_path / 'k.yaml')!r}]); assert not {{'torch', 'ray'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
