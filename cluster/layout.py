"""What a config starts, worked out without starting it: deployments, their bundles, every rank.

`layout(config, model)` is pure. A `Layout` has one `Deployment` for each Serve deployment:

- `Prefill`, `Decode`: a replica is a unit's leader, made with `unit`; attention rank i is a child
  actor in bundle `unit.bundles[i]` of the replica's placement group, with `rank_gpus` GPUs;
- `Experts`, if any role has dedicated experts: a replica has one expert rank, made with `rank`, in
  bundle 0. It joins whichever unit of `handles` wants it; `places` is what that amounts to;
- `Ingress`: no bundles, no ranks.

A unit's placement group has one bundle for each node, STRICT_SPREAD where there are several: Ray
puts a replica into bundle 0, so the leader's CPU is part of that one (a bundle of its own would
want a node of its own). `places` says of each rank where it is expected: Ray chooses the nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rayseek.cluster.config import Config, HardwareSettings, Role, UnitSettings
from rayseek.cluster.fit import room
from rayseek.cluster.placement import slots_per_holder
from rayseek.cluster.plan import Wanted
from rayseek.cluster.spec import RankSpec, UnitSpec
from rayseek.model.config import ModelConfig

UNIT_NAMES: dict[Role, str] = {"prefill": "Prefill", "decode": "Decode"}


@dataclass(frozen=True, slots=True)
class Place:
    """One rank. `of`, `unit`: the role of its unit, and which of them; `index`: among the unit's
    attention or expert ranks, spares last.

    node: nodes are numbered over the whole layout. device: of the node; None on a CPU.
    slots: experts of each MoE layer that it holds.
    """

    role: Literal["attention", "expert"]
    of: Role
    unit: int
    index: int
    node: int
    device: int | None
    slots: int
    spare: bool = False


@dataclass(frozen=True, slots=True)
class Deployment:
    """One Serve deployment; see the file's docstring.

    replica_cpus: of a replica itself. handles: deployments that it has to reach.
    """

    name: str
    replicas: int
    replica_cpus: float
    handles: tuple[str, ...] = ()
    bundles: tuple[Mapping[str, float], ...] = ()
    strategy: Literal["PACK", "STRICT_SPREAD"] = "PACK"
    rank_gpus: int = 0
    unit: UnitSpec | None = None
    rank: RankSpec | None = None
    places: tuple[Place, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """`nodes`: how many the ranks need, or 1 where a node takes any number."""

    deployments: tuple[Deployment, ...]
    nodes: int

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple(place for deployment in self.deployments for place in deployment.places)

    def __getitem__(self, name: str) -> Deployment:
        return {deployment.name: deployment for deployment in self.deployments}[name]


def layout(
    config: Config, model: ModelConfig, model_path: str = "", rank_host: str | None = None
) -> Layout:
    """All deployments of a config for this model.

    model_path: of the checkpoint, as ranks find it. rank_host: where ranks listen; None: on their
    node's address in the cluster.
    """
    hardware = config.hardware
    nodes = _Nodes(hardware)
    units: list[Deployment] = []
    experts: list[Place] = []
    for role, unit in config.units.items():
        slots = slots_per_holder(model.n_routed_experts, unit.holders, unit.redundant_experts)
        dedicated = unit.experts == "dedicated"
        rank = RankSpec(
            model_path=model_path,
            settings=config.engine_of(role),
            exchange=config.exchange,
            alone=unit.attention_ranks == 1 and not dedicated,
            dedicated=dedicated,
            host=rank_host,
            transfer=config.transfer,
            gpus=_gpus(config.hardware),
            streams=_streams(config, role),
        )
        places = tuple(
            Place("attention", role, number, index, node, device, 0 if dedicated else slots)
            for number in range(unit.units)
            for index, (node, device) in enumerate(nodes.take(unit.attention_ranks))
        )
        elastic = config.autoscaling.experts if role == "decode" else None
        most_experts = elastic.most if elastic else None
        units.append(_deployment(config, model, unit, rank, places, most_experts))
        experts += [
            Place("expert", role, number, index, *nodes.take(1)[0], 0 if spare else slots, spare)
            for number in range(unit.units)
            for index in range(unit.expert_ranks + unit.spares)
            for spare in [index >= unit.expert_ranks]
        ]
    leader_cpus, _ = _cpus(hardware)
    names = tuple(unit.name for unit in units)
    if experts:
        units.append(
            Deployment(
                "Experts", len(experts), leader_cpus,
                handles=tuple(UNIT_NAMES[r] for r, u in config.units.items() if u.expert_ranks),
                bundles=_bundles(hardware, [1]),
                rank_gpus=_gpus(hardware),
                rank=RankSpec(
                    model_path=model_path, settings=config.engine,
                    exchange=config.exchange, alone=False, dedicated=True, host=rank_host,
                    gpus=_gpus(hardware),
                ),
                places=tuple(experts),
            )
        )  # fmt: skip
    ingress = Deployment("Ingress", config.ingress.replicas, leader_cpus, handles=names)
    return Layout((*units, ingress), nodes.used)


def _deployment(
    config: Config,
    model: ModelConfig,
    unit: UnitSettings,
    rank: RankSpec,
    places: tuple[Place, ...],
    most_experts: int | None,
) -> Deployment:
    """The units of one role, whose attention ranks are `places`.

    most_experts: dedicated ones of a unit, where their number follows the load.
    """
    role, hardware = places[0].of, config.hardware
    # Every unit of a role lies on its nodes in the same way.
    bundle_of = tuple(p.node - places[0].node for p in places if p.unit == 0)
    counts = [bundle_of.count(bundle) for bundle in range(max(bundle_of) + 1)]
    wanted = Wanted(
        attention=unit.attention_ranks,
        experts=most_experts or unit.expert_ranks,
        redundant=unit.redundant_experts,
        num_experts=model.n_routed_experts,
        groups=model.n_group,
        layers=tuple(range(model.first_k_dense_replace, model.stored_layers)),
        least_experts=unit.expert_ranks if most_experts else None,
        room=room(config, model, role),
    )
    return Deployment(
        UNIT_NAMES[role], unit.units, _cpus(hardware)[0],
        bundles=_bundles(hardware, counts),
        strategy="STRICT_SPREAD" if len(counts) > 1 else "PACK",
        rank_gpus=_gpus(hardware),
        unit=UnitSpec(role, wanted, rank, bundle_of, unit.spares),
        rank=rank,
        places=places,
    )  # fmt: skip


def _streams(config: Config, role: Role) -> int:
    """That a rank may have: of every ingress and, if it computes prompts, of every rank that
    decodes; twice, since those that are being replaced are still there, and some to spare."""
    widest = config.autoscaling.widest("decode")
    decode = widest.most if widest else config.decode.units
    fetchers = decode * config.decode.attention_ranks if role == "prefill" else 0
    return 2 * (config.ingress.replicas + fetchers) + 16


def _bundles(hardware: HardwareSettings, ranks: Sequence[int]) -> tuple[Mapping[str, float], ...]:
    """For so many ranks on each node, with the leader on the first."""
    leader_cpus, cpus = _cpus(hardware)
    bundles = [
        {"CPU": count * cpus} | ({"GPU": float(count)} if _gpus(hardware) else {})
        for count in ranks
    ]
    bundles[0]["CPU"] += leader_cpus
    return tuple(bundles)


def _cpus(hardware: HardwareSettings) -> tuple[float, float]:
    """Of a replica, and beside each rank. Ranks of a laptop share its cores."""
    return (1.0, 8.0) if _gpus(hardware) else (0.1, 0.5)


def _gpus(hardware: HardwareSettings) -> int:
    return int(hardware.accelerator != "cpu")


class _Nodes:
    """Hands out the ranks of one node after another."""

    def __init__(self, hardware: HardwareSettings) -> None:
        self._per_node, self._devices = hardware.ranks_per_node, _gpus(hardware)
        self._next = 0  # rank, counted over all nodes

    @property
    def used(self) -> int:
        return 1 if self._per_node is None else -(-self._next // self._per_node)

    def take(self, ranks: int) -> list[tuple[int, int | None]]:
        """(node, device) of `ranks` ranks: on one node, or on whole nodes of their own."""
        per_node = self._per_node
        if per_node is None:
            return [(0, None)] * ranks
        if self._next % per_node + ranks > per_node:
            self._next += -self._next % per_node
        taken = range(self._next, self._next + ranks)
        self._next += ranks
        return [(n // per_node, n % per_node if self._devices else None) for n in taken]
