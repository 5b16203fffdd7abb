"""The gate: every variant of every kernel is compiled for Hopper, as far as no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys

from rayseek.kernels.hopper.offline import (
    SHARED_LIMIT,
    Compiled,
    Variant,
    problems,
    read_table,
    variants,
)


def test_every_variant_compiles_for_hopper_as_the_table_says() -> None:
    """In a process of its own: this one has Triton as an interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "rayseek.kernels.hopper.offline"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_table_has_every_variant_once() -> None:
    names = [variant.name for variant in variants()]
    assert len(set(names)) == len(names)
    assert set(read_table()[1]) == set(names)


def test_what_the_gate_refuses() -> None:
    variant = Variant("k", None, {}, {}, 4, wgmma=True, tma=True)
    good = Compiled("k", 4, 100, 0, SHARED_LIMIT, 4, 2)
    assert problems(variant, good, {"k": good}) == []
    bad = Compiled("k", 4, 101, 8, SHARED_LIMIT + 1, 0, 0)
    said = "\n".join(problems(variant, bad, {"k": good}))
    for word in ("spills", "shared memory", "wgmma", "TMA", "registers 100 -> 101"):
        assert word in said
    assert problems(variant, good, {}) != [] and problems(variant, good, None) == []
