"""Asking the leaders of a deployment: each for itself, and what a silent one said last."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from rayseek.cluster.dispatch import RankAddress
from rayseek.cluster.status import Roll, UnitStatus, ask


def status(unit: str, epoch: int = 1) -> UnitStatus:
    rank = RankAddress(f"{unit}-rank", "host:1")
    return UnitStatus(unit, "decode", epoch, (rank,), (), (), 2, 0)


@dataclass
class Call:
    """A call to a replica, as Serve keeps it. answer: None: it hangs."""

    answer: Any
    cancelled: bool = False

    async def get_async(self) -> Any:
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Deployment:
    """A handle, with what each replica answers."""

    answers: list[Any]
    calls: list[Call] = field(default_factory=list)

    def broadcast(self, what: str, *arguments: Any) -> Deployment:
        if not self.answers:
            raise RuntimeError("there are no replicas")
        self.calls = [Call(answer) for answer in self.answers]
        return self

    async def _fetch_replica_results_async(self) -> list[Call]:
        return self.calls


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "__kwdefaults__", {"limit_s": 0.05})


async def test_a_leader_that_hangs_hides_nobody() -> None:
    units = Deployment([status("a"), status("b")])
    roll = Roll(units)
    assert await roll.statuses() == [status("a"), status("b")]
    units.answers = [None, status("b", epoch=2)]
    found = {s.unit: s for s in await roll.statuses()}
    assert [call.cancelled for call in units.calls] == [True, False]
    assert found["b"] == status("b", epoch=2)
    assert found["a"].ranks == status("a").ranks, "its ranks serve without it"
    assert "a: its leader does not answer" in found["a"].problems[0]
    assert found["a"].experts_missing == 0, "it can take nobody in"
    units.answers = [status("b", epoch=2)]  # Serve has ended it
    assert [s.unit for s in await roll.statuses()] == ["b"]


async def test_a_leader_that_hangs_from_the_start_is_nobody() -> None:
    assert await Roll(Deployment([None])).statuses() == []


@pytest.mark.parametrize("gone", [[ActorDiedError()], []], ids=["died", "no replica"])
async def test_the_dead_are_forgotten(gone: list[Any]) -> None:
    units = Deployment([status("a")])
    roll = Roll(units)
    await roll.statuses()
    units.answers = gone
    assert await roll.statuses() == []


async def test_a_leader_that_fails_to_answer_is_not_dead() -> None:
    units = Deployment([status("a")])
    roll = Roll(units)
    await roll.statuses()
    units.answers = [ValueError("a defect")]
    assert [s.unit for s in await roll.statuses()] == ["a"]
