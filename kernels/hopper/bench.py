"""Measuring the kernels on a Hopper GPU: `rayseek bench --kernels`.

First the ceilings of this very GPU: what a copy reaches of its memory, what the largest matrix
products of cuBLAS reach of its tensor cores. Then each case of `bench_cases`: its error against the
reference, its time, and which part of its lower bound that is; then whether a row's bits depend on
its batch. Times are of a CUDA graph with one call, with caches emptied before it: median of 20.
"""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rayseek.kernels.hopper import bf16_gemm, fp8_gemm, mla_decode, quantise
from rayseek.kernels.hopper.bench_cases import Built, Case, Dimensions, Peak, cases
from rayseek.kernels.kv_format import PAGE_TOKENS

FLUSH_BYTES = 256 << 20  # more than the L2 cache


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Of one GPU, measured: bytes/s of a copy, operations/s of cuBLAS."""

    device: str
    hbm: float
    bf16: float
    fp8: float

    def floor_s(self, built: Built) -> float:
        """No implementation is faster than this: bytes and operations at their ceilings."""
        return max(built.bytes / self.hbm, built.flops / self.of(built.peak))

    def of(self, peak: Peak) -> float:
        return {"fp8": self.fp8, "bf16": self.bf16, "hbm": math.inf}[peak]


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of the table. fraction: of the floor; others_us: time, or why there is none."""

    kernel: str
    shape: str
    error: float
    us: float
    fraction: float
    gbytes_s: float
    tflops: float
    intensity: float  # operations per byte
    others_us: dict[str, float | str]


class Clock:
    """Times calls on the current GPU."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def seconds(self, run: Callable[[], object], graph: bool = True) -> float:
        """Of one call from cold caches, as a CUDA graph unless it says otherwise."""
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        call = run
        if graph:
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded):
                run()
            call = recorded.replay
        times: list[float] = []
        for _ in range(20):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        return statistics.median(times)


def ceilings(clock: Clock) -> Ceilings:
    """What this GPU reaches with the simplest large work there is."""
    big = torch.empty(2 << 30, dtype=torch.int8, device="cuda")
    other = torch.empty_like(big)
    hbm = 2 * len(big) / clock.seconds(lambda: other.copy_(big))
    n = 8192
    a = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    bf16 = 2 * n**3 / clock.seconds(lambda: a @ a)
    a8, one = a.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
    fp8 = (
        2
        * n**3
        / clock.seconds(lambda: torch._scaled_mm(a8, a8.T, one, one, out_dtype=torch.bfloat16))
    )
    return Ceilings(torch.cuda.get_device_name(), hbm, bf16, fp8)


def measure(case: Case, clock: Clock, top: Ceilings) -> Measured:
    """Build a case, check it, time it and what else can do the same."""
    built = case.build()
    error, took = built.error(), clock.seconds(built.run)
    others: dict[str, float | str] = {}
    for name, run in built.others.items():
        try:
            others[name] = clock.seconds(run) * 1e6
        except Exception as problem:  # another library's refusal ends nothing here
            others[name] = str(problem).partition("\n")[0][:80]
    return Measured(
        case.kernel, case.shape, error, took * 1e6, top.floor_s(built) / took,
        built.bytes / took / 1e9, built.flops / took / 1e12, built.flops / built.bytes, others,
    )  # fmt: skip


def batch_changes(d: Dimensions, device: str, batches: tuple[int, ...]) -> dict[str, list[int]]:
    """By kernel, the batches whose rows do not have the bits they have in the largest batch."""
    most = max(batches)
    x = torch.randn(most, d.hidden, device=device)
    n = 2 * d.expert
    w8, w16 = torch.randn(n, d.hidden, device=device), torch.randn(n, d.hidden, device=device)
    w = quantise.quantise(w8)[0]
    blocks = torch.ones(-(-n // 128), -(-d.hidden // 128), device=device)
    width, pages_each = d.latent + d.rope, 40
    pages = torch.randn(4 * pages_each, PAGE_TOKENS, width, device=device).bfloat16()
    table = torch.arange(4 * pages_each, dtype=torch.int32, device=device).view(4, -1)
    q = torch.randn(most, d.heads, width, device=device).bfloat16()
    row = torch.arange(most, dtype=torch.int32, device=device)
    position = row * 37 % (pages_each * PAGE_TOKENS)

    def attention(rows: int) -> Tensor:
        return mla_decode.mla_attention(
            q[:rows], pages, table, row[:rows] % 4, position[:rows], width**-0.5, d.latent
        )

    kernels: dict[str, Callable[[int], Tensor]] = {
        "fp8 gemm": lambda rows: fp8_gemm.fp8_matmul(*quantise.quantise(x[:rows]), w, blocks),
        "bf16 gemm": lambda rows: bf16_gemm.bf16_matmul(x[:rows].bfloat16(), w16.bfloat16()),
        "mla decode": attention,
    }
    changed: dict[str, list[int]] = {}
    for name, run in kernels.items():
        whole = run(most)
        changed[name] = [rows for rows in batches if not torch.equal(run(rows), whole[:rows])]
    return changed


def table(top: Ceilings, lines: list[Measured], changed: dict[str, list[int]]) -> str:
    """All results as Markdown."""
    out = [
        f"{top.device}: copy {top.hbm / 1e9:.0f} GB/s, bf16 {top.bf16 / 1e12:.0f} TFLOPS, "
        f"fp8 {top.fp8 / 1e12:.0f} TFLOPS",
        "",
        "| kernel | shape | error | us | of floor | GB/s | TFLOPS | others, us |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for m in lines:
        others = ", ".join(
            f"{name} {took:.1f}" if isinstance(took, float) else f"{name}: {took}"
            for name, took in m.others_us.items()
        )
        out.append(
            f"| {m.kernel} | {m.shape} | {m.error:.1e} | {m.us:.1f} | {m.fraction:.0%} | "
            f"{m.gbytes_s:.0f} | {m.tflops:.1f} | {others} |"
        )
    out += ["", "Batches whose rows have other bits than in the largest one:"]
    out += [f"- {name}: {', '.join(map(str, b)) or 'none'}" for name, b in changed.items()]
    return "\n".join(out) + "\n"


def roofline_svg(top: Ceilings, lines: list[Measured]) -> str:
    """Achieved operations/s over operations per byte, under the measured ceilings."""
    width, height, left, bottom = 900, 560, 70, 50
    shown = [m for m in lines if m.tflops > 0]

    def x(intensity: float) -> float:
        return left + math.log10(max(intensity, 0.1) / 0.1) / 5 * (width - left - 20)

    def y(tflops: float) -> float:
        return height - bottom - math.log10(max(tflops, 0.1) / 0.1) / 4.5 * (height - bottom - 20)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
             'font-family="sans-serif" font-size="12">']  # fmt: skip
    for name, peak in (("bf16", top.bf16), ("fp8", top.fp8)):
        corner = peak / top.hbm
        points = [(0.1, 0.1 * top.hbm / 1e12), (corner, peak / 1e12), (1e4, peak / 1e12)]
        path = " ".join(f"{x(i):.1f},{y(t):.1f}" for i, t in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="#888"/>')
        parts.append(f'<text x="{x(2e3):.0f}" y="{y(peak / 1e12) - 5:.0f}">{name}</text>')
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
    kernels = sorted({m.kernel for m in shown})
    for m in shown:
        colour = colours[kernels.index(m.kernel) % len(colours)]
        label = html.escape(f"{m.kernel}: {m.shape}, {m.tflops:.1f} TFLOPS, {m.fraction:.0%}")
        parts.append(
            f'<circle cx="{x(m.intensity):.1f}" cy="{y(m.tflops):.1f}" r="4" fill="{colour}">'
            f"<title>{label}</title></circle>"
        )
    for i, kernel in enumerate(kernels):
        colour = colours[i % len(colours)]
        parts.append(f'<text x="{left + 10}" y="{30 + 16 * i}" fill="{colour}">{kernel}</text>')
    parts.append(f'<text x="{width // 2}" y="{height - 12}">operations per byte (log)</text>')
    parts.append(f'<text x="6" y="16">TFLOPS (log), {html.escape(top.device)}</text></svg>')
    return "\n".join(parts)


def run(only: str = "", out: Path | None = None) -> None:
    """Measure everything, or the kernels whose name contains `only`; files go to `out`."""
    torch.manual_seed(0)
    clock = Clock()
    top = ceilings(clock)
    print(table(top, [], {}).splitlines()[0], flush=True)
    lines: list[Measured] = []
    for case in cases(Dimensions(), "cuda"):
        if only not in case.kernel:
            continue
        try:
            lines.append(measure(case, clock, top))
        except torch.cuda.OutOfMemoryError:
            print(f"{case.kernel}, {case.shape}: not enough memory here")
            torch.cuda.empty_cache()
            continue
        m = lines[-1]
        print(f"{m.kernel:22} {m.shape:44} {m.us:9.1f} us {m.fraction:5.0%}", flush=True)
    changed = batch_changes(Dimensions(), "cuda", (*range(1, 130), 200, 256))
    text = table(top, lines, changed)
    print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "kernels.md").write_text(text)
        (out / "kernels.svg").write_text(roofline_svg(top, lines))
        record = {"ceilings": asdict(top), "cases": [asdict(m) for m in lines], "changed": changed}
        (out / "kernels.json").write_text(json.dumps(record, indent=1))
