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
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayseek.cluster.dispatch import RankAddress
from rayseek.cluster.expert_load import ExpertLoad, pays
from rayseek.cluster.logs import start_logging
from rayseek.cluster.metrics import UNIT, Meter, RayMeter
from rayseek.cluster.placement import ExpertPlacement, Loads
from rayseek.cluster.plan import (
    Member,
    Pulse,
    UnitPlan,
    Wanted,
    culprits,
    next_plan,
    problems,
)
from rayseek.cluster.rank import Rank, Started
from rayseek.cluster.spec import RankSpec, UnitSpec
from rayseek.cluster.status import UnitStatus
from rayseek.cluster.unit_report import UnitReport, UnitView

log = logging.getLogger("rayseek.unit")

PULSE_S = 1.0
PULSE_TIMEOUT_S = 10.0  # who is silent for so long hangs, whatever a step may take
SETTLE_S = 0.03  # deaths come in groups: a node takes several ranks with it
RETRY_S = 0.2
RANK_ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


@dataclass(slots=True)
class Hand:
    """A process of the unit, as its leader knows it."""

    actor: Any
    member: Member
    address: RankAddress | None = None
    watch: asyncio.Task[None] | None = None
    leaving: bool = False


@dataclass(slots=True)
class Company:
    """Who is there, and what has happened to them."""

    hands: dict[str, Hand] = field(default_factory=dict)
    deaths: int = 0
    broken_epoch: int = -1

    @property
    def present(self) -> list[Member]:
        return [hand.member for hand in self.hands.values() if not hand.leaving]


def rank_options(spec: RankSpec) -> dict[str, Any]:
    """Of the actor of any rank. Its CPU is what its placement group keeps free, not a resource."""
    return {"num_cpus": 0, "num_gpus": spec.gpus, "runtime_env": {"env_vars": RANK_ENV}}


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
        self._company = Company()
        self._plan: UnitPlan | None = None
        # Expert ranks outlive their leader and follow larger epochs only: count from the clock.
        self._epoch = time.time_ns() // 1_000_000
        self._why = "it starts"
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
        serves = self._spec.rank.alone or self._plan is not None
        experts = [m.name for m in company.present if m.role == "expert"]
        room = self._wanted.experts + self._spec.spares - len(experts)
        return UnitStatus(
            unit=self._id,
            role=self._spec.role,
            epoch=self._plan.epoch if self._plan else -1,
            ranks=tuple(
                h.address for h in company.hands.values() if serves and h.address and not h.leaving
            ),
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
        """Take an expert rank in, if `unit` is meant and it has room. Its death ends the bond."""
        status = await self.status()
        if unit != self._id or status.experts_missing <= 0:
            return False
        self._join(actor, started)
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

    async def rebalance(self) -> None:
        """Spread the experts anew by their load, now."""
        self._rebalance = True
        self._changed.set()

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
        if self._plan is None:
            return [self._why]
        return problems(self._plan, self._company.present, self._wanted)

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
                hand = self._join(actor, started)
                served = True
                assert hand.watch is not None
                await asyncio.wait([hand.watch])
            except (ray.exceptions.RayError, TimeoutError) as error:
                log.error("rank %s did not start: %s", name, _last_line(error))
            finally:
                self._kill(actor)
            if not served:
                await asyncio.sleep(5.0)

    def _spawn(self, index: int, name: str) -> Any:
        group = ray.util.get_current_placement_group()
        options: dict[str, Any] = rank_options(self._spec.rank)
        if group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=self._spec.bundles[index]
            )
        return ray.remote(Rank).options(**options).remote(name, self._spec.rank)

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(Exception):
            ray.kill(actor)

    def _join(self, actor: Any, started: Started) -> Hand:
        hand = self._company.hands[started.member.name] = Hand(
            actor, started.member, started.address
        )
        hand.watch = asyncio.create_task(self._watch(hand))
        log.info("%s joins %s", started.member.name, self._id)
        self._changed.set()
        return hand

    def _part(self, name: str, why: str) -> None:
        hand = self._company.hands.pop(name, None)
        if hand is None:
            return
        log.error("%s is lost to %s: %s", name, self._id, why)
        if not hand.leaving:
            self._company.deaths += 1
        self._changed.set()

    async def _watch(self, hand: Hand) -> None:
        """Until it dies. A call that waits in the process fails some 20 ms after its death."""
        try:
            while True:
                broken = await hand.actor.next_break.remote()
                if broken.epoch > self._company.broken_epoch:  # else it is late with old news
                    self._company.broken_epoch = broken.epoch
                    self._changed.set()
        except ray.exceptions.RayError as error:
            self._part(hand.member.name, _last_line(error))

    async def _take_pulses(self) -> None:
        """Ask everybody how they are, once a second; kill whom the others wait for too long."""
        deadline = self._spec.rank.settings.step_timeout_s
        last = time.monotonic()
        while True:
            await asyncio.sleep(PULSE_S)
            hands = list(self._company.hands.values())
            patience = min(deadline, PULSE_TIMEOUT_S)
            answers = await asyncio.gather(*(self._pulse(hand, patience) for hand in hands))
            pulses = {h.member.name: p for h, p in zip(hands, answers, strict=True)}
            for name, why in culprits(pulses, deadline).items():
                hand = self._company.hands.get(name)
                if hand is not None:
                    waits = "; ".join(
                        f"{n} at {p.where}" for n, p in pulses.items() if p and p.waits
                    )
                    log.error("killing %s: %s. Waiting for it: %s", name, why, waits or "nobody")
                    self._kill(hand.actor)
                    self._part(name, why)
            self._load.age(time.monotonic() - last)
            last = time.monotonic()
            self._count_rows(pulses)
            self._report.take(last, pulses, self._plan)
            self._report.publish(self._plan, *self._state)

    async def _pulse(self, hand: Hand, deadline: float) -> Pulse | None:
        """None: no answer in time, or one that says that it can not go on."""
        try:
            async with asyncio.timeout(deadline):
                pulse: Pulse = await hand.actor.pulse.remote()
                return pulse
        except ray.exceptions.RayTaskError as error:
            log.error("%s: %s", hand.member.name, _last_line(error))
            return None
        except ray.exceptions.RayError:
            return Pulse(-1, 0, "its end", waits=False, idle=True, since_s=0)  # its watch knows
        except TimeoutError:
            return None

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
            self._epoch += 1  # also of an attempt that fails: no two plans share a number
            plan = next_plan(
                self._plan, self._company.present, self._wanted, self._load.rows,
                rebalance=self._rebalance, complete=self._plan is None and patient,
                epoch=self._epoch,
            )  # fmt: skip
            if isinstance(plan, str):
                self._why = plan
                continue
            if not await self._put_in_force(plan):
                self._changed.set()
                await asyncio.sleep(RETRY_S)

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
            self._plan = plan
            self._rebalance = False
            await _all(h.actor.commit.remote(plan) for h in crew)
        except ray.exceptions.RayError as error:
            log.warning("plan %d cannot be followed: %s", plan.epoch, _last_line(error))
            return False
        finally:
            change.cancel()
            preparing.cancel()
        log.info("epoch %d of %s: %s", plan.epoch, self._id, [m.name for m in plan.members])
        return True

    async def _prepared(self, plan: UnitPlan, crew: list[Hand]) -> bool:
        """Whether all could prepare. A process that could not, or not in time, is killed."""
        limit = self._spec.rank.settings.load_timeout_s
        outcomes = await asyncio.gather(
            *(asyncio.wait_for(_of(h.actor.prepare.remote(plan)), limit) for h in crew),
            return_exceptions=True,
        )
        for hand, outcome in zip(crew, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                why = f"it cannot prepare for plan {plan.epoch}: {_last_line(outcome)}"
                self._kill(hand.actor)
                self._part(hand.member.name, why)
        return not any(isinstance(outcome, BaseException) for outcome in outcomes)

    async def _adopted(self, plan: UnitPlan | None) -> None:
        """Until all members follow the plan, or a newer one."""
        while plan is not None and self._plan is plan:
            hands = [self._company.hands.get(m.name) for m in plan.members]
            pulses = await asyncio.gather(*(self._pulse(h, PULSE_S) for h in hands if h))
            if all(p is not None and p.epoch >= plan.epoch for p in pulses):
                return
            await asyncio.sleep(0.05)


def _all_on_one(wanted: Wanted) -> ExpertPlacement:
    """Where a lone rank has its experts."""
    experts = tuple(range(wanted.num_experts))
    return ExpertPlacement(0, dict.fromkeys(wanted.layers, experts), wanted.num_experts, (0,))


async def _of(reference: Any) -> None:
    await reference


async def _all(references: Iterable[Any]) -> None:
    await asyncio.gather(*references)


def _last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[2] or type(error).__name__
