"""A replica of `Experts`: one expert rank, looking for a unit that wants it.

The replica is thin; the rank is its child process, so that loading and computing never block
Serve. The rank knows which unit has it, so the replica asks it, and offers it only if it is free.
Once attached, the unit's leader tells the rank what to hold. A replica that is to stop asks its
unit to go on without it first; one that dies is noticed by the unit like any death.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from typing import Any

import ray
import ray.exceptions

from rayseek.cluster.crew import last_line, spawn, start
from rayseek.cluster.logs import start_logging
from rayseek.cluster.rank import ExpertRank, Started
from rayseek.cluster.spec import RankSpec
from rayseek.cluster.status import Roll, ask

log = logging.getLogger("rayseek.experts")

LOOK_S = 0.5
ATTACH_S = 5.0  # for the unit to take the rank in
HUNG_S = 10.0  # for the rank to answer; if a unit has it, that one's leader is quicker to notice
LEAVE_S = 25.0  # less than what Serve grants a replica that stops
BUNDLE = 0


class Experts:
    """Deployment class of `Experts`. units: handles of the deployments whose units may want it."""

    def __init__(self, spec: RankSpec, *units: Any) -> None:
        start_logging("experts")
        self._spec, self._rolls = spec, [Roll(deployment) for deployment in units]
        self._numbers = itertools.count()
        self._name = ""  # of the rank
        self._leaving = False
        self._keeper = asyncio.create_task(self._keep())

    async def check_health(self) -> None:
        """Serve's health check."""
        if self._keeper.done():
            self._keeper.result()

    async def __del__(self) -> None:
        """Serve's way of saying goodbye: leave before the process ends."""
        self._leaving = True  # and offer the rank to nobody
        await asyncio.gather(
            *(ask(roll.units, "detach", self._name, limit_s=LEAVE_S) for roll in self._rolls)
        )
        self._keeper.cancel()

    async def _keep(self) -> None:
        """Run an expert rank for ever, and see that a unit has it."""
        while True:
            name = f"experts-{ray.get_runtime_context().get_actor_id()[:8]}-{next(self._numbers)}"
            self._name = name
            actor = spawn(ExpertRank, name, self._spec, BUNDLE)
            try:
                started = await start(actor, self._spec.settings.load_timeout_s)
                death = asyncio.ensure_future(actor.run_forever.remote())
                while not death.done():
                    if not self._leaving:
                        await self._see_to_it(actor, started)
                    await asyncio.wait([death], timeout=LOOK_S)
                death.result()
            except (ray.exceptions.RayError, TimeoutError) as error:
                log.error("%s is lost: %s", name, last_line(error))
                await asyncio.sleep(LOOK_S)
            finally:
                with contextlib.suppress(Exception):
                    ray.kill(actor)

    async def _see_to_it(self, actor: Any, started: Started) -> None:
        """Offer the rank to the unit that misses most, unless some unit has it.

        Raises TimeoutError if the rank hangs.
        """
        async with asyncio.timeout(HUNG_S):
            unit = await actor.works_for.remote()
            if unit is not None and not await actor.doubts.remote():
                return
        known = [(await roll.statuses(), index) for index, roll in enumerate(self._rolls)]
        if any(started.member.name in s.expert_ranks for statuses, _ in known for s in statuses):
            return  # the leader that has it is only slow
        wants = [(s.experts_missing, index, s.unit) for statuses, index in known for s in statuses]
        missing, index, wanting = max(wants, default=(0, 0, ""))
        if missing <= 0:  # a later look finds somebody
            return
        async with asyncio.timeout(HUNG_S):
            if unit is not None:
                await actor.part.remote(unit)
        deployment = self._rolls[index].units
        await ask(deployment, "attach", wanting, actor, started, limit_s=ATTACH_S)
