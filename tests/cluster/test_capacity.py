"""How many units a load needs: monotone in what makes it harder, and explained when impossible."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayseek.cluster.capacity import FILLED, Load, Need, Targets, needs
from rayseek.cluster.config import load_config
from rayseek.model.official import DEEPSEEK_V3
from rayseek.serve_app.cli import main

CELL, NODE = load_config("h800-cell-18"), load_config("h200-8")
LOAD, TARGETS = Load(100, 4000, 800, 0.5), Targets(3.0, 0.1)


def gpus(found: list[Need]) -> int:
    return sum(need.gpus for need in found)


def test_a_cell_is_what_its_own_rate_needs() -> None:
    prompts, tokens = needs(CELL, DEEPSEEK_V3, LOAD, TARGETS)
    full = replace(LOAD, requests_s=LOAD.requests_s * 0.999 * FILLED / tokens.busy)
    again = needs(CELL, DEEPSEEK_V3, full, TARGETS)[1]
    assert again.units == tokens.units == 1 and again.busy == pytest.approx(FILLED, rel=0.01)
    assert prompts.seconds <= TARGETS.first_token_s and tokens.seconds <= TARGETS.token_s


@settings(max_examples=25)
@given(rate=st.floats(1, 2000), more=st.floats(1, 4), cached=st.floats(0, 0.9))
def test_more_load_or_less_cache_never_needs_fewer(rate: float, more: float, cached: float) -> None:
    for config in (CELL, NODE):
        one = replace(LOAD, requests_s=rate, cached=cached)
        least = gpus(needs(config, DEEPSEEK_V3, one, TARGETS))
        assert (
            gpus(needs(config, DEEPSEEK_V3, replace(one, requests_s=rate * more), TARGETS)) >= least
        )
        # Not quite: rows of a whole prompt see less of it than its last ones do.
        assert gpus(needs(config, DEEPSEEK_V3, replace(one, cached=0.0), TARGETS)) >= 0.97 * least


def test_a_slower_pace_never_needs_more() -> None:
    paces = [gpus(needs(CELL, DEEPSEEK_V3, LOAD, Targets(3.0, p))) for p in (0.04, 0.06, 0.1, 0.2)]
    assert paces == sorted(paces, reverse=True)


@pytest.mark.parametrize(
    ("load", "targets", "reason"),
    [
        (replace(LOAD, prompt=2_000_000), TARGETS, "does not fit into"),
        (LOAD, Targets(3.0, 0.001), "ms between tokens at best"),
        (replace(LOAD, prompt=100_000), Targets(1.0, 0.1), "a prompt alone takes"),
    ],
)
def test_the_impossible_is_explained(load: Load, targets: Targets, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        needs(CELL, DEEPSEEK_V3, load, targets)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "h200-8", "--requests-per-second", "5", "--price", "3"])
    shown = capsys.readouterr().out
    assert "GPUs for" in shown and "per million" in shown and "the same" in shown
    with pytest.raises(SystemExit, match="1"):
        main(["plan", "laptop", "--requests-per-second", "5"])
    assert "plans are for GPU configs" in capsys.readouterr().err


def test_the_command_in_virtual_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "p.svg"
    words = ["plan", "h200-8", "--requests-per-second", "6", "--simulate", "0.05", "--part", "4"]
    main([*words, "--scale", "--shape", "wave", "--plot", str(picture)])
    shown = capsys.readouterr().out
    assert "scaled" in shown and "fixed" in shown and "requests over 3 s or 100 ms" in shown
    assert "Of 4 ranks of a unit one was simulated" in shown
    assert "</svg>" in picture.read_text()
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"at": 0, "prompt": 100, "output": 5}\n' * 3)
    main(["plan", "h200-8", "--simulate", "0.01", "--trace", str(trace)])
    assert "requests" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        main(["plan", "h200-8"])
    assert "--requests-per-second" in capsys.readouterr().err
