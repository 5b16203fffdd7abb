"""`rayseek plan --simulate`: the load in virtual time, on a fixed fleet and on one that scales."""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from rayseek.cluster.capacity import Load, Need, Targets
from rayseek.cluster.config import Config, Role
from rayseek.cluster.outcome import Outcome
from rayseek.cluster.scaling_settings import AutoscalingSettings, Range
from rayseek.cluster.simulation import Conditions, Simulation
from rayseek.cluster.step_times import StepTimes
from rayseek.cluster.traffic import Arrival, Traffic, recorded
from rayseek.model.config import ModelConfig
from rayseek.serve_app.plan_plot import plot

MOST_REQUESTS = 800_000  # of one run: a minute; of more, a part is simulated
FEWEST_RANKS = 4  # of a unit, in such a part
ROOM = 1.5  # units that may be, over those that the peak needs


@dataclass(frozen=True, slots=True)
class Run:
    """One fleet under the load. gpus: of a unit, by role. part: as in Conditions."""

    name: str
    outcome: Outcome
    gpus: Mapping[Role, int]
    part: int

    @property
    def tokens_s(self) -> float:
        return self.outcome.tokens_s * self.part

    @property
    def gpu_hours(self) -> float:
        of = self.outcome.unit_s
        return sum(seconds * self.gpus[role] for role, seconds in of.items()) / 3600


def simulate(
    arguments: argparse.Namespace,
    config: Config,
    model: ModelConfig,
    times: Mapping[Role, StepTimes],
    load: Load,
    targets: Targets,
    needed: list[Need],
    at_peak: list[Need],
) -> str:
    """The table as text; draws the plot. needed, at_peak: what each role needs; empty: as the
    config says. Raises ValueError for a trace or load that cannot be."""
    seconds = arguments.simulate * 3600
    context = config.engine.max_context or model.max_position_embeddings
    traffic = Traffic(load, arguments.shape, arguments.peak, arguments.spread, context)
    trace = recorded(_lines(arguments.trace)) if arguments.trace else None
    part = 1 if trace else arguments.part or _part(config, load.requests_s * seconds)
    traffic = replace(traffic, load=replace(load, requests_s=load.requests_s / part))
    conditions = Conditions(arguments.start_seconds, arguments.unit_life, arguments.seed, part)

    def run(name: str, fleet: Config) -> Run:
        coming: Iterable[Arrival] = trace or traffic.arrivals(seconds, arguments.seed)
        simulation = Simulation(fleet, model, times, targets, conditions, load.accepted)
        gpus = {r: u.attention_ranks + u.expert_ranks + u.spares for r, u in fleet.units.items()}
        return Run(name, simulation.run(coming, seconds), gpus, part)

    units = {need.role: need.units for need in needed} or {
        role: unit.units for role, unit in config.units.items()
    }
    if arguments.scale:
        peak = {need.role: need.units for need in at_peak} or units
        step_s = next((need.step_s for need in needed if need.role == "decode"), None)
        scaled = run("scaled", _scaling(config, units, peak, step_s))
        mean = {role: max(1, round(scaled.outcome.mean_units(role))) for role in config.units}
        runs = [scaled, run("fixed", _fixed(config, mean))]
    else:
        runs = [run("fixed", _fixed(config, units))]
    if arguments.plot:
        plot([(r.name, r.outcome, r.gpus, r.part) for r in runs], arguments.plot)
    return report(runs, seconds, targets, arguments.price)


def report(runs: list[Run], seconds: float, targets: Targets, price: float | None) -> str:
    """price: of a GPU hour."""
    text = io.StringIO()
    console = Console(file=text, width=100, highlight=False)
    table = Table(title=f"Simulated: {seconds / 3600:g} h")
    table.add_column("")
    for run in runs:
        table.add_column(run.name, justify="right")
    for name, cells in _rows(runs, targets, price):
        table.add_row(name, *cells)
    console.print(table)
    part = runs[0].part
    if part > 1:
        console.print(f"Of {part} ranks of a unit one was simulated, with its share of the load.")
    return text.getvalue()


def _rows(
    runs: list[Run], targets: Targets, price: float | None
) -> Iterable[tuple[str, list[str]]]:
    outs = [run.outcome for run in runs]
    for role in outs[0].unit_s:
        yield f"{role} units, in the mean", [f"{o.mean_units(role):.2f}" for o in outs]
    yield "GPU hours", [f"{run.gpu_hours:,.1f}" for run in runs]
    if price is not None:
        yield "price", [f"{run.gpu_hours * price:,.2f}" for run in runs]
    yield "requests", [f"{o.requests:,}" for o in outs]
    yield "tokens/s out", [f"{run.tokens_s:,.0f}" for run in runs]
    yield (
        "tokens/s out of a decode GPU",
        [
            f"{run.tokens_s / run.gpus['decode'] / run.outcome.mean_units('decode'):,.0f}"
            for run in runs
        ],
    )
    for part in (50, 99):
        yield f"first token, p{part}", [f"{np.percentile(o.first_token, part):.2f} s" for o in outs]
    for part in (50, 99):
        yield (
            f"between tokens, p{part}",
            [f"{1e3 * _percentile(o.between_tokens, part):.1f} ms" for o in outs],
        )
    aim = f"over {targets.first_token_s:g} s or {targets.token_s * 1e3:g} ms"
    yield f"requests {aim}", [f"{o.violations.mean():.2%}" for o in outs]
    if any(o.deaths for o in outs):
        yield "units died / requests moved", [f"{o.deaths} / {o.moved:,}" for o in outs]
    for role in outs[0].unit_s:
        yield f"{role} steps limited by", [_shares(o.limited.get(role, {})) for o in outs]
        yield f"{role} prompts waited for", [_shares(o.held_up.get(role, {})) for o in outs]
    yield "preempted", [f"{o.preemptions:,}" for o in outs]


def _percentile(values: np.ndarray[tuple[int], np.dtype[np.float64]], part: float) -> float:
    return float(np.nanpercentile(values, part)) if not np.isnan(values).all() else 0.0


def _shares(counts: Mapping[str, float]) -> str:
    total = sum(counts.values())
    found = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {n / total:.0%}" for name, n in found if n > 0.02 * total) or "-"


def _part(config: Config, requests: float) -> int:
    """The least part of each unit that a run can be made of in time, or the least that there is."""
    ranks = [unit.attention_ranks for unit in config.units.values()]
    parts = [
        p
        for p in range(1, min(ranks) + 1)
        if all(r % p == 0 and (p == 1 or r // p >= FEWEST_RANKS) for r in ranks)
    ]
    return next((p for p in parts if requests / p <= MOST_REQUESTS), parts[-1])


def _fixed(config: Config, units: Mapping[Role, int]) -> Config:
    changes: dict[str, object] = {"autoscaling": AutoscalingSettings()}
    for role, count in units.items():
        changes[role] = config.units[role].model_copy(update={"units": count})
    return config.model_copy(update=changes)


def _scaling(
    config: Config, units: Mapping[Role, int], peak: Mapping[Role, int], step_s: float | None
) -> Config:
    """With a range for each role: the config's, or up to somewhat more than the peak needs.

    step_s: what steps of a decode unit should take, if the config says nothing.
    """
    settings, start = config.autoscaling, dict(units)
    changes: dict[str, object] = {}
    if step_s and "inter_token_s" not in settings.model_fields_set:
        changes["inter_token_s"] = step_s
    for role, count in units.items():
        most = max(count, math.ceil(ROOM * peak[role]))
        changes[role] = bounds = getattr(settings, role) or Range(least=1, most=most)
        start[role] = min(max(count, bounds.least), bounds.most)
    return _fixed(config, start).model_copy(
        update={"autoscaling": settings.model_copy(update=changes)}
    )


def _lines(path: Path) -> Iterable[str]:
    try:
        return path.read_text().splitlines()
    except OSError as error:
        raise ValueError(f"{path}: {error}") from None
