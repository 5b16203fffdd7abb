"""`rayseek doctor` as a command: checkpoints, keys and ports that are wrong, and how it ends."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayseek.cluster import machine
from rayseek.cluster.doctor import Facts, Needs
from rayseek.serve_app import doctor_command
from rayseek.serve_app.cli import main
from rayseek.serve_app.keys import add_key
from rayseek.serve_app.local import free_port

SOUND = Facts(shm=2**30, memory=2**35, memory_free=2**35, kernels="C++", cache="/cache")


@pytest.fixture
def doctor(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:  # fmt: skip
    """Runs the command on a sound machine; gives its exit code and its findings by name."""

    def gathered(needs: Needs) -> Facts:
        return SOUND

    monkeypatch.setattr(machine, "facts_of_this_machine", gathered)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def run(path: Path = tiny_path, port: int = 0, **api: Any) -> tuple[int, dict[str, Any]]:
        file = tmp_path / "config.yaml"
        ingress = {"port": port or free_port()}
        file.write_text(json.dumps({"model": {"path": str(path)}, "api": api, "ingress": ingress}))
        code = 0
        try:
            main(["doctor", str(file), "--json"])
        except SystemExit as end:
            assert isinstance(end.code, int)
            code = end.code
        answer = json.loads(capsys.readouterr().out)
        assert answer["ok"] == (code == 0)
        return code, {finding.pop("check"): finding for finding in answer["findings"]}

    return run


def test_a_sound_machine(doctor: Any) -> None:
    code, found = doctor()
    assert code == 0
    assert {line["state"] for line in found.values()} == {"ok"}
    assert "will be made" in found["keys"]["what"]


@pytest.mark.parametrize(
    ("damage", "check", "words"),
    [
        (lambda path: (path / "config.json").unlink(), "weights", "config.json"),
        (lambda path: next(path.glob("*-of-*.safetensors")).unlink(), "weights", "no such file"),
        (lambda path: cut(next(path.glob("*-of-*.safetensors"))), "weights", "cut off"),
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer", "tokenizer.json"),
        (lambda path: (path / "tokenizer.json").write_text("{}"), "tokenizer", "added_tokens"),
    ],
)
def test_a_checkpoint_that_is_not_whole(
    doctor: Any, tiny_path: Path, tmp_path: Path, damage: Any, check: str, words: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_path, copy)
    damage(copy)
    code, found = doctor(copy)
    assert code == 1
    assert found[check]["state"] == "problem" and words in found[check]["what"]
    others = {line["state"] for name, line in found.items() if name != check}
    assert others == {"ok"}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_keys_that_cannot_be_had(doctor: Any, tmp_path: Path) -> None:
    file = tmp_path / "of-mine.yaml"
    assert "No such file" in doctor(key_file=str(file))[1]["keys"]["what"]
    file.write_text("keys: []")
    assert "has no keys" in doctor(key_file=str(file))[1]["keys"]["what"]
    file.write_text("keys: [{name: a}]")
    code, found = doctor(key_file=str(file))
    assert code == 1 and "sha256" in found["keys"]["what"]
    file.unlink()
    add_key(file, "me")
    assert doctor(key_file=str(file))[0] == 0
    code, found = doctor(keys=["sk-1234"])
    assert code == 0 and found["keys"]["what"] == "1 in the config"


def test_a_port_that_another_has_and_one_that_is_ours(
    doctor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(doctor_command, "ANSWER_S", 0.1)
        code, found = doctor(port=port)
        assert code == 1 and f"another server has {port}" in found["ports"]["what"]
        monkeypatch.setattr(doctor_command, "is_rayseek", lambda _: True)
        assert "ours already" in doctor(port=port)[1]["ports"]["what"]


def test_as_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    facts = replace(SOUND, shm=2**20)
    monkeypatch.setattr(machine, "facts_of_this_machine", lambda needs: facts)
    with pytest.raises(SystemExit, match="1"):
        main(["doctor", "h200-8"])
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if "/dev/shm" in line)
    assert lines[at].startswith("problem  /dev/shm") and "-> docker run" in lines[at + 1]
