"""Compiling the kernels for Hopper without a GPU: `python -m rayseek.kernels.hopper.offline`.

Every kernel file has its `variants`: a kernel with the constants and launch options that its
launcher uses. Here each is compiled for sm_90a, its registers, stack, shared memory and tensor-core
use are read from the machine code, and compared with the committed table `compiled.tsv`.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = 227 * 1024  # bytes a block may have on Hopper
FILES = ("fp8_gemm", "bf16_gemm", "quantise", "latent_cache", "mla_decode", "mla_prefill",
         "router", "permute", "sample")  # fmt: skip
TABLE = Path(__file__).with_name("compiled.tsv")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way in which a kernel is launched.

    types: of the arguments that are not int32, in Triton's words. unaligned: names of arguments
    that may not be multiples of 16, as the launcher would find out. wgmma, tma: the machine code
    must use Hopper's tensor cores, and its tensor memory accelerator.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int = 3  # what Triton takes where a launcher says nothing
    wgmma: bool = False
    tma: bool = False
    unaligned: tuple[str, ...] = ()
    options: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the machine code of a variant takes."""

    name: str
    warps: int
    registers: int  # of a thread
    stack: int  # bytes of a thread; registers that did not fit are spilled there
    shared: int  # bytes of a block
    wgmma: int  # instructions
    tma: int  # instructions


def variants() -> list[Variant]:
    """All variants of all kernels."""
    modules = (importlib.import_module(f"rayseek.kernels.hopper.{name}") for name in FILES)
    return [variant for module in modules for variant in module.variants()]


def compile_variant(variant: Variant) -> Compiled:
    """Compile for sm_90a (from Triton's cache where it is there) and read the result."""
    kernel, names = variant.kernel, variant.kernel.arg_names
    types = {
        name: "constexpr" if name in variant.constants else variant.types.get(name, "i32")
        for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types[name].startswith(("*", "i")) and name not in variant.unaligned
    }
    built = triton.compile(
        ASTSource(kernel, types, dict(variant.constants), aligned),
        target=GPUTarget("cuda", 90, 32),
        options={
            "num_warps": variant.warps,
            "num_stages": variant.stages,
            **(variant.options or {}),
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    if found is None:
        raise RuntimeError(f"{variant.name}: no resource usage in the output of {CUOBJDUMP}")
    ptx = built.asm["ptx"]
    return Compiled(
        variant.name, built.metadata.num_warps, int(found[1]), int(found[2]),
        built.metadata.shared, ptx.count("wgmma.mma_async"), ptx.count("cp.async.bulk.tensor"),
    )  # fmt: skip


def problems(variant: Variant, built: Compiled, table: Mapping[str, Compiled] | None) -> list[str]:
    """What is wrong with a compiled variant, and what got worse against the table, if given."""
    wrong: list[str] = []
    if built.stack:
        wrong.append(f"spills: a stack of {built.stack} bytes a thread")
    if built.shared > SHARED_LIMIT:
        wrong.append(f"shared memory {built.shared} bytes, more than {SHARED_LIMIT}")
    if variant.wgmma and not built.wgmma:
        wrong.append("no wgmma instruction: it would run on the slow tensor-core path")
    if variant.tma and not built.tma:
        wrong.append("no TMA instruction")
    if table is None:
        return wrong
    known = table.get(variant.name)
    if known is None:
        wrong.append(f"not in {TABLE.name}; run this command with --write")
    elif built.registers > known.registers:
        wrong.append(f"registers {known.registers} -> {built.registers}")
    return wrong


def read_table() -> tuple[str, dict[str, Compiled]]:
    """The version of Triton that the table is of, and its rows by name."""
    first, _, *lines = TABLE.read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    return first.split()[-1], {row[0]: Compiled(row[0], *map(int, row[1:])) for row in rows}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only variants whose name contains one of these")
    parser.add_argument("--write", action="store_true", help="put the results into the table")
    arguments = parser.parse_args(argv)
    version, table = read_table()
    comparable, bad = arguments.write or version == triton.__version__, 0
    if not comparable:
        print(f"Triton {triton.__version__}: registers are not compared, the table is of {version}")
    everything = variants()
    for variant in everything:
        if arguments.names and not any(part in variant.name for part in arguments.names):
            continue
        start = time.perf_counter()
        built = compile_variant(variant)
        if arguments.write:
            table[variant.name] = built
        wrong = problems(variant, built, table if comparable else None)
        bad += bool(wrong)
        took = time.perf_counter() - start
        print(
            f"{'BAD' if wrong else 'ok ':3} {built.name:34} {built.registers:3} registers, "
            f"{built.shared / 1024:5.1f} KiB, {built.wgmma:2} wgmma, {built.tma} TMA, {took:.1f} s",
            *(f"\n    {line}" for line in wrong),
        )
    if arguments.write:
        ordered = [table[v.name] for v in everything if v.name in table]
        columns = [field.name for field in fields(Compiled)]
        lines = [f"# Triton {triton.__version__}", "\t".join(columns)]
        lines += ["\t".join(str(getattr(row, name)) for name in columns) for row in ordered]
        TABLE.write_text("\n".join(lines) + "\n")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
