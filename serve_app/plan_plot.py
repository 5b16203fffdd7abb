"""A picture of simulated fleets over time. Needs matplotlib: the extra `train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayseek.cluster.config import Role
from rayseek.cluster.outcome import Outcome

BINS = 120
Shown = tuple[str, Outcome, Mapping[Role, int], int]  # name, outcome, GPUs of a unit, part


def plot(runs: Sequence[Shown], path: Path) -> None:
    """Requests and tokens, GPUs, first tokens (p50, p99), missed targets. Raises ValueError
    without matplotlib."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'rayseek[train]'") from None
    rcParams |= {"svg.hashsalt": "rayseek"}
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    (rates, gpus), (first, missed) = figure.subplots(2, 2)
    rates.set(title="Tokens/s out")
    gpus.set(title="GPUs")
    first.set(title="Seconds to the first token: median and p99", yscale="log")
    missed.set(title="Requests that missed a target", ylim=(0, 1))
    for number, (name, outcome, of_unit, part) in enumerate(runs):
        colour = ("#3b6fb6", "#d97a2b")[number % 2]
        hours = np.array([m.at for m in outcome.moments]) / 3600
        tokens = np.array([0.0, *(m.tokens for m in outcome.moments)]) * part
        ends = np.array([0.0, *hours]) * 3600
        rates.plot(hours, np.diff(tokens) / np.diff(ends), color=colour, label=name, lw=1)
        paid = [sum(n * of_unit[r] for r, n in m.units.items()) for m in outcome.moments]
        gpus.step(hours, paid, where="pre", color=colour, label=name)
        _over_time(first, outcome, outcome.first_token, (50, 99), colour, name)
        _over_time(missed, outcome, outcome.violations, None, colour, name)
    first.axhline(runs[0][1].targets.first_token_s, color="#7a7a7a", lw=0.8, ls="--")
    for axes in figure.axes:
        axes.set_xlabel("hours")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    gpus.set_ylim(bottom=0)
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except ValueError as error:  # a format that matplotlib does not write
        raise ValueError(f"{path}: {error}") from None


def _over_time(
    axes: Any,
    outcome: Outcome,
    values: NDArray[np.float64],
    parts: tuple[int, ...] | None,
    colour: str,
    name: str,
) -> None:
    """Percentiles, or without any the mean, of the requests that came in each part of the time."""
    edges = np.linspace(0, outcome.seconds, BINS + 1)
    where = np.digitize(outcome.arrived, edges)
    filled = [b for b in range(1, BINS + 1) if (where == b).any()]
    hours = [edges[b] / 3600 for b in filled]
    for part in parts or (None,):
        points = [
            values[where == b].mean() if part is None else np.percentile(values[where == b], part)
            for b in filled
        ]
        thin = {"lw": 0.8, "ls": ":"} if part == 50 else {"lw": 1.2, "label": name}
        axes.plot(hours, points, color=colour, **thin)
