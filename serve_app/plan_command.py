"""`rayseek plan`: the GPUs that a load needs, units of a config at a time."""

from __future__ import annotations

import argparse
import io

from rich.console import Console
from rich.table import Table

from rayseek.cluster.capacity import Load, Need, Targets, needs
from rayseek.cluster.config import load_config
from rayseek.model.official import DEEPSEEK_V3


def plan(arguments: argparse.Namespace) -> str:
    """The table as text. Raises ValueError if the targets cannot be met."""
    load = Load(
        arguments.requests_per_second, arguments.prompt, arguments.output, arguments.cached,
        arguments.accepted,
    )  # fmt: skip
    targets = Targets(arguments.first_token, arguments.between_tokens / 1e3)
    found = needs(load_config(arguments.config), DEEPSEEK_V3, load, targets)
    return report(found, load, arguments.price)


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
    if price is not None:
        console.print(
            f"{gpus * price:,.2f} an hour, {gpus * price / out / 3600e-6:,.2f} per million."
        )
    console.print(
        "A bound of the best published kernels, times what published systems reach of it;\n"
        "nothing of Rayseek's own has been measured on a GPU."
    )
    return text.getvalue()
