"""What the actors of a unit are told when they are made: plain data, built from the config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rayseek.cluster.config import EngineSettings, ExchangeSettings, TransferSettings
from rayseek.cluster.plan import Wanted

UnitRole = Literal["decode", "prefill"]


@dataclass(frozen=True, slots=True)
class RankSpec:
    """One process of a unit, whatever its role.

    alone: the unit is this rank only; it computes its experts itself and agrees with nobody.
    dedicated: the experts are on expert ranks, attention ranks hold none.
    host: where ranks listen; None: on their node's address in the cluster. node: which node of
    the cluster it runs on, for traffic between nodes; None: as Ray knows it. gpus: of its own.
    streams: of ingresses and other ranks, at most.
    """

    model_path: str
    settings: EngineSettings
    exchange: ExchangeSettings
    alone: bool
    dedicated: bool
    host: str | None = None
    node: str | None = None
    gpus: int = 0
    transfer: TransferSettings = TransferSettings()
    streams: int = 64


@dataclass(frozen=True, slots=True)
class UnitSpec:
    """A unit as its leader makes it. bundles: of the placement group, for each attention rank.

    spares: expert ranks beyond those wanted that may be attached, to take a dead one's place.
    """

    role: UnitRole
    wanted: Wanted
    rank: RankSpec
    bundles: tuple[int, ...]
    spares: int = 0
