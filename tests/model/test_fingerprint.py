"""The fingerprint changes with whatever changes tokens, and with nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rayseek.model import fingerprint as module
from rayseek.model.fingerprint import fingerprint


def test_equal_copies_have_equal_fingerprints(tiny_path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_path, tmp_path / "copy")
    first = fingerprint(tiny_path, "native")
    assert first == fingerprint(copy, "native")
    assert first.startswith("fp_") and len(first) == 19
    assert first != fingerprint(copy, "native amx")
    (copy / "README.md").write_text("nothing that computes")
    assert first == fingerprint(copy, "native")


@pytest.mark.parametrize("whole", [1 << 30, 32 << 10])
def test_another_weight_or_file_is_another_fingerprint(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    """Also where a file is too large to be read whole."""
    monkeypatch.setattr(module, "WHOLE", whole)
    copy = shutil.copytree(tiny_path, tmp_path / "copy")
    seen = {fingerprint(copy, "native")}
    shard = min(copy.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    for change in (10, len(data) - 3):  # in the header; in the last tensor
        data[change] ^= 1
        shard.write_bytes(data)
        seen.add(fingerprint(copy, "native"))
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    seen.add(fingerprint(copy, "native"))
    assert len(seen) == 4
