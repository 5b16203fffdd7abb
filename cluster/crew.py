"""The processes of a unit as its leader knows them: who is there, who answers, who belongs.

The leader holds a call to each that returns with bad news only, and asks everybody how they are,
each for itself, so that one who hangs delays nobody's answer. What follows from the answers is for
`plan.py` and `unit.py`, what follows from a change for `plan_keeper.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayseek.cluster.config import ExchangeSettings
from rayseek.cluster.dispatch import RankAddress
from rayseek.cluster.plan import ITS_END, Member, Pulse
from rayseek.cluster.rank import Elsewhere, Seat, Started
from rayseek.cluster.spec import RankSpec

log = logging.getLogger("rayseek.unit")

SILENT_S = 5.0
"""Who does not answer for so long hangs, whatever a step may take: the thread that answers does
nothing else."""
STARTING_S = 120.0
"""Likewise of one that starts, once it has answered: importing torch holds up its other threads,
and from a cold disk that takes its time."""
LOOK_S = 1.0
STARTED_LATER_S = 2.0  # than one that did not start
STARVED = 10.0
"""Patience grows by this many times what the slowest answer took lately, up to three times what it
was: milliseconds where there is nothing to wait for, and seconds where processes starve."""
ON_TIME = 1.1
"""A round of asking that took longer than this many times what it should counts the less for it: on
a machine so busy that the leader itself comes late, others cannot answer in time either."""
REFUSED_S = 30.0  # a refusal is told for so long, unless it is repeated
AGREED = ("mode", "micro_batches")  # settings that all must have, or their exchanges do not match


@dataclass(slots=True)
class Hand:
    """One process. serves: it has been part of a group. elsewhere: why it is ours no more.
    broken: the newest epoch whose end it has told. question: a pulse that it was asked for, and
    has not answered for `silent_s` when it was last `looked` for; time.monotonic(). took_s: what
    its last answer took."""

    actor: Any
    started: Started
    watch: asyncio.Task[None] | None = None
    leaving: bool = False
    serves: bool = False
    elsewhere: str | None = None
    broken: int = -1
    question: asyncio.Future[Pulse | None] | None = None
    silent_s: float = 0.0
    looked: float = 0.0
    took_s: float = 0.0
    came: float = field(default_factory=time.monotonic)

    @property
    def member(self) -> Member:
        return self.started.member

    @property
    def address(self) -> RankAddress | None:
        return self.started.address


@dataclass(slots=True)
class Crew:
    """Of the unit of this name. exchange: the leader's settings. alone: an attention rank of it
    needs no group to serve. changed: set when somebody comes, goes, or tells of a broken group.
    loading: attention ranks that are to be waited for, since they live."""

    unit: str
    exchange: ExchangeSettings = field(default_factory=ExchangeSettings)
    alone: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    hands: dict[str, Hand] = field(default_factory=dict)
    loading: set[str] = field(default_factory=set)
    deaths: int = 0
    broken_epoch: int = -1
    slowest_s: float = 0.0  # answer, lately
    refused: tuple[str, float] | None = None  # why a process was, and when

    @property
    def present(self) -> list[Member]:
        return [hand.member for hand in self.hands.values() if not hand.leaving]

    @property
    def somebody_is_silent(self) -> bool:
        """Somebody did not answer in time, when everybody was asked last."""
        return any(hand.question is not None for hand in self.hands.values())

    @property
    def serving(self) -> tuple[RankAddress, ...]:
        return tuple(
            h.address for h in self.hands.values() if h.address and h.serves and not h.leaving
        )

    @property
    def refusal(self) -> list[str]:
        """Why a process was refused lately."""
        lately = self.refused and time.monotonic() - self.refused[1] < REFUSED_S
        return [self.refused[0]] if self.refused and lately else []

    def admits(self, newcomer: Started) -> bool:
        """Whether it may take part; if not, `refusal` says why."""
        why = self.misfit(newcomer)
        if why is not None:
            if self.refused is None or self.refused[0] != why:
                log.error("%s", why)
            self.refused = (why, time.monotonic())
        return why is None

    def join(self, actor: Any, started: Started) -> Hand:
        """Take a process in, and notice its death."""
        name = started.member.name
        hand = self.hands[name] = Hand(actor, started, serves=self.alone)
        hand.watch = asyncio.create_task(self._watch(hand))
        log.info("%s joins %s", name, self.unit)
        if started.member.role == "attention":  # which decides what the others must be
            for other in list(self.hands.values()):
                if other.member.role == "expert" and not self.admits(other.started):
                    self.part(other, "it does not belong here")
        self.changed.set()
        return hand

    def has(self, hand: Hand) -> bool:
        """Whether it is still here: it may have gone, and even have come back, as another."""
        return self.hands.get(hand.member.name) is hand

    def part(self, hand: Hand, why: str) -> None:
        """Go on without it, if it is still here."""
        if not self.has(hand):
            return
        name = hand.member.name
        del self.hands[name]
        if hand.question is not None:
            hand.question.cancel()
        if hand.leaving:
            log.info("%s leaves %s: %s", name, self.unit, why)
        else:
            log.error("%s is lost to %s: %s", name, self.unit, why)
            self.deaths += 1
        self.changed.set()

    async def _watch(self, hand: Hand) -> None:
        """Until it dies. A call that waits in the process fails some 20 ms after its death. Who
        has parted may work for another unit: what breaks there does not concern this one."""
        try:
            while True:
                broken = await hand.actor.next_break.remote(hand.broken)
                if not self.has(hand):
                    return
                hand.broken = broken.epoch
                if broken.epoch > self.broken_epoch:  # else it is late with old news
                    self.broken_epoch = broken.epoch
                    self.changed.set()
        except ray.exceptions.RayError as error:
            self.part(hand, last_line(error))

    def misfit(self, newcomer: Started) -> str | None:
        """Why a process must not take part, or None: it would compute, or exchange, other things.

        The attention ranks decide what is right. None are there: nobody contradicts.
        """
        name = newcomer.member.name
        theirs = {s: getattr(newcomer.exchange, s) for s in AGREED}
        ours = {s: getattr(self.exchange, s) for s in AGREED}
        differing = [f"exchange.{s} is {theirs[s]} instead of {ours[s]}"
                     for s in AGREED if theirs[s] != ours[s]]  # fmt: skip
        known = next(
            (h.started.fingerprint for h in self.hands.values() if h.member.role == "attention"),
            newcomer.fingerprint,
        )
        if newcomer.fingerprint != known:
            differing.append(
                f"weights, files or arithmetic are {newcomer.fingerprint} instead of {known}"
            )
        if not differing:
            return None
        return (
            f"{name} is not taken into {self.unit}: its {', and its '.join(differing)}; start all "
            "ranks of a unit from the same checkpoint, config and version"
        )

    async def pulses(self, within_s: float, patience_s: float) -> dict[str, Pulse | None]:
        """Of all who answer within this time, and None for those silent for longer than patience.

        Who is in between is left out, and answers the same question later.
        """
        hands = dict(self.hands)
        for hand in hands.values():
            if hand.question is None:
                hand.question = asyncio.ensure_future(pulse_of(hand, self.unit))
                hand.silent_s, hand.looked = 0.0, time.monotonic()
        questions = [hand.question for hand in hands.values() if hand.question]
        if questions:
            await asyncio.wait(questions, timeout=within_s)
        now = time.monotonic()
        answers: dict[str, Pulse | None] = {}
        answered = [h.took_s for h in self.hands.values() if h.question and h.question.done()]
        self.slowest_s = max([self.slowest_s / 2, *answered])
        patience_s = min(patience_s + STARVED * self.slowest_s, 3 * patience_s)
        for name, hand in hands.items():
            if not self.has(hand):
                continue  # it parted meanwhile, and its question was cancelled
            if hand.question is not None and hand.question.done():
                answers[name], hand.question = hand.question.result(), None
                continue
            took, due = now - hand.looked, within_s * ON_TIME
            hand.silent_s += took if took <= due else due**2 / took
            hand.looked = now
            if hand.silent_s >= patience_s:
                answers[name] = None
        return answers


def spawn(kind: type[Seat], name: str, spec: RankSpec, bundle: int) -> Any:
    """The actor of a rank, in this bundle of the caller's placement group. `name` is what the
    dashboard calls it. Its CPU is what the group keeps free, not a resource. It has no runtime
    environment, so that it may get one of the processes that Ray starts in advance: that is up to a
    second."""
    options: dict[str, Any] = {"name": name, "num_cpus": 0, "num_gpus": spec.gpus}
    group = ray.util.get_current_placement_group()
    if group is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=bundle
        )
    return ray.remote(kind).options(**options).remote(name, spec)


async def start(actor: Any, within_s: float, on_sign: Callable[[], None] | None = None) -> Started:
    """What its `start` says. Raises TimeoutError if that takes longer, or if the process hangs in
    it: it is asked for signs of life from its first one on, for until then it may wait for a place.
    on_sign: called at the first.
    """
    starting = asyncio.ensure_future(actor.start.remote())
    starting.add_done_callback(lambda done: done.cancelled() or done.exception())  # it is seen
    try:
        async with asyncio.timeout(within_s):
            await actor.epoch.remote()
            if on_sign is not None:
                on_sign()
            while not starting.done():
                async with asyncio.timeout(STARTING_S):
                    await actor.epoch.remote()
                await asyncio.wait([starting], timeout=LOOK_S)
            started: Started = starting.result()
            return started
    finally:
        starting.cancel()


async def pulse_of(hand: Hand, unit: str) -> Pulse | None:
    """None: it says that it cannot go on."""
    asked = time.monotonic()
    try:
        pulse: Pulse = await hand.actor.pulse.remote(unit)
        hand.took_s = time.monotonic() - asked
        return pulse
    except Elsewhere as error:
        hand.elsewhere = last_line(error)
    except ray.exceptions.RayTaskError as error:
        log.error("%s: %s", hand.member.name, last_line(error))
        return None
    except ray.exceptions.RayError:
        pass  # it died: its watch knows
    return Pulse(-1, 0, ITS_END, waits=False, idle=True, since_s=0)


def last_line(error: BaseException) -> str:
    """What an error says, without the traceback that Ray puts before it."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__
