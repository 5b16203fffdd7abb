"""`rayseek plan --fit BENCH.json`: step times of a CPU engine, and how well they predict."""

from __future__ import annotations

import io
import json
from collections.abc import Collection
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rayseek.cluster.config import Config
from rayseek.cluster.fitting import Sample, fitted, predicted
from rayseek.cluster.step_times import Measured
from rayseek.model.config import ModelConfig
from rayseek.serve_app.bench_figures import Point

SYSTEMS = ("engine, no drafts", "Rayseek over HTTP")  # of a bench; the first that it has


def fit(path: Path, config: Config, held: Collection[int]) -> tuple[str, Measured, ModelConfig]:
    """A table of predicted beside measured figures, the step times, and the model that they are of:
    the config's, or the bench's own. held: numbers of streams that are not fitted to.

    Raises ValueError for a file that is no bench, or one of too few points.
    """
    samples = read_bench(path)
    if config.model.path is not None:
        model = ModelConfig.from_pretrained(config.model.path)
    else:
        from rayseek.model.maker import BENCH as model
    times = fitted([s for s in samples if s.streams not in held], config, model)
    found = [predicted(sample, config, model, times) for sample in samples]
    return report(samples, found, held, times), times, model


def without_drafts(config: Config) -> Config:
    """Step times are fitted to steps without drafts."""
    return config.model_copy(
        update={"engine": config.engine.model_copy(update={"draft_tokens": 0})}
    )


def read_bench(path: Path) -> list[Sample]:
    """What `rayseek bench --json` wrote. Raises ValueError."""
    try:
        results = json.loads(path.read_text())
        by_system = {
            r["system"]: [s for s in results if s["system"] == r["system"]] for r in results
        }
        points = next((by_system[name] for name in SYSTEMS if name in by_system), [])
        return [_sample(point) for point in points]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what `rayseek bench --json` writes: {error!r}") from None


def _sample(result: dict[str, float]) -> Sample:
    streams = int(result["streams"])
    rounds = Point(streams, 1, 1).rounds
    output = int(result["output_tokens"]) // (streams * rounds)
    return Sample(
        streams, rounds, int(result["prompt"]), output, result["tokens_per_s"],
        result["ttft_ms"] / 1e3, result["itl_ms"] / 1e3,
    )  # fmt: skip


def report(
    samples: list[Sample], found: list[Sample], held: Collection[int], times: Measured
) -> str:
    text = io.StringIO()
    console = Console(file=text, width=100, highlight=False)
    table = Table(title="Predicted, and how far that is from what was measured")
    for column in ("streams x prompt", "", "tokens/s", "first token, ms", "between tokens, ms"):
        table.add_column(column, justify="left" if not column else "right")
    for there, here in zip(samples, found, strict=True):
        cells = [
            f"{a * scale:,.{digits}f} {a / b - 1:+7.1%}" if b else "-"
            for a, b, scale, digits in zip(
                here.figures, there.figures, (1, 1e3, 1e3), (0, 1, 2), strict=True
            )
        ]
        kind = "held out" if there.streams in held else "fitted"
        table.add_row(f"{there.streams} x {there.prompt}", kind, *cells)
    console.print(table)
    console.print(
        f"A step: {times.step * 1e3:.2f} ms, {times.experts * 1e3:.2f} ms to read all experts, "
        f"{times.row * 1e3:.3f} ms a decoding row,\n{times.prompt_row * 1e3:.3f} ms a prompt row; "
        f"per token seen {times.latent * 1e6:.2f} µs decoding, {times.prompt_latent * 1e6:.2f} µs "
        "in prompts."
    )
    return text.getvalue()
