"""What a unit's leader tells about it, and how to ask all leaders of a deployment. No Ray inside:
the command that starts Ray reads this before it does."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from rayseek.cluster.dispatch import RankAddress
from rayseek.cluster.spec import UnitRole
from rayseek.cluster.unit_report import UnitView

log = logging.getLogger("rayseek.status")

ASK_S = 5.0


@dataclass(frozen=True, slots=True)
class UnitStatus:
    """For ingresses, the Experts replicas and people. experts_missing: it would take so many."""

    unit: str
    role: UnitRole
    epoch: int
    ranks: tuple[RankAddress, ...]  # attention ranks that serve
    problems: tuple[str, ...]
    expert_ranks: tuple[str, ...]
    experts_missing: int
    deaths: int


async def statuses(units: Any) -> list[UnitStatus]:
    """Of every unit behind a deployment's handle; those that do not answer in time are left out."""
    return [answer for answer in await _ask(units, "status") if isinstance(answer, UnitStatus)]


async def views(units: Any) -> list[UnitView]:
    """The same for the cluster page."""
    return [answer for answer in await _ask(units, "view") if isinstance(answer, UnitView)]


async def _ask(units: Any, what: str) -> list[Any]:
    try:
        answers: list[Any] = await units.broadcast(what).results_async(
            timeout_s=ASK_S, return_exceptions=True
        )
    except Exception as error:  # there is no replica yet, or Serve's controller recovers
        log.info("no unit answers: %s", error)
        return []
    return answers
