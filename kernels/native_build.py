"""Compiling `native.cpp` with the machine's own C++ compiler, once, and loading it.

The library is kept in the user's cache under a name made from everything it depends on, so a
changed source, compiler or CPU never meets a stale build, and several processes may build at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno",
    "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-psabi",
)  # fmt: skip
BUILD_SECONDS = 600  # it takes 5; many processes may build at once on a few cores

LONG, INT, FLOAT, POINTER = ctypes.c_long, ctypes.c_int, ctypes.c_float, ctypes.c_void_p
SIGNATURES: dict[str, list[Any]] = {
    "rs_set_amx": [INT],
    "rs_set_threads": [INT],
    "rs_linear": [POINTER, LONG, LONG, POINTER, POINTER, FLOAT, POINTER, LONG, POINTER],
    "rs_rms_norm": [POINTER, LONG, LONG, LONG, POINTER, FLOAT, POINTER],
    "rs_store_latents": [POINTER, LONG, LONG, LONG, LONG, POINTER, FLOAT]
    + [POINTER, POINTER, POINTER, POINTER, INT],
    "rs_prefer_huge": [POINTER, LONG],
    "rs_read_latents": [POINTER, LONG, POINTER],
    "rs_attend": [POINTER, LONG, LONG, POINTER, POINTER, POINTER, POINTER, POINTER]
    + [POINTER, POINTER, LONG, FLOAT, POINTER, INT],
    "rs_route": [POINTER, LONG, LONG, LONG, POINTER, LONG, LONG, LONG, INT, FLOAT]
    + [POINTER, POINTER],
    "rs_mlp": [POINTER, LONG, LONG, POINTER, POINTER, POINTER],
    "rs_experts": [POINTER, LONG, LONG, LONG, POINTER, POINTER]
    + [LONG, POINTER, POINTER, POINTER, LONG],
    "rs_expert_rows": [POINTER, LONG, LONG, POINTER, POINTER, LONG, POINTER, POINTER, POINTER],
    "rs_row_places": [POINTER, LONG, POINTER, LONG, LONG, POINTER, POINTER],
    "rs_wanted_rows": [POINTER, LONG, LONG, LONG, POINTER, LONG, LONG, POINTER, POINTER],
    "rs_pack_rows": [POINTER, POINTER, LONG, LONG, LONG, POINTER, LONG, LONG]
    + [POINTER, POINTER, POINTER],
    "rs_picked_slots": [POINTER, LONG, LONG, LONG, INT, INT, LONG]
    + [POINTER, POINTER, POINTER, POINTER],
    "rs_draw": [POINTER, LONG, LONG, LONG, POINTER, LONG, POINTER, POINTER, POINTER, POINTER],
    "rs_pass": [POINTER] * 6,
    "rs_drafts": [POINTER] * 6 + [LONG, POINTER],
    "rs_combine": [POINTER, LONG, LONG, LONG, POINTER, POINTER, LONG, POINTER, LONG],
}


class NativeUnavailableError(RuntimeError):
    """The native operations cannot be had on this machine; the message says why."""


@cache
def load_native(target: str = "native") -> tuple[ctypes.CDLL, bool]:
    """The library, built if need be, and whether it multiplies with AMX.

    target: what the compiler's -march (-mcpu on ARM) is given. Raises NativeUnavailableError.
    """
    path = _build(target)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"{path} cannot be loaded: {error}") from error
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = None
    for name in ("rs_experts", "rs_expert_rows", "rs_combine"):
        getattr(library, name).restype = INT
    for name in ("rs_wanted_rows", "rs_pack_rows", "rs_picked_slots"):
        getattr(library, name).restype = LONG
    library.rs_init.restype = library.rs_narrow.restype = INT
    return library, bool(library.rs_init())


def _build(target: str) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NativeUnavailableError("no C++ compiler found (install g++ or clang++)")
    machine = platform.machine()
    if ctypes.sizeof(LONG) != 8 or ctypes.sizeof(POINTER) != 8:
        raise NativeUnavailableError(f"needs 64-bit Linux or macOS, this is {machine}")
    arch = "-mcpu=" if machine in ("aarch64", "arm64") else "-march="
    command = [compiler, *FLAGS, arch + target]
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=False, timeout=BUILD_SECONDS
    ).stdout
    parts = [SOURCE, *sorted(SOURCE.parent.glob("native_*.h"))]
    key = [*(part.read_text() for part in parts), *command, version, machine, _cpu()]
    name = hashlib.sha256("\0".join(key).encode()).hexdigest()[:24]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayseek"
    path = folder / f"native-{name}.so"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
    except OSError as error:
        raise NativeUnavailableError(f"cannot write to {folder}: {error}") from error
    try:
        done = subprocess.run(
            [*command, str(SOURCE), "-o", partial],
            capture_output=True, text=True, check=False, timeout=BUILD_SECONDS,
        )  # fmt: skip
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "")
            raise NativeUnavailableError(f"{compiler} could not build {SOURCE.name}: {first}")
        os.replace(partial, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(
            f"{compiler} could not build {SOURCE.name}: {error}"
        ) from error
    finally:
        Path(partial).unlink(missing_ok=True)
    return path


def _cpu() -> str:
    """What -march=native depends on: the CPU's list of features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x for x in lines if x.startswith(("flags", "Features"))), "")
