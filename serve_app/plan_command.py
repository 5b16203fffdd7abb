"""`rayseek plan`: the GPUs that a load needs, units of a config at a time; with --simulate, what
happens to them over hours."""

from __future__ import annotations

import argparse
import io
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from rayseek.cluster.capacity import Load, Need, Targets, needs
from rayseek.cluster.config import Role, load_config
from rayseek.cluster.simulation import rooflines
from rayseek.cluster.step_times import StepTimes
from rayseek.model.official import DEEPSEEK_V3
from rayseek.serve_app.fit_command import fit, without_drafts
from rayseek.serve_app.simulate_command import simulate

WHAT_IT_IS = """A bound of the best published kernels, times what published systems reach of it;
nothing of Rayseek's own has been measured on a GPU.
"""


def plan(arguments: argparse.Namespace) -> str:
    """The tables as text. Raises ValueError if the targets cannot be met."""
    config = load_config(arguments.config)
    load = Load(
        arguments.requests_per_second or 0.0, arguments.prompt, arguments.output,
        arguments.cached, arguments.accepted,
    )  # fmt: skip
    targets = Targets(arguments.first_token, arguments.between_tokens / 1e3)
    needed: list[Need] = []
    at_peak: list[Need] = []
    times: dict[Role, StepTimes] = {}
    shown = ""
    if arguments.fit:
        config = without_drafts(config)
        shown, measured, model = fit(arguments.fit, config, arguments.hold_out)
        if not arguments.simulate:
            return shown
        times = dict.fromkeys(config.units, measured)
    else:
        model = DEEPSEEK_V3
        if load.requests_s:
            needed = needs(config, model, load, targets)
            busiest = replace(load, requests_s=load.requests_s * arguments.peak)
            at_peak = needs(config, model, busiest, targets)
            shown = report(needed, load, arguments.price)
        times = rooflines(config, model)
    if not load.requests_s and not arguments.trace:
        raise ValueError("say how much comes: --requests-per-second, or --simulate with --trace")
    if arguments.simulate:
        shown += simulate(
            arguments, config, model, times, load, targets, _by_role(needed), _by_role(at_peak)
        )
    return shown + ("" if arguments.fit else WHAT_IT_IS)


def _by_role(found: list[Need]) -> list[Need]:
    """One for each kind of unit; units that compute prompts too are counted once."""
    return [need for need in found if need.gpus]


def report(found: list[Need], load: Load, price: float | None) -> str:
    """price: of a GPU hour."""
    text = io.StringIO()
    console = Console(file=text, width=100, highlight=False)
    table = Table()
    for column in ("", "units", "GPUs", "busy", "tokens/s a GPU", "rows", "latency", "limited by"):
        table.add_column(column, justify="right" if column else "left")
    names = {"prefill": "prompts", "decode": "tokens"}
    for need in found:
        latency = (
            f"first after {need.seconds:.2f} s" if need.role == "prefill"
            else f"{need.seconds * 1e3:.0f} ms between"
        )  # fmt: skip
        table.add_row(
            names[need.role], str(need.units), str(need.gpus or "the same"), f"{need.busy:.0%}",
            f"{need.tokens_s:,.0f}", str(need.batch), latency, need.limit,
        )  # fmt: skip
    console.print(table)
    gpus = sum(need.gpus for need in found)
    out = load.requests_s * load.output
    console.print(f"{gpus} GPUs for {out:,.0f} tokens/s out, {load.requests_s:g} requests/s.")
    step = f"{found[-1].step_s:.3f} s"
    console.print(f"Steps of a decode unit as full as may be: {step} (autoscaling.inter_token_s).")
    if price is not None:
        console.print(
            f"{gpus * price:,.2f} an hour, {gpus * price / out / 3600e-6:,.2f} per million."
        )
    return text.getvalue()
