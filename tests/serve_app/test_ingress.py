"""The ingress between its units and its queue, without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from rayseek.cluster.dispatch import RankAddress
from rayseek.cluster.spec import UnitRole
from rayseek.cluster.status import UnitStatus
from rayseek.serve_app.ingress import Ingress


class Service:
    load = (7, 12)  # at the engine, waiting
    slots: int | None = None

    def resize(self, slots: int) -> None:
        self.slots = slots


class Leaders:
    """What a deployment's leaders say, and what they were told."""

    def __init__(self, role: UnitRole, *places: int) -> None:
        self.role, self.places = role, places
        self.told: tuple[Any, ...] = ()

    async def statuses(self, *told: Any) -> list[UnitStatus]:
        self.told = told
        return [
            UnitStatus(f"u{i}", self.role, 1, (RankAddress(f"r{i}", ""),), (), (), 0, 0, n)
            for i, n in enumerate(self.places)
        ]


async def test_places_follow_the_units_that_serve() -> None:
    """However many the config named: autoscaled ones are filled, and lost ones not waited for."""
    ingress, service = Ingress.__new__(Ingress), Service()
    decode, prefill = Leaders("decode", 64, 64, 32), Leaders("prefill", 1000)
    ingress._rolls = [decode, prefill]  # type: ignore[list-item]
    ingress._statuses, ingress._name = [], "me"
    ingress._settings = SimpleNamespace(ingress_replicas=3)  # type: ignore[assignment]
    ingress._service = service  # type: ignore[assignment]
    ingress._engine = SimpleNamespace(moved=0)  # type: ignore[assignment]
    ingress._observer = SimpleNamespace(state=lambda *_: None)  # type: ignore[assignment]
    ranks = await ingress._discover()
    assert [rank.prefills for rank in ranks] == [False] * 3 + [True]
    assert service.slots == 54 and decode.told == ("me", 12)
    await ingress._discover()
    assert decode.told == ("me", 4), "all units together hear of each once"
    decode.places = (64,)
    await ingress._discover()
    assert service.slots == 22
    decode.places = ()
    await ingress._discover()
    assert service.slots == 22, "what comes back will have places"
