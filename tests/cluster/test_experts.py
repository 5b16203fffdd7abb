"""What a replica of `Experts` does with its rank: leave it where it is, free it, offer it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rayseek.cluster import experts
from rayseek.cluster.config import ExchangeSettings
from rayseek.cluster.plan import Member
from rayseek.cluster.rank import Started
from rayseek.cluster.status import UnitStatus

STARTED = Started(Member("e", "expert", "n", ""), None, "", ExchangeSettings())


def unit(name: str, missing: int, *ranks: str) -> UnitStatus:
    return UnitStatus(name, "decode", 1, (), (), ranks, missing, 0)


class Rank:
    """An expert rank's handle. unit: that has it; doubts: whether that one may be gone."""

    def __init__(self, unit: str | None, doubts: bool) -> None:
        self.asked: list[str] = []
        self._unit, self._doubts = unit, doubts

    def __getattr__(self, what: str) -> Any:
        async def remote(*arguments: str) -> Any:
            self.asked.append(" ".join((what, *arguments)))
            return {"works_for": self._unit, "doubts": self._doubts}.get(what)

        return SimpleNamespace(remote=remote)


@pytest.mark.parametrize(
    ("bond", "doubts", "units", "done"),
    [
        ("old", False, [unit("new", 2)], []),
        ("old", True, [unit("old", 0, "e"), unit("new", 2)], []),  # its leader is only slow
        ("old", True, [unit("new", 0)], []),  # nobody wants it
        ("old", True, [unit("new", 1), unit("newer", 2)], ["part old", "attach newer"]),
        (None, False, [unit("new", 1)], ["attach new"]),
        (None, False, [unit("new", 0)], []),
    ],
)
async def test_a_rank_is_freed_and_offered_when_its_unit_is_gone(
    monkeypatch: pytest.MonkeyPatch,
    bond: str | None,
    doubts: bool,
    units: list[UnitStatus],
    done: list[str],
) -> None:
    async def statuses() -> list[UnitStatus]:
        return units

    async def ask(_: Any, what: str, to: str, *__: Any, limit_s: float) -> None:
        rank.asked.append(f"{what} {to}")

    rank = Rank(bond, doubts)
    replica = object.__new__(experts.Experts)
    replica._rolls = [SimpleNamespace(units=None, statuses=statuses)]  # type: ignore[list-item]
    monkeypatch.setattr(experts, "ask", ask)
    monkeypatch.setattr(experts.Experts, "__del__", lambda _: None)  # it has no keeper
    await replica._see_to_it(rank, STARTED)
    assert [a for a in rank.asked if a not in ("works_for", "doubts")] == done
