"""`rayseek config`: does a config fit, what would it start, and the file that deploys it."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable
from itertools import groupby

import yaml
from rich.console import Console
from rich.table import Table

from rayseek.cluster.config import Config
from rayseek.cluster.fit import GIB, RankMemory, bearable_deaths, problems, rank_memories
from rayseek.cluster.layout import Deployment, Layout, layout
from rayseek.model.config import ModelConfig
from rayseek.model.shipped import SHIPPED
from rayseek.serve_app.keys import read_keys, undivided
from rayseek.serve_app.start import configured, key_file, served_model

WIDTH = 100


def check(arguments: argparse.Namespace) -> bool:
    """Print what the config needs and starts; whether it can work."""
    config = configured(arguments)
    name, model = _model(config, arguments.spec)
    print(report(config, model, name))
    found = problems(config, model)
    for problem in found:
        print(f"- {problem}")
    file = key_file(config)
    if file is not None and file.exists():
        for loose in undivided(read_keys(file), config.ingress.replicas):
            print(f"Note: {loose}.")
    if not found:
        print(f"{arguments.config} fits.")
    return not found


def render(arguments: argparse.Namespace) -> str:
    """The Serve config file for `serve deploy`. Raises ValueError if it could not work."""
    from rayseek.serve_app.application import serve_config
    from rayseek.serve_app.local import cluster_environment

    config = configured(arguments)
    text = yaml.safe_dump(serve_config(config), sort_keys=False)
    environment = "".join(f"#   {k}={v}\n" for k, v in cluster_environment(config).items())
    return f"# Every Ray process of the cluster needs, from before it starts:\n{environment}{text}"


def _model(config: Config, spec: str | None) -> tuple[str, ModelConfig]:
    """The model that is planned for, and what to call it."""
    if spec == "671b":
        from rayseek.model.official import DEEPSEEK_V3

        return "DeepSeek-V3 671B", DEEPSEEK_V3
    path = SHIPPED if spec == "small" else served_model(config)
    if not path.exists():
        raise ValueError(f"{path}: no such checkpoint; --spec 671b checks without one")
    name = "the small model" if path == SHIPPED else str(path)
    return name, ModelConfig.from_pretrained(path)


def report(config: Config, model: ModelConfig, name: str) -> str:
    """Memory, deployments and ranks as text, 100 columns wide."""
    text = io.StringIO()
    console = Console(file=text, width=WIDTH, highlight=False)
    plan = layout(config, model)
    console.print(f"Memory of each rank with {name}")
    console.print(_memory_table(rank_memories(config, model)))
    for role in config.units:
        if (deaths := bearable_deaths(config, model, role)) is not None:
            console.print(f"{role}: {_after_deaths(deaths, config.units[role].holders)}")
    console.print("Serve deployments")
    console.print(_deployment_table(plan))
    console.print(f"Ranks, on {plan.nodes} node{'s' * (plan.nodes > 1)}")
    console.print(_rank_table(plan))
    return text.getvalue()


def _after_deaths(deaths: int, holders: int) -> str:
    if deaths:
        return f"up to {deaths} of {holders} ranks may be dead, and the others hold all experts"
    return "a dead rank's experts fit into no others' memory: the unit waits for its successor"


def _memory_table(memories: Iterable[RankMemory]) -> Table:
    table = Table()
    table.add_column("part")
    columns = list(memories)
    for memory in columns:
        table.add_column(f"{memory.of} {memory.role}", justify="right")
    for part in dict.fromkeys(part for memory in columns for part in memory.parts):
        table.add_row(part, *(_size(memory.parts.get(part, 0)) for memory in columns))
    table.add_section()
    table.add_row("all", *(_size(memory.total) for memory in columns))
    table.add_row("there is", *(_size(memory.limit) or "?" for memory in columns))
    table.add_row("tokens of KV", *(f"{m.tokens:,}" if m.tokens else "" for m in columns))
    return table


def _size(count: int | None) -> str:
    if not count:
        return ""
    return f"{count / GIB:.2f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.2f} MiB"


def _deployment_table(plan: Layout) -> Table:
    table = Table()
    for column in ("deployment", "replicas", "bundles of a replica", "strategy", "arguments"):
        table.add_column(column)
    for deployment in plan.deployments:
        bundles = [
            f"{len(list(same))} x {', '.join(f'{k} {v:g}' for k, v in bundle.items())}"
            for bundle, same in groupby(deployment.bundles)
        ] or [f"CPU {deployment.replica_cpus:g}"]
        table.add_row(
            deployment.name, str(deployment.replicas), "\n".join(bundles),
            deployment.strategy if deployment.bundles else "", _arguments(deployment),
        )  # fmt: skip
    return table


def _arguments(deployment: Deployment) -> str:
    if deployment.unit is None:
        return f"to {', '.join(deployment.handles)}"
    wanted = deployment.unit.wanted
    experts = f"{wanted.experts} expert ranks" if wanted.experts else "experts there"
    redundant = f", {wanted.redundant} redundant" if wanted.redundant else ""
    return f"{wanted.attention} attention rank{'s' * (wanted.attention > 1)}, {experts}{redundant}"


def _rank_table(plan: Layout) -> Table:
    table = Table()
    for column in ("unit", "role", "ranks", "node", "devices", "expert slots a layer"):
        table.add_column(column)
    for key, same in groupby(
        plan.places, key=lambda p: (p.of, p.unit, p.role, p.node, p.slots, p.spare)
    ):
        of, unit, role, node, slots, spare = key
        places = list(same)
        devices = _span([p.device for p in places if p.device is not None])
        table.add_row(
            f"{of} {unit}", role, _span([p.index for p in places]), str(node), devices or "CPU",
            "spare" if spare else str(slots or ""),
        )  # fmt: skip
    return table


def _span(numbers: list[int]) -> str:
    """Consecutive numbers, as 0-7."""
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    return f"{numbers[0]}-{numbers[-1]}"
