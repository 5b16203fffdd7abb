"""The leader of one unit: a Serve replica that owns the unit's attention ranks.

Ranks are plain child actors in the replica's own placement group: they live and die with it, and
a rank that dies is replaced in place while the leader and the other ranks go on. Tokens never
pass through here; ingresses ask for the ranks' addresses and talk to them directly.
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

from rayseek.cluster.config import EngineSettings
from rayseek.cluster.dispatch import RankAddress
from rayseek.cluster.rank import Rank

log = logging.getLogger("rayseek.unit")

PULSE_S = 1.0
PULSE_TIMEOUT_S = 10.0
RANK_ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Unit:
    """Deployment class of `Decode`. Bundle 0 holds the leader, bundle i + 1 its rank i."""

    def __init__(
        self, model_path: str, settings: EngineSettings, host: str | None = None, ranks: int = 1
    ) -> None:
        self._model_path = model_path
        self._settings = settings
        self._epoch = itertools.count()
        self._addresses: dict[int, RankAddress] = {}
        self._host = host or ray.util.get_node_ip_address()
        self._keepers = [asyncio.create_task(self._keep(i)) for i in range(ranks)]

    async def ranks(self) -> list[RankAddress]:
        """The ranks that serve right now."""
        return list(self._addresses.values())

    async def check_health(self) -> None:
        """Serve's health check: the leader is fine as long as it looks after its ranks."""
        for keeper in self._keepers:
            if keeper.done():
                keeper.result()

    async def _keep(self, index: int) -> None:
        """Run rank `index` for ever: start it, watch it, start its successor."""
        pause = 0.0
        while True:
            await asyncio.sleep(pause)
            name = f"{ray.get_runtime_context().get_actor_id()[:8]}-r{index}e{next(self._epoch)}"
            actor = self._spawn(index, name)
            try:
                await self._watch(index, name, actor)
            except ray.exceptions.RayError as error:
                log.error("rank %s died: %s", name, str(error).strip().rpartition("\n")[2])
                pause = 0.0 if index in self._addresses else 5.0  # it died before it ever served
            except TimeoutError as error:
                log.error("rank %s hangs (%s); killing it", name, str(error) or "no answer in time")
                pause = 0.0
            finally:
                self._addresses.pop(index, None)
                with contextlib.suppress(Exception):
                    ray.kill(actor)

    def _spawn(self, index: int, name: str) -> Any:
        group = ray.util.get_current_placement_group()
        options: dict[str, Any] = {"num_cpus": 0, "runtime_env": {"env_vars": RANK_ENV}}
        if group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=index + 1
            )
        actor = ray.remote(Rank).options(**options)
        return actor.remote(name, self._model_path, self._settings)

    async def _watch(self, index: int, name: str, actor: Any) -> None:
        """Return never: raise RayError when the rank dies, TimeoutError when it hangs."""
        async with asyncio.timeout(self._settings.load_timeout_s):
            address = await actor.start.remote(self._host)
        self._addresses[index] = address
        log.info("rank %s serves at %s", name, address.target)
        death = asyncio.ensure_future(_awaited(actor.run_forever.remote()))
        try:
            while True:
                await asyncio.wait([death], timeout=PULSE_S)
                if death.done():
                    death.result()
                async with asyncio.timeout(PULSE_TIMEOUT_S):
                    pulse = await actor.pulse.remote()
                if pulse.stalled_s > self._settings.step_timeout_s:
                    raise TimeoutError(f"its step has been running for {pulse.stalled_s:.0f} s")
        finally:
            death.cancel()


async def _awaited(reference: Any) -> Any:
    return await reference
