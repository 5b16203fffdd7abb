"""The leader of one unit: a Serve replica that keeps the unit's processes together.

Attention ranks are plain child actors in the replica's own placement group; expert ranks belong to
the replicas of `Experts` and are attached by them. Whoever dies or hangs is replaced, and every
change of the company becomes a new plan (`plan_keeper.py`). Tokens never pass through here;
ingresses ask for the ranks' addresses and talk to them directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from functools import partial
from typing import Any

import ray
import ray.exceptions

from rayseek.cluster.crew import SILENT_S, STARTED_LATER_S, Crew, last_line, spawn, start
from rayseek.cluster.expert_load import ExpertLoad
from rayseek.cluster.logs import start_logging
from rayseek.cluster.metrics import UNIT, Meter, RayMeter
from rayseek.cluster.placement import ExpertPlacement
from rayseek.cluster.plan import (
    LATER_S,
    Pulse,
    Wanted,
    culprits,
    next_look,
)
from rayseek.cluster.plan_keeper import PlanKeeper
from rayseek.cluster.rank import Elsewhere, Rank, Started
from rayseek.cluster.spec import UnitSpec
from rayseek.cluster.status import UnitStatus
from rayseek.cluster.unit_report import UnitReport, UnitState, UnitView

log = logging.getLogger("rayseek.unit")

PULSE_S = 1.0
ENGAGE_S = 2.0  # for an expert rank to say that it is free
FINISH_S = 20.0  # for the requests on board when the unit is to stop; less than Serve's grace
RETIRE_S = 2.0


class Unit:
    """Deployment class of `Decode` and `Prefill`."""

    def __init__(self, spec: UnitSpec, name: str | None = None, meter: Meter | None = None) -> None:
        """name: of this unit; None: made from the actor's id. meter: None: Ray's."""
        self._spec = spec
        self._id = name or f"{spec.role}-{ray.get_runtime_context().get_actor_id()[:8]}"
        start_logging(self._id)
        self._report = UnitReport(
            self._id, spec.role, spec.wanted, meter or RayMeter(UNIT), spec.rank.settings.max_batch
        )
        self._lone = _all_on_one(spec.wanted) if spec.rank.alone else None
        self._numbers = itertools.count()
        self._company = Crew(self._id, spec.rank.exchange, spec.rank.alone)
        self._load = ExpertLoad(
            spec.wanted.layers, spec.wanted.num_experts, spec.rank.exchange.load_half_life_s
        )
        self._plans = PlanKeeper(
            self._company, spec.wanted, self._load, self._kill, spec.rank.settings.load_timeout_s
        )  # fmt: skip
        self._tasks = [asyncio.create_task(self._keep(i)) for i in range(spec.wanted.attention)]
        self._tasks += [asyncio.create_task(self._take_pulses())]
        if not spec.rank.alone:
            self._tasks.append(asyncio.create_task(self._plans.keep()))
            if every_s := spec.rank.exchange.rebalance_s:
                threshold = spec.rank.exchange.rebalance_threshold
                balance = self._plans.keep_balance(every_s, threshold)
                self._tasks.append(asyncio.create_task(balance))

    # ---- asked by others ----

    async def status(self, ingress: str = "", waiting: float = 0.0) -> UnitStatus:
        """Who serves here right now, and what is missing.

        waiting: this unit's share of the sequences that wait at the ingress of this name.
        """
        if ingress:
            self._report.hear_of_queue(ingress, waiting, time.monotonic())
        company, plan, wanted = self._company, self._plans.plan, self._plans.wanted
        experts = [m.name for m in company.present if m.role == "expert"]
        room = wanted.experts + self._spec.spares - len(experts)
        return UnitStatus(
            unit=self._id,
            role=self._spec.role,
            epoch=plan.epoch if plan else -1,
            ranks=company.serving,
            problems=tuple(f"{self._id}: {sentence}" for sentence in self._problems),
            expert_ranks=tuple(experts),
            experts_missing=room if wanted.experts else 0,
            deaths=company.deaths,
            places=len(company.serving) * self._spec.rank.settings.max_batch,
        )

    async def view(self) -> UnitView:
        """For the cluster page."""
        return self._report.view(self._state)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook: what cluster/autoscaling.py scales by."""
        return self._report.to_scale_by(self._placement, self._load.rows)

    async def attach(self, unit: str, actor: Any, started: Started) -> bool:
        """Take an expert rank in: if `unit` is meant, has room, and the rank belongs there and is
        free. Its death ends the bond."""
        name, hands = started.member.name, self._company.hands
        if unit != self._id:
            return False
        if name not in hands:
            if (await self.status()).experts_missing <= 0 or not self._company.admits(started):
                return False
            try:
                async with asyncio.timeout(ENGAGE_S):
                    newest = await actor.engage.remote(self._id)
            except (Elsewhere, ray.exceptions.RayError, TimeoutError) as error:
                log.warning("%s does not come: %s", name, last_line(error))
                return False
            self._plans.heard_of(newest)
            if name not in hands:  # it may have been offered twice
                self._company.join(actor, started).broken = newest
        return True

    async def detach(self, name: str) -> None:
        """Go on without this expert rank; returns when nobody needs it any more."""
        hand = self._company.hands.get(name)
        if hand is None:
            return
        hand.leaving = True
        self._company.changed.set()
        while self._plans.plan is not None and self._plans.plan.rank_of(name) is not None:
            await asyncio.sleep(0.05)
        await self._plans.adopted(self._plans.plan)
        self._company.part(hand, "it left")
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            async with asyncio.timeout(ENGAGE_S):
                await hand.actor.dismiss.remote(self._id)

    async def rebalance(self) -> None:
        """Spread the experts anew by their load, now."""
        self._plans.rebalance()

    async def retire(self) -> None:
        """Let requests end that are about to, then hand the others over to the ingresses, which
        continue them elsewhere. To be called when no ingress sends new ones here any more."""
        deadline = time.monotonic() + FINISH_S
        while self._report.requests and time.monotonic() < deadline:
            await asyncio.sleep(PULSE_S / 2)
        log.info("%s stops, and hands %d requests over", self._id, self._report.requests)
        ranks = [h for h in self._company.hands.values() if h.member.role == "attention"]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETIRE_S):
                await asyncio.gather(
                    *(h.actor.retire.remote() for h in ranks), return_exceptions=True
                )

    async def __del__(self) -> None:
        """Serve's way of saying goodbye, before the process ends."""
        await self.retire()

    async def check_health(self) -> None:
        """Serve's health check: the leader is fine as long as it looks after its ranks."""
        for task in self._tasks:
            if task.done():
                task.result()

    @property
    def _placement(self) -> ExpertPlacement | None:
        return self._plans.plan.placement if self._plans.plan else self._lone

    @property
    def _problems(self) -> list[str]:
        if self._spec.rank.alone:
            return [] if self._company.hands else ["its rank is being started"]
        found = self._plans.problems
        return found + self._company.refusal if found else []

    @property
    def _state(self) -> UnitState:
        company, plan = self._company, self._plans.plan
        return UnitState(
            plan, company.present, self._placement, self._load.rows, self._problems, company.deaths
        )

    # ---- processes ----

    async def _keep(self, index: int) -> None:
        """Run attention rank `index` for ever: start it, wait for its end, start its successor."""
        failed = False  # the first plan waits for nobody in the place of one that did
        while True:
            name = f"{self._id}-attention{index}-{next(self._numbers)}"
            actor = self._spawn(index, name)
            served = False
            try:
                limit, note = self._spec.rank.settings.load_timeout_s, self._company.loading.add
                started = await start(actor, limit, None if failed else partial(note, name))
                if self._company.admits(started):
                    hand = self._company.join(actor, started)
                    self._company.loading.discard(name)
                    served = True
                    assert hand.watch is not None
                    await asyncio.wait([hand.watch])
            except (ray.exceptions.RayError, TimeoutError) as error:
                log.error("rank %s did not start: %s", name, last_line(error))
            finally:
                self._company.loading.discard(name)
                self._kill(actor)
            if not served:
                failed = True
                await asyncio.sleep(STARTED_LATER_S)

    def _spawn(self, index: int, name: str) -> Any:
        return spawn(Rank, name, self._spec.rank, self._spec.bundles[index])

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(Exception):
            ray.kill(actor)

    async def _take_pulses(self) -> None:
        """Ask everybody how they are, once a second; kill whom the others wait for too long."""
        deadline = self._spec.rank.settings.step_timeout_s
        last, pause = time.monotonic(), PULSE_S
        while True:
            await asyncio.sleep(pause)
            hands = dict(self._company.hands)
            pulses = await self._company.pulses(PULSE_S, min(deadline, SILENT_S))
            pause = next_look(pulses, deadline, PULSE_S)
            if self._company.somebody_is_silent:
                pause = LATER_S  # asking took long enough
            for hand in hands.values():
                if hand.elsewhere is not None:
                    self._company.part(hand, hand.elsewhere)
            for name, why in culprits(pulses, deadline).items():
                if self._company.has(hands[name]):
                    waits = "; ".join(
                        f"{n} at {p.where}" for n, p in pulses.items() if p and p.waits
                    )
                    log.error("killing %s: %s. Waiting for it: %s", name, why, waits or "nobody")
                    self._kill(hands[name].actor)
                    self._company.part(hands[name], why)
            self._load.age(time.monotonic() - last)
            last = time.monotonic()
            self._count_rows(pulses)
            state = self._state
            self._report.take(last, {name: pulses.get(name) for name in hands}, state.members)
            self._report.publish(state)

    def _count_rows(self, pulses: dict[str, Pulse | None]) -> None:
        plan, placement = self._plans.plan, self._placement
        if placement is None:
            return
        for name, pulse in pulses.items():
            holder = plan.holder_of(name) if plan else 0
            rows = pulse.expert_rows if pulse else None
            if holder is not None and rows and rows.version == placement.version:
                self._load.add(placement, holder, rows.rows)
                self._report.count_experts(placement, holder, rows)


def _all_on_one(wanted: Wanted) -> ExpertPlacement:
    """Where a lone rank has its experts."""
    experts = tuple(range(wanted.num_experts))
    return ExpertPlacement(0, dict.fromkeys(wanted.layers, experts), wanted.num_experts, (0,))
