"""What `rayseek bench` measures: a load, its requests' clocks, the figures and their table."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Point:
    """One load: `streams` clients, each sending `rounds` requests one after another."""

    streams: int
    prompt: int
    output: int

    @property
    def rounds(self) -> int:
        return max(2, 8 // self.streams)


@dataclass(slots=True)
class Clock:
    """Arrival times of one request's tokens: (seconds, tokens so far)."""

    sent: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    accepted: int = 0  # drafts of the MTP module that came true
    rejected: int = 0

    def arrived(self, tokens: int) -> None:
        so_far = self.arrivals[-1][1] if self.arrivals else 0
        self.arrivals.append((time.perf_counter(), so_far + tokens))


@dataclass(frozen=True, slots=True)
class Result:
    """Figures of one point. Rates over the whole run, latencies as medians over requests.

    acceptance: part of the drafts that came true. tokens_per_step: of one sequence. gain: in
    tokens/s, over the same without drafts. None: nothing was drafted, or not measured.
    """

    system: str
    streams: int
    prompt: int
    output_tokens: int
    tokens_per_s: float
    ttft_ms: float
    itl_ms: float
    acceptance: float | None = None
    tokens_per_step: float | None = None
    gain: float | None = None


def summarise(system: str, point: Point, clocks: list[Clock], seconds: float) -> Result:
    """itl: time between first and last token over the tokens in between."""
    tokens = sum(c.arrivals[-1][1] for c in clocks)
    accepted, rejected = sum(c.accepted for c in clocks), sum(c.rejected for c in clocks)
    spans = [
        (c.arrivals[-1][0] - c.arrivals[0][0]) / (c.arrivals[-1][1] - c.arrivals[0][1])
        for c in clocks
        if c.arrivals[-1][1] > c.arrivals[0][1]
    ]
    return Result(
        system,
        point.streams,
        point.prompt,
        tokens,
        tokens / seconds,
        1e3 * statistics.median(c.arrivals[0][0] - c.sent for c in clocks),
        1e3 * statistics.median(spans) if spans else 0.0,
        accepted / (accepted + rejected) if accepted + rejected else None,
        tokens / (tokens - accepted),
    )


def print_table(results: list[Result]) -> None:
    """In 80 columns. load: streams x prompt tokens; hits: acceptance."""
    table = Table(
        title="Output tokens/s; medians of time to first token and between tokens",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    columns = ("load", "system", "tokens/s", "TTFT ms", "ITL ms", "hits", "tok/step", "gain")
    for column in columns:
        table.add_column(column, justify="left" if column == "system" else "right")
    for r in sorted(results, key=lambda r: (r.prompt, r.streams)):
        table.add_row(
            f"{r.streams} x {r.prompt}",
            r.system,
            f"{r.tokens_per_s:.0f}",
            f"{r.ttft_ms:.0f}" if r.ttft_ms else "-",
            f"{r.itl_ms:.2f}",
            "-" if r.acceptance is None else f"{r.acceptance:.1%}",
            "-" if r.tokens_per_step is None else f"{r.tokens_per_step:.2f}",
            "-" if r.gain is None else f"{r.gain:.2f}x",
        )
    Console().print(table)
