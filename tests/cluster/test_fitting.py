"""Step times out of a bench: known ones are found again, and the command tells how well it did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayseek.cluster.config import Config, EngineSettings
from rayseek.cluster.fitting import Sample, fitted, predicted
from rayseek.cluster.step_times import Measured
from rayseek.model.maker import BENCH
from rayseek.serve_app.cli import main

CONFIG = Config(engine=EngineSettings(draft_tokens=0))
TRUE = Measured(3e-3, 2e-3, 3.5e-4, 2.5e-4, 1.8e-6, 5e-7, BENCH)
LOADS = [(s, p) for p in (32, 512) for s in (1, 2, 4, 8)]


def bench(times: Measured) -> list[Sample]:
    loads = [Sample(s, max(2, 8 // s), p, 64, 0, 0, 0) for s, p in LOADS]
    return [predicted(load, CONFIG, BENCH, times) for load in loads]


def test_known_step_times_are_found_again() -> None:
    samples = bench(TRUE)
    held = [s for s in samples if s.streams in (1, 8)]
    times = fitted([s for s in samples if s not in held], CONFIG, BENCH)
    for there in held:
        here = predicted(there, CONFIG, BENCH, times)
        for a, b in zip(here.figures, there.figures, strict=True):
            assert a == pytest.approx(b, rel=0.05)
    assert times.prompt_row == pytest.approx(TRUE.prompt_row, rel=0.2)


def test_more_of_anything_takes_longer() -> None:
    for name in ("step", "experts", "row", "prompt_row", "latent", "prompt_latent"):
        values = {k: getattr(TRUE, k) for k in TRUE.__slots__}
        slower = bench(Measured(**{**values, name: 2 * values[name]}))
        for a, b in zip(slower, bench(TRUE), strict=True):
            assert a.tokens_s < b.tokens_s


def test_too_few_points_and_too_long_ones() -> None:
    with pytest.raises(ValueError, match="too few"):
        fitted(bench(TRUE)[:3], CONFIG, BENCH)
    with pytest.raises(ValueError, match="more than a rank's pages hold"):
        predicted(Sample(1, 1, 10**6, 1, 0, 0, 0), CONFIG, BENCH, TRUE)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        {
            "system": "engine, no drafts", "streams": s.streams, "prompt": s.prompt,
            "output_tokens": s.streams * s.rounds * s.output, "tokens_per_s": s.tokens_s,
            "ttft_ms": s.first_s * 1e3, "itl_ms": s.between_s * 1e3,
        }
        for s in bench(TRUE)
    ]  # fmt: skip
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(results))
    main(["plan", "laptop", "--fit", str(path)])
    shown = capsys.readouterr().out
    assert "held out" in shown and "a decoding row" in shown
    words = ["--simulate", "0.02", "--requests-per-second", "2", "--prompt", "50", "--output", "20"]
    main(["plan", "laptop", "--fit", str(path), *words])
    assert "first token, p99" in capsys.readouterr().out
    path.write_text("[{}]")
    with pytest.raises(SystemExit, match="1"):
        main(["plan", "laptop", "--fit", str(path)])
    assert "is not what `rayseek bench --json` writes" in capsys.readouterr().err
