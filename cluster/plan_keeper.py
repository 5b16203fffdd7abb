"""A unit's plans: made of every change of its crew, prepared by all (weights), committed by all.

The leader's second half: `crew.py` knows who is there, `plan.py` and `succession.py` (pure) say who
does what, and this puts it in force.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import ray.exceptions

from rayseek.cluster.crew import Crew, Hand, last_line
from rayseek.cluster.expert_load import ExpertLoad, pays
from rayseek.cluster.plan import Role, UnitPlan, Wanted, next_plan, problems, thin_spots
from rayseek.cluster.rank import Elsewhere

log = logging.getLogger("rayseek.unit")

LOOK_S = 1.0  # at what is to be changed, should nobody tell
SETTLE_S = 0.03  # deaths come in groups: a node takes several ranks with it
RETRY_S = 0.2
COMING_S = 120.0  # of patience with ranks that give no sign, before the first plan
SUCCESSOR_S = 5.0  # likewise where an expert rank has worked before: requests may be waiting
ANSWER_S = 1.0


class PlanKeeper:
    """Of one unit. load: of its experts, to spread them by. kill: ends a process. load_timeout_s:
    for a process to prepare."""

    def __init__(
        self, crew: Crew, wanted: Wanted, load: ExpertLoad, kill: Callable[[Any], None],
        load_timeout_s: float,
    ) -> None:  # fmt: skip
        self._crew, self.wanted, self._load, self._kill = crew, wanted, load, kill
        self._load_timeout_s, self._succeeds = load_timeout_s, False
        self.plan: UnitPlan | None = None  # in force
        self._thin_spots: list[str] = []  # of it
        # Expert ranks outlive their leader and follow larger epochs only: count from the clock.
        self._epoch = _clock()
        self._why = "it starts"
        self._rebalance = False
        self._began = time.monotonic()
        self.following: asyncio.Task[None] | None = None

    @property
    def problems(self) -> list[str]:
        """A sentence for each."""
        if self.plan is None:
            return [self._why]
        found = problems(self.plan, self._crew.present, self.wanted) + self._thin_spots
        return found + ([self._why] if self._why else [])

    def heard_of(self, epoch: int) -> None:
        """An expert rank knows plans up to this one (-1: none); those to come are to be newer."""
        self._epoch = max(self._epoch, epoch)
        if epoch >= 0:
            self._succeeds = True

    def rebalance(self) -> None:
        """Spread the experts anew by their load, now."""
        self._rebalance = True
        self._crew.changed.set()

    async def keep_balance(self, every_s: float, threshold: float) -> None:
        """Look so often whether the experts are to be spread anew: if that wins such a part of
        their time."""
        while True:
            await asyncio.sleep(every_s)
            plan, loads = self.plan, self._load.rows
            if plan is None:
                continue
            then = await asyncio.to_thread(
                next_plan, plan, self._crew.present, self.wanted, loads, rebalance=True
            )
            if isinstance(then, UnitPlan) and pays(
                plan.placement, then.placement, loads, threshold
            ):
                self.rebalance()

    async def keep(self) -> None:
        """Make a plan of every change, and put it in force."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._crew.changed.wait()
                    await asyncio.sleep(SETTLE_S)
            self._crew.changed.clear()
            if not self._outdated():
                continue
            # Also of an attempt that fails: no two plans share a number.
            self._epoch = max(self._epoch + 1, _clock())
            # It takes seconds for a hundred ranks, in which others ask how we are.
            plan = await asyncio.to_thread(
                next_plan, self.plan, self._crew.present, self.wanted, self._load.rows,
                rebalance=self._rebalance, complete=self.plan is None and self._patient,
                epoch=self._epoch, broken=self._broken,
            )  # fmt: skip
            if isinstance(plan, str):
                if plan != self._why:
                    log.error("%s has no plan: %s", self._crew.unit, plan)
                self._why = plan
                continue
            if self._crew.changed.is_set():
                continue  # it is outdated: nobody is to load experts for it
            if not await self._put_in_force(plan):
                self._crew.changed.set()
                await asyncio.sleep(RETRY_S)

    @property
    def _patient(self) -> bool:
        """Whether to wait for those who are missing: without them, each would load more experts
        than it is to have. An attention rank that loads will come, however long it takes; of those
        who give no sign, one may, as long as others of its kind come."""
        now, crew = time.monotonic(), self._crew
        if self._succeeds:
            return now - self._began < SUCCESSOR_S

        def may_come(role: Role, wanted: int) -> bool:
            came = [hand.came for hand in crew.hands.values() if hand.member.role == role]
            return len(came) < wanted and now - max(came, default=self._began) < COMING_S

        attention, experts = self.wanted.attention, self.wanted.needed_experts
        return bool(crew.loading) or may_come("attention", attention) or may_come("expert", experts)

    @property
    def _broken(self) -> bool:
        """Nobody can compute under the plan in force any more."""
        plan, crew = self.plan, self._crew
        return plan is not None and (
            crew.broken_epoch >= plan.epoch or any(m.name not in crew.hands for m in plan.members)
        )

    def _outdated(self) -> bool:
        plan, crew = self.plan, self._crew
        if plan is None or self._rebalance or crew.broken_epoch >= plan.epoch:
            return True
        present = {m.name: m for m in crew.present}
        if any(m.name not in present for m in plan.members):
            return True
        taking_part = {role: sum(m.role == role for m in plan.members)
                       for role in ("attention", "expert")}  # fmt: skip
        wanted = {"attention": self.wanted.attention, "expert": self.wanted.experts}
        newcomers = [m for name, m in present.items() if plan.rank_of(name) is None]
        return any(taking_part[m.role] < wanted[m.role] for m in newcomers)

    async def _put_in_force(self, plan: UnitPlan) -> bool:
        """Everybody prepares, then everybody commits: those who are to leave, and spares, as well.

        Who cannot prepare is replaced.
        """
        crew = list(self._crew.hands.values())
        preparing = asyncio.ensure_future(self._prepared(plan, crew))
        change = asyncio.ensure_future(self._crew.changed.wait())
        try:
            both: list[asyncio.Future[Any]] = [preparing, change]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not preparing.done():  # somebody died or came meanwhile: plan again
                return False
            if not preparing.result():
                return False
            self.plan, self._why = plan, ""
            self._thin_spots = thin_spots(plan, self.wanted)
            self._rebalance = False
            await asyncio.gather(*(h.actor.commit.remote(plan) for h in crew))
        except ray.exceptions.RayError as error:
            log.warning("plan %d cannot be followed: %s", plan.epoch, last_line(error))
            return False
        finally:
            change.cancel()
            preparing.cancel()
        log.info("epoch %d of %s: %s", plan.epoch, self._crew.unit, [m.name for m in plan.members])
        if self.following is not None:
            self.following.cancel()
        self.following = asyncio.create_task(self.adopted(plan))
        return True

    async def _prepared(self, plan: UnitPlan, crew: list[Hand]) -> bool:
        """Whether all could prepare. A process that could not, or not in time, is killed."""
        unit, limit = self._crew.unit, self._load_timeout_s
        outcomes = await asyncio.gather(
            *(asyncio.wait_for(h.actor.prepare.remote(plan, unit), limit) for h in crew),
            return_exceptions=True,
        )
        for hand, outcome in zip(crew, outcomes, strict=True):
            if isinstance(outcome, Elsewhere):
                self._crew.part(hand, last_line(outcome))
            elif isinstance(outcome, BaseException):
                why = f"it cannot prepare for plan {plan.epoch}: {last_line(outcome)}"
                self._kill(hand.actor)
                self._crew.part(hand, why)
        return not any(isinstance(outcome, BaseException) for outcome in outcomes)

    async def adopted(self, plan: UnitPlan | None) -> None:
        """Until all members follow the plan, or a newer one; who does may get requests."""
        while plan is not None and self.plan is plan:
            hands = [self._crew.hands.get(m.name) for m in plan.members]
            follows = await asyncio.gather(*(_follows(h, plan.epoch) for h in hands if h))
            if all(follows):
                return
            await asyncio.sleep(0.05)


async def _follows(hand: Hand, epoch: int) -> bool:
    try:
        async with asyncio.timeout(ANSWER_S):
            reached = await hand.actor.epoch.remote() >= epoch
    except (ray.exceptions.RayError, TimeoutError):
        return False
    hand.serves = hand.serves or reached
    return bool(reached)


def _clock() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000
