"""Building the native library, and doing without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rayseek.kernels import native_build
from rayseek.kernels.native_build import NativeUnavailableError, load_native
from rayseek.kernels.select import choose_ops, device_for

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_native.cache_clear()


def test_without_a_compiler_the_reference_runs_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    choice = choose_ops()
    assert choice.ops.name == "reference"
    assert "no C++ compiler found" in choice.reason
    with pytest.raises(NativeUnavailableError, match="install g"):
        choose_ops(prefer="native")


@needs_compiler
def test_a_build_that_fails_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("int f() { return nothing; }")
    monkeypatch.setattr(native_build, "SOURCE", broken)
    choice = choose_ops()
    assert choice.ops.name == "reference"
    assert "could not build broken.cpp" in choice.reason and "nothing" in choice.reason
    assert list((tmp_path / "rayseek").iterdir()) == []


@needs_compiler
def test_an_unwritable_cache_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "cannot write to" in choose_ops().reason


@needs_compiler
def test_processes_that_build_at_once_share_one_library(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from rayseek.kernels.native_build import load_native\n"
               "load_native()"]  # fmt: skip
    builds = [subprocess.Popen(command, env=dict(os.environ)) for _ in range(2)]
    assert [build.wait(timeout=600) for build in builds] == [0, 0]
    assert [path.suffix for path in (tmp_path / "rayseek").iterdir()] == [".so"]
    assert choose_ops().ops.name == "native"


def test_preferences() -> None:
    assert choose_ops(prefer="reference").ops.name == "reference"
    assert device_for("native") == device_for("reference") == "cpu"


def test_a_gpu_is_taken_where_it_is_a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for() == "cpu"
    with pytest.raises(ValueError, match="no CUDA device"):
        device_for("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    for capability, device in (((8, 0), "cpu"), ((9, 0), "cuda")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert device_for() == device
    assert device_for("cuda") == "cuda" and device_for("native") == "cpu"
