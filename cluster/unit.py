"""The leader of one unit: a Serve replica that keeps the unit's processes together.

Attention ranks are plain child actors in the replica's own placement group; expert ranks belong to
the replicas of `Experts` and are attached by them. Whoever dies or hangs is replaced, and every
change of the company becomes a new plan: prepared by all (weights), then committed by all. Tokens
never pass through here; ingresses ask for the ranks' addresses and talk to them directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Iterable
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayseek.cluster.crew import SILENT_S, Crew, Hand, last_line
from rayseek.cluster.expert_load import ExpertLoad, pays
from rayseek.cluster.logs import start_logging
from rayseek.cluster.metrics import UNIT, Meter, RayMeter
from rayseek.cluster.placement import ExpertPlacement, Loads
from rayseek.cluster.plan import (
    LATER_S,
    Member,
    Pulse,
    UnitPlan,
    Wanted,
    culprits,
    next_look,
    next_plan,
    problems,
)
from rayseek.cluster.rank import Elsewhere, Rank, Started
from rayseek.cluster.spec import RankSpec, UnitSpec
from rayseek.cluster.status import UnitStatus
from rayseek.cluster.unit_report import UnitReport, UnitView

log = logging.getLogger("rayseek.unit")

PULSE_S = 1.0
SETTLE_S = 0.03  # deaths come in groups: a node takes several ranks with it
RETRY_S = 0.2
ENGAGE_S = 2.0  # for an expert rank to say that it is free
REFUSED_S = 30.0  # a refusal is told for so long, unless it is repeated
FINISH_S = 20.0  # for the requests on board when the unit is to stop; less than Serve's grace
RETIRE_S = 2.0


def rank_options(spec: RankSpec, name: str) -> dict[str, Any]:
    """Of the actor of any rank; `name` is what the dashboard calls it. Its CPU is what its
    placement group keeps free, not a resource. It has no runtime environment, so that it may get
    one of the processes that Ray starts in advance: that is up to a second."""
    return {"name": name, "num_cpus": 0, "num_gpus": spec.gpus}


class Unit:
    """Deployment class of `Decode` and `Prefill`."""

    def __init__(self, spec: UnitSpec, name: str | None = None, meter: Meter | None = None) -> None:
        """name: of this unit; None: made from the actor's id. meter: None: Ray's."""
        self._spec, self._wanted = spec, spec.wanted
        self._id = name or f"{spec.role}-{ray.get_runtime_context().get_actor_id()[:8]}"
        start_logging(self._id)
        self._report = UnitReport(self._id, spec.role, spec.wanted, meter or RayMeter(UNIT))
        self._lone = _all_on_one(spec.wanted) if spec.rank.alone else None
        self._numbers = itertools.count()
        self._company = Crew(self._id)
        self._plan: UnitPlan | None = None
        # Expert ranks outlive their leader and follow larger epochs only: count from the clock.
        self._epoch = _clock()
        self._why = "it starts"
        self._refused: tuple[str, float] | None = None  # why a process was, and when
        self._following: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._rebalance = False
        self._began = self._rebalanced = time.monotonic()
        self._load = ExpertLoad(
            self._wanted.layers, self._wanted.num_experts, spec.rank.exchange.load_half_life_s
        )
        self._tasks = [asyncio.create_task(self._keep(i)) for i in range(spec.wanted.attention)]
        self._tasks += [asyncio.create_task(self._take_pulses())]
        if not spec.rank.alone:
            self._tasks.append(asyncio.create_task(self._keep_plans()))

    # ---- asked by others ----

    async def status(self) -> UnitStatus:
        """Who serves here right now, and what is missing."""
        company = self._company
        experts = [m.name for m in company.present if m.role == "expert"]
        room = self._wanted.experts + self._spec.spares - len(experts)
        return UnitStatus(
            unit=self._id,
            role=self._spec.role,
            epoch=self._plan.epoch if self._plan else -1,
            ranks=company.serving,
            problems=tuple(f"{self._id}: {sentence}" for sentence in self._problems),
            expert_ranks=tuple(experts),
            experts_missing=room if self._wanted.experts else 0,
            deaths=company.deaths,
        )

    async def view(self) -> UnitView:
        """For the cluster page."""
        return self._report.view(self._plan, *self._state)

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
            if (await self.status()).experts_missing <= 0 or not self._fits(started):
                return False
            try:
                async with asyncio.timeout(ENGAGE_S):
                    newest = await actor.engage.remote(self._id)
            except (Elsewhere, ray.exceptions.RayError, TimeoutError) as error:
                log.warning("%s does not come: %s", name, last_line(error))
                return False
            self._epoch = max(self._epoch, newest)
            if name not in hands:  # it may have been offered twice
                self._join(actor, started).broken = newest
        return True

    async def detach(self, name: str) -> None:
        """Go on without this expert rank; returns when nobody needs it any more."""
        hand = self._company.hands.get(name)
        if hand is None:
            return
        hand.leaving = True
        self._changed.set()
        while self._plan is not None and self._plan.rank_of(name) is not None:
            await asyncio.sleep(0.05)
        await self._adopted(self._plan)
        self._part(name, "it left")
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            async with asyncio.timeout(ENGAGE_S):
                await hand.actor.dismiss.remote(self._id)

    async def rebalance(self) -> None:
        """Spread the experts anew by their load, now."""
        self._rebalance = True
        self._changed.set()

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
                    *(_of(h.actor.retire.remote()) for h in ranks), return_exceptions=True
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
        return self._plan.placement if self._plan else self._lone

    @property
    def _problems(self) -> list[str]:
        if self._spec.rank.alone:
            return [] if self._company.hands else ["its rank is being started"]
        found = [self._why]
        if self._plan is not None:
            found = problems(self._plan, self._company.present, self._wanted)
            found += [self._why] if self._why else []
        if found and self._refused and time.monotonic() - self._refused[1] < REFUSED_S:
            found.append(self._refused[0])
        return found

    @property
    def _state(self) -> tuple[list[Member], ExpertPlacement | None, Loads, list[str], int]:
        """What a report is made of, beside the plan."""
        company = self._company
        loads = self._load.rows
        return company.present, self._placement, loads, self._problems, company.deaths

    # ---- processes ----

    async def _keep(self, index: int) -> None:
        """Run attention rank `index` for ever: start it, wait for its end, start its successor."""
        while True:
            name = f"{self._id}-attention{index}-{next(self._numbers)}"
            actor = self._spawn(index, name)
            served = False
            try:
                async with asyncio.timeout(self._spec.rank.settings.load_timeout_s):
                    started = await actor.start.remote()
                if self._fits(started):
                    hand = self._join(actor, started)
                    served = True
                    assert hand.watch is not None
                    await asyncio.wait([hand.watch])
            except (ray.exceptions.RayError, TimeoutError) as error:
                log.error("rank %s did not start: %s", name, last_line(error))
            finally:
                self._kill(actor)
            if not served:
                await asyncio.sleep(5.0)

    def _spawn(self, index: int, name: str) -> Any:
        group = ray.util.get_current_placement_group()
        options: dict[str, Any] = rank_options(self._spec.rank, name)
        if group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=self._spec.bundles[index]
            )
        return ray.remote(Rank).options(**options).remote(name, self._spec.rank)

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(Exception):
            ray.kill(actor)

    def _fits(self, started: Started) -> bool:
        why = self._company.misfit(started, self._spec.rank.exchange)
        if why is not None:
            if self._refused is None or self._refused[0] != why:
                log.error("%s", why)
            self._refused = (why, time.monotonic())
        return why is None

    def _join(self, actor: Any, started: Started) -> Hand:
        hand = self._company.hands[started.member.name] = Hand(
            actor, started, serves=self._spec.rank.alone
        )
        hand.watch = asyncio.create_task(self._watch(hand))
        log.info("%s joins %s", started.member.name, self._id)
        if started.member.role == "attention":  # which decides what the others must be
            for name, other in list(self._company.hands.items()):
                if other.member.role == "expert" and not self._fits(other.started):
                    self._part(name, "it does not belong here")
        self._changed.set()
        return hand

    def _part(self, name: str, why: str) -> None:
        hand = self._company.forget(name)
        if hand is None:
            return
        if hand.leaving:
            log.info("%s leaves %s: %s", name, self._id, why)
        else:
            log.error("%s is lost to %s: %s", name, self._id, why)
            self._company.deaths += 1
        self._changed.set()

    async def _watch(self, hand: Hand) -> None:
        """Until it dies. A call that waits in the process fails some 20 ms after its death."""
        try:
            while True:
                broken = await hand.actor.next_break.remote(hand.broken)
                hand.broken = broken.epoch
                if broken.epoch > self._company.broken_epoch:  # else it is late with old news
                    self._company.broken_epoch = broken.epoch
                    self._changed.set()
        except ray.exceptions.RayError as error:
            self._part(hand.member.name, last_line(error))

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
            for name, hand in hands.items():
                if hand.elsewhere is not None:
                    self._part(name, hand.elsewhere)
            for name, why in culprits(pulses, deadline).items():
                if name in self._company.hands:
                    waits = "; ".join(
                        f"{n} at {p.where}" for n, p in pulses.items() if p and p.waits
                    )
                    log.error("killing %s: %s. Waiting for it: %s", name, why, waits or "nobody")
                    self._kill(hands[name].actor)
                    self._part(name, why)
            self._load.age(time.monotonic() - last)
            last = time.monotonic()
            self._count_rows(pulses)
            self._report.take(last, {name: pulses.get(name) for name in hands}, self._plan)
            self._report.publish(self._plan, *self._state)

    def _count_rows(self, pulses: dict[str, Pulse | None]) -> None:
        plan, exchange, placement = self._plan, self._spec.rank.exchange, self._placement
        if placement is None:
            return
        for name, pulse in pulses.items():
            holder = plan.holder_of(name) if plan else 0
            rows = pulse.expert_rows if pulse else None
            if holder is not None and rows and rows.version == placement.version:
                self._load.add(placement, holder, rows.rows)
                self._report.count_experts(placement, holder, rows)
        if plan is None:
            return
        now = time.monotonic()
        if exchange.rebalance_s and now - self._rebalanced > exchange.rebalance_s:
            self._rebalanced = now
            present = self._company.present
            then = next_plan(plan, present, self._wanted, self._load.rows, rebalance=True)
            if isinstance(then, UnitPlan) and pays(
                plan.placement, then.placement, self._load.rows, exchange.rebalance_threshold
            ):
                self._rebalance = True
                self._changed.set()

    # ---- plans ----

    async def _keep_plans(self) -> None:
        """Make a plan of every change, and put it in force."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PULSE_S):
                    await self._changed.wait()
                    await asyncio.sleep(SETTLE_S)
            self._changed.clear()
            if not self._outdated():
                continue
            patient = time.monotonic() - self._began < self._spec.start_patience_s
            # Also of an attempt that fails: no two plans share a number.
            self._epoch = max(self._epoch + 1, _clock())
            plan = next_plan(
                self._plan, self._company.present, self._wanted, self._load.rows,
                rebalance=self._rebalance, complete=self._plan is None and patient,
                epoch=self._epoch, broken=self._broken,
            )  # fmt: skip
            if isinstance(plan, str):
                if plan != self._why:
                    log.error("%s has no plan: %s", self._id, plan)
                self._why = plan
                continue
            if not await self._put_in_force(plan):
                self._changed.set()
                await asyncio.sleep(RETRY_S)

    @property
    def _broken(self) -> bool:
        """Nobody can compute under the plan in force any more."""
        plan, company = self._plan, self._company
        return plan is not None and (
            company.broken_epoch >= plan.epoch
            or any(m.name not in company.hands for m in plan.members)
        )

    def _outdated(self) -> bool:
        plan, company = self._plan, self._company
        if plan is None or self._rebalance or company.broken_epoch >= plan.epoch:
            return True
        present = {m.name: m for m in company.present}
        if any(m.name not in present for m in plan.members):
            return True
        taking_part = {role: sum(m.role == role for m in plan.members)
                       for role in ("attention", "expert")}  # fmt: skip
        wanted = {"attention": self._wanted.attention, "expert": self._wanted.experts}
        newcomers = [m for name, m in present.items() if plan.rank_of(name) is None]
        return any(taking_part[m.role] < wanted[m.role] for m in newcomers)

    async def _put_in_force(self, plan: UnitPlan) -> bool:
        """Everybody prepares, then everybody commits: those who are to leave, and spares, as well.

        Who cannot prepare is replaced.
        """
        crew = list(self._company.hands.values())
        preparing = asyncio.ensure_future(self._prepared(plan, crew))
        change = asyncio.ensure_future(self._changed.wait())
        try:
            both: list[asyncio.Future[Any]] = [preparing, change]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not preparing.done():  # somebody died or came meanwhile: plan again
                return False
            if not preparing.result():
                return False
            self._plan, self._why = plan, ""
            self._rebalance = False
            await _all(h.actor.commit.remote(plan) for h in crew)
        except ray.exceptions.RayError as error:
            log.warning("plan %d cannot be followed: %s", plan.epoch, last_line(error))
            return False
        finally:
            change.cancel()
            preparing.cancel()
        log.info("epoch %d of %s: %s", plan.epoch, self._id, [m.name for m in plan.members])
        if self._following is not None:
            self._following.cancel()
        self._following = asyncio.create_task(self._adopted(plan))
        return True

    async def _prepared(self, plan: UnitPlan, crew: list[Hand]) -> bool:
        """Whether all could prepare. A process that could not, or not in time, is killed."""
        limit = self._spec.rank.settings.load_timeout_s
        outcomes = await asyncio.gather(
            *(asyncio.wait_for(_of(h.actor.prepare.remote(plan, self._id)), limit) for h in crew),
            return_exceptions=True,
        )
        for hand, outcome in zip(crew, outcomes, strict=True):
            if isinstance(outcome, Elsewhere):
                self._part(hand.member.name, last_line(outcome))
            elif isinstance(outcome, BaseException):
                why = f"it cannot prepare for plan {plan.epoch}: {last_line(outcome)}"
                self._kill(hand.actor)
                self._part(hand.member.name, why)
        return not any(isinstance(outcome, BaseException) for outcome in outcomes)

    async def _adopted(self, plan: UnitPlan | None) -> None:
        """Until all members follow the plan, or a newer one; who does may get requests."""
        while plan is not None and self._plan is plan:
            hands = [self._company.hands.get(m.name) for m in plan.members]
            follows = await asyncio.gather(*(_follows(h, plan.epoch) for h in hands if h))
            if all(follows):
                return
            await asyncio.sleep(0.05)


async def _follows(hand: Hand, epoch: int) -> bool:
    try:
        async with asyncio.timeout(PULSE_S):
            reached = await hand.actor.epoch.remote() >= epoch
    except (ray.exceptions.RayError, TimeoutError):
        return False
    hand.serves = hand.serves or reached
    return bool(reached)


def _all_on_one(wanted: Wanted) -> ExpertPlacement:
    """Where a lone rank has its experts."""
    experts = tuple(range(wanted.num_experts))
    return ExpertPlacement(0, dict.fromkeys(wanted.layers, experts), wanted.num_experts, (0,))


def _clock() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


async def _of(reference: Any) -> None:
    await reference


async def _all(references: Iterable[Any]) -> None:
    await asyncio.gather(*references)
