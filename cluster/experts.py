"""A replica of `Experts`: one expert rank, looking for a unit that wants it.

The replica is thin; the rank is its child process, so that loading and computing never block
Serve. Once attached, the unit's leader tells the rank what to hold. A replica that is to stop asks
its unit to go on without it first; one that dies is noticed by the unit like any death.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayseek.cluster.logs import start_logging
from rayseek.cluster.rank import ExpertRank, Started
from rayseek.cluster.spec import RankSpec
from rayseek.cluster.status import statuses
from rayseek.cluster.unit import rank_options

log = logging.getLogger("rayseek.experts")

LOOK_S = 0.5
ASK_S = 5.0
LEAVE_S = 25.0  # less than what Serve grants a replica that stops
BUNDLE = 0


class Experts:
    """Deployment class of `Experts`. units: handles of the deployments whose units may want it."""

    def __init__(self, spec: RankSpec, *units: Any) -> None:
        start_logging("experts")
        self._spec, self._units = spec, units
        self._numbers = itertools.count()
        self._bound: tuple[Any, str] | None = None  # the deployment, and our name there
        self._leaving = False
        self._keeper = asyncio.create_task(self._keep())

    async def check_health(self) -> None:
        """Serve's health check."""
        if self._keeper.done():
            self._keeper.result()

    async def __del__(self) -> None:
        """Serve's way of saying goodbye: leave before the process ends."""
        self._leaving = True  # and offer the rank to nobody
        if self._bound is not None:
            deployment, name = self._bound
            with contextlib.suppress(Exception):
                await deployment.broadcast("detach", name).results_async(timeout_s=LEAVE_S)
        self._keeper.cancel()

    async def _keep(self) -> None:
        """Run an expert rank for ever, and see that a unit has it."""
        while True:
            name = f"experts-{ray.get_runtime_context().get_actor_id()[:8]}-{next(self._numbers)}"
            actor = self._spawn(name)
            try:
                async with asyncio.timeout(self._spec.settings.load_timeout_s):
                    started = await actor.start.remote()
                death = asyncio.ensure_future(_awaited(actor.run_forever.remote()))
                while not death.done():
                    await self._see_to_it(actor, started)
                    await asyncio.wait([death], timeout=LOOK_S)
                death.result()
            except (ray.exceptions.RayError, TimeoutError) as error:
                log.error("%s is lost: %s", name, str(error).strip().rpartition("\n")[2])
                await asyncio.sleep(LOOK_S)
            finally:
                with contextlib.suppress(Exception):
                    ray.kill(actor)

    def _spawn(self, name: str) -> Any:
        group = ray.util.get_current_placement_group()
        options = rank_options(self._spec)
        if group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=BUNDLE
            )
        return ray.remote(ExpertRank).options(**options).remote(name, self._spec)

    async def _see_to_it(self, actor: Any, started: Started) -> None:
        """Offer the rank to the unit that misses most, unless some unit has it."""
        if self._leaving:
            return
        self._bound = None
        wants: list[tuple[int, Any, str]] = []
        for deployment in self._units:
            for status in await statuses(deployment):
                if started.member.name in status.expert_ranks:
                    self._bound = (deployment, started.member.name)
                    return
                wants.append((status.experts_missing, deployment, status.unit))
        if not wants:
            return
        missing, deployment, unit = max(wants, key=lambda w: w[0])
        if missing > 0:
            with contextlib.suppress(Exception):  # it may have gone; the next look finds another
                await deployment.broadcast("attach", unit, actor, started).results_async(
                    timeout_s=ASK_S
                )


async def _awaited(reference: Any) -> Any:
    return await reference
