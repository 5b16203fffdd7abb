"""What a unit's leader tells about it, and how to ask all leaders of a deployment. No Ray inside:
the command that starts Ray reads this before it does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rayseek.cluster.dispatch import RankAddress
from rayseek.cluster.spec import UnitRole
from rayseek.cluster.unit_report import UnitView

log = logging.getLogger("rayseek.status")

ANSWER_S = 1.0  # a leader has nothing else to do; its ranks go on without it meanwhile


@dataclass(frozen=True, slots=True)
class UnitStatus:
    """For ingresses, the Experts replicas and people. experts_missing: it would take so many.
    places: sequences that the ranks which serve run at once."""

    unit: str
    role: UnitRole
    epoch: int
    ranks: tuple[RankAddress, ...]  # attention ranks that serve
    problems: tuple[str, ...]
    expert_ranks: tuple[str, ...]
    experts_missing: int
    deaths: int
    places: int = 0


@dataclass(frozen=True, slots=True)
class Heard:
    """answers: of those who gave one. silent: how many others run and gave none in time."""

    answers: tuple[Any, ...] = ()
    silent: int = 0


class Roll:
    """Asks the units behind a deployment's handle, again and again, and remembers.

    A leader that hangs hides nobody, not even its own unit: while it is silent its last word
    counts, since its ranks serve without it. When Serve ends it, its ranks end with it.
    """

    def __init__(self, units: Any) -> None:
        self.units = units
        self._known: dict[str, UnitStatus] = {}

    async def statuses(self, *told: Any) -> list[UnitStatus]:
        """Of every unit: as it says now, or said last. told: what Unit.status is to know."""
        heard = await ask(self.units, "status", *told)
        said = [answer for answer in heard.answers if isinstance(answer, UnitStatus)]
        self._known = remembered(self._known, said, heard.silent)
        return list(self._known.values())


def remembered(
    known: Mapping[str, UnitStatus], said: Iterable[UnitStatus], silent: int
) -> dict[str, UnitStatus]:
    """What is known after a round. `known` units that said nothing are gone, unless somebody is
    silent: then it may be them. They take no expert ranks."""
    now = {status.unit: status for status in said}
    if not silent:
        return now
    return now | {
        name: replace(
            status,
            problems=(f"{name}: its leader does not answer; its ranks go on as they were",),
            experts_missing=0,
        )
        for name, status in known.items()
        if name not in now
    }


async def views(units: Any) -> list[UnitView]:
    """What every unit that answers tells the cluster page."""
    heard = await ask(units, "view")
    return [answer for answer in heard.answers if isinstance(answer, UnitView)]


async def ask(units: Any, what: str, *arguments: Any, limit_s: float = ANSWER_S) -> Heard:
    """Call a method of every replica behind a deployment's handle, each under its own limit."""
    from ray.exceptions import RayActorError

    try:
        async with asyncio.timeout(limit_s):
            # Serve's public `results_async` gives all answers or none.
            calls = await units.broadcast(what, *arguments)._fetch_replica_results_async()
    except Exception as error:  # there is no replica yet, or Serve's controller recovers
        log.info("no unit answers: %s", error)
        return Heard()
    outcomes = await asyncio.gather(*(_outcome(call, limit_s) for call in calls))
    for outcome in outcomes:
        if isinstance(outcome, Exception) and not isinstance(outcome, TimeoutError):
            log.info("asked for %s, a replica fails: %s", what, outcome)
    return Heard(
        tuple(outcome for outcome in outcomes if not isinstance(outcome, Exception)),
        sum(
            isinstance(outcome, Exception) and not isinstance(outcome, RayActorError)
            for outcome in outcomes
        ),
    )


async def _outcome(call: Any, limit_s: float) -> Any:
    """What a replica answers, or an exception."""
    try:
        async with asyncio.timeout(limit_s):
            return await call.get_async()
    except TimeoutError as late:
        call.cancel()  # else a replica that hangs would collect them
        return late
    except Exception as error:
        return error
