"""A cluster in virtual time: requests come, units start, drain and die, policies decide.

What decides is the real thing: the dispatcher's choice, the scheduler's plans, the autoscaling
policy; a cost model says how long steps take. Not simulated: HTTP, fairness between keys, refusals
(here an ingress's queue may grow without end), hits in a cache that fills (the part is given), a
transfer's bytes (it takes HAND_OVER_S), deaths of single ranks, and placement: experts are in
balance.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from rayseek.cluster.autoscaling import Policy, UnitStats, autoscaling_policy
from rayseek.cluster.capacity import Targets, tokens_kept, unit_cost
from rayseek.cluster.config import Config, Role
from rayseek.cluster.fit import rank_memories
from rayseek.cluster.layout import UNIT_NAMES
from rayseek.cluster.outcome import Moment, Outcome
from rayseek.cluster.scheduler import Limits
from rayseek.cluster.simulated_fleet import Fleet, FleetUnit, least_aboard
from rayseek.cluster.simulated_unit import Job, SimulatedUnit
from rayseek.cluster.step_times import Roofline, StepTimes
from rayseek.cluster.traffic import Arrival
from rayseek.kernels.kv_format import PAGE_TOKENS
from rayseek.model.config import ModelConfig

HAND_OVER_S = 0.02  # from a prompt's last step to its last page elsewhere: pages go step by step
LOOK_S = 5.0  # between two looks of the policy
MOMENTS = 240  # of an outcome's timeline, at most
FOUR_IN_THE_MORNING = datetime(2025, 3, 24, 20, tzinfo=UTC)  # in Shanghai


@dataclass(frozen=True, slots=True)
class Conditions:
    """start_s: from the decision to a unit's first step. lifetime_h: mean hours of a unit until
    it dies and another starts; None: none dies. begins: what the clock shows at 0.

    part: of so many ranks of a unit one is simulated, with its share of the requests.
    """

    start_s: float = 300.0
    lifetime_h: float | None = None
    seed: int = 0
    part: int = 1
    begins: datetime = FOUR_IN_THE_MORNING


@dataclass(eq=False, slots=True)
class _Flight:
    """A request on its way. named: rank that it is counted for as one to compute its prompt."""

    number: int
    arrival: Arrival
    ingress: int
    job: Job | None = None
    unit: FleetUnit | None = None
    rank: int = 0
    prompt: Job | None = None
    named: tuple[FleetUnit, int, int] | None = None
    first: float = math.nan
    parked: bool = False


class Simulation:
    """One run: make it, then call `run` once."""

    def __init__(
        self,
        config: Config,
        model: ModelConfig,
        times: Mapping[Role, StepTimes],
        targets: Targets,
        conditions: Conditions = Conditions(),
        accepted: float = 0.85,
    ) -> None:
        """Scales by config.autoscaling. accepted: part of the drafts that come true."""
        self._config, self._times, self._on = config, times, conditions
        self._kept = tokens_kept(config, accepted)
        self._pages = {
            m.of: m.tokens // PAGE_TOKENS
            for m in rank_memories(config, model)
            if m.role == "attention"
        }
        self._random = random.Random(conditions.seed)
        self._ingresses = config.ingress.replicas
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._events_so_far = self._units_so_far = 0
        self._aims = {role: unit.units for role, unit in config.units.items()}
        self._fleets = {
            role: Fleet(
                max(1, unit.attention_ranks // conditions.part), self._ingresses, self._random
            )
            for role, unit in config.units.items()
        }
        settings = autoscaling_policy(config)
        self._policy = Policy(**settings["policy_kwargs"]) if settings else None
        self._flights: dict[int, _Flight] = {}
        self._homeless: list[_Flight] = []
        self._lines: list[deque[_Flight]] = [deque() for _ in range(self._ingresses)]
        self._inside = [0] * self._ingresses  # requests of each that have left its line
        self._slots = 0  # of each
        self._coming: Iterator[Arrival] = iter(())
        self._until = 0.0
        self._out = Outcome(targets, dict.fromkeys(self._fleets, 0.0))

    def run(self, arrivals: Iterable[Arrival], seconds: float) -> Outcome:
        """Until all requests have their answers; units and tokens count for so many seconds.

        Raises ValueError for a request that no rank has room for.
        """
        self._coming, self._until = iter(arrivals), seconds
        for role, count in self._aims.items():
            for _ in range(count):
                self._ready(self._new_unit(role))
        self._next_arrival()
        self._at(0.0, self._look, None)
        self._at(seconds, self._close, None)
        pause = max(seconds / MOMENTS, 1.0)
        self._at(pause, self._record, pause)
        while self._events:
            self._now, _, act, subject = heapq.heappop(self._events)
            act(subject)
        self._out.collect(self._fleets)
        return self._out

    def _at(self, when: float, act: Callable[[Any], None], subject: Any) -> None:
        self._events_so_far += 1
        heapq.heappush(self._events, (when, self._events_so_far, act, subject))

    @property
    def _going_on(self) -> bool:
        return bool(self._now < self._until or self._flights)

    # ---- requests ----

    def _next_arrival(self) -> None:
        arrival = next(self._coming, None)
        if arrival is not None:
            self._at(arrival.at, self._arrive, arrival)

    def _arrive(self, arrival: Arrival) -> None:
        self._out.requests += 1
        total, room = arrival.prompt + arrival.output, self._pages["decode"] * PAGE_TOKENS
        if total > room:
            raise ValueError(
                f"a request of {total:,} tokens does not fit into the {room:,} of a decode rank's "
                "pages"
            )
        number = self._out.requests
        flight = _Flight(number, arrival, self._random.randrange(self._ingresses))
        self._flights[number] = flight
        self._lines[flight.ingress].append(flight)
        self._admit(flight.ingress)
        self._next_arrival()

    def _admit(self, ingress: int) -> None:
        """As FairQueue does where all have one key."""
        line = self._lines[ingress]
        while line and self._inside[ingress] < self._slots:
            self._inside[ingress] += 1
            flight = line.popleft()
            self._dispatch(flight, flight.arrival.prompt, flight.arrival.output)

    def _count_places(self) -> None:
        """Units came or went: as Ingress does when it looks for ranks."""
        fleet, batch = self._fleets["decode"], self._config.engine_of("decode").max_batch
        places = batch * fleet.ranks * sum(unit.serves for unit in fleet.units)
        self._slots = -(-places // self._ingresses) or self._slots
        for ingress in range(self._ingresses):
            self._admit(ingress)

    def _dispatch(self, flight: _Flight, known: int, left: int) -> None:
        """As Dispatcher does, and PageFetcher at the rank that it chooses."""
        flight.job = Job(flight.number, known, left, 0, flight)
        found = self._fleets["decode"].least_pressed(flight.ingress)
        if found is None:
            self._homeless.append(flight)
            return
        unit, flight.rank = found
        flight.unit = unit
        unit.aboard.add(flight.number)
        self._fleets["decode"].count(flight.ingress, unit, flight.rank, 1)
        cached = flight.arrival.cached
        source = None
        if "prefill" in self._fleets:
            source = self._fleets["prefill"].least_behind(flight.ingress)
        if source is not None:
            flight.named = (*source, known)
            self._fleets["prefill"].count(flight.ingress, *source, known)
        if source is None or known < self._config.transfer.min_prompt_tokens:
            flight.job.cached = cached
            self._unpark(flight)
            return
        flight.parked = True
        unit.parked[flight.rank] += 1
        computes, rank = source
        flight.prompt = Job(flight.number, known, 0, cached, flight)
        computes.aboard.add(flight.number)
        computes.sim.add(flight.prompt, rank)
        self._wake("prefill", computes)

    def _unpark(self, flight: _Flight) -> None:
        """Its pages are there, or will not come: it queues."""
        unit, job = flight.unit, flight.job
        assert unit is not None and job is not None
        if flight.parked:
            unit.parked[flight.rank] -= 1
            flight.parked = False
        unit.sim.add(job, flight.rank)
        self._wake("decode", unit)

    def _handed_over(self, prompt: Job) -> None:
        flight = prompt.owner
        if flight.prompt is prompt and flight.parked:
            flight.prompt = None
            flight.job.cached = flight.job.known
            self._unpark(flight)

    def _first_token(self, flight: _Flight) -> None:
        if flight.named is not None:
            unit, rank, tokens = flight.named
            self._fleets["prefill"].count(flight.ingress, unit, rank, -tokens)
            flight.named = None
        if math.isnan(flight.first):
            flight.first = self._now

    def _finished(self, flight: _Flight) -> None:
        unit = flight.unit
        assert unit is not None
        unit.aboard.discard(flight.number)
        self._fleets["decode"].count(flight.ingress, unit, flight.rank, -1)
        del self._flights[flight.number]
        self._inside[flight.ingress] -= 1
        self._admit(flight.ingress)
        self._out.ended(flight.arrival, flight.first, self._now)

    # ---- steps ----

    def _wake(self, role: Role, unit: FleetUnit) -> None:
        if not unit.stepping:
            self._begin((role, unit))

    def _begin(self, who: tuple[Role, FleetUnit]) -> None:
        role, unit = who
        ends = unit.sim.begin(self._now, self._events[0][0] if self._events else math.inf)
        unit.stepping = ends < math.inf
        if unit.stepping:
            self._at(ends, self._end, who)

    def _end(self, who: tuple[Role, FleetUnit]) -> None:
        role, unit = who
        if unit.gone:  # it died in the middle of the step
            return
        begun, done = unit.sim.end()
        if role == "decode":
            for job in begun:
                self._first_token(job.owner)
            for job in done:
                self._finished(job.owner)
        else:
            for job in done:
                unit.aboard.discard(job.number)
                self._at(self._now + HAND_OVER_S, self._handed_over, job)
        self._fleets[role].hear(unit, role == "prefill")
        if unit.leaves and not unit.aboard:
            self._remove(role, unit)
            return
        self._begin(who)

    # ---- units ----

    def _new_unit(self, role: Role) -> tuple[Role, FleetUnit]:
        engine, fleet = self._config.engine_of(role), self._fleets[role]
        limits = Limits(engine.max_batch, engine.step_tokens, engine.chunk_tokens)
        sim = SimulatedUnit(fleet.ranks, limits, self._pages[role], self._kept, self._times[role])
        self._units_so_far += 1
        return role, fleet.add(self._units_so_far, sim, self._now)

    def _ready(self, who: tuple[Role, FleetUnit]) -> None:
        role, unit = who
        if unit.gone:
            return
        self._fleets[role].open(unit, True)
        if self._on.lifetime_h:
            life = self._random.expovariate(1 / (self._on.lifetime_h * 3600))
            self._at(self._now + life, self._die, who)
        if role == "decode":
            homeless, self._homeless = self._homeless, []
            for flight in homeless:
                assert flight.job is not None
                self._dispatch(flight, flight.job.known, flight.job.left)
            self._count_places()

    def _die(self, who: tuple[Role, FleetUnit]) -> None:
        """Its requests go on elsewhere; prompts are computed where they are continued."""
        role, unit = who
        if unit.gone or not self._going_on:
            return
        self._out.deaths += 1
        jobs = {job.number: job for job in unit.sim.jobs()}
        self._remove(role, unit)
        if not unit.leaves:
            self._start(role, 1)
        for number in sorted(unit.aboard):
            flight = self._flights[number]
            if role == "prefill":
                if flight.prompt is jobs.get(number):
                    flight.prompt = None
                    self._unpark(flight)
            elif flight.job is not None:
                self._out.moved += 1
                flight.parked, flight.prompt = False, None
                self._first_token_is_late(flight)
                self._dispatch(flight, flight.job.known, flight.job.left)

    def _first_token_is_late(self, flight: _Flight) -> None:
        """The rank that was named is not counted any more: another one will be."""
        first = flight.first
        self._first_token(flight)
        flight.first = first

    def _start(self, role: Role, count: int) -> None:
        for _ in range(count):
            self._at(self._now + self._on.start_s, self._ready, self._new_unit(role))

    def _remove(self, role: Role, unit: FleetUnit) -> None:
        self._fleets[role].remove(unit)
        self._out.gone(role, unit, min(self._now, self._until))
        self._count_places()

    def _look(self, _: None) -> None:
        """The policy's turn."""
        if self._policy is not None:
            stats: dict[str, list[UnitStats]] = {}
            have = {}
            for role, fleet in self._fleets.items():
                name = UNIT_NAMES[role]
                there = [u for u in fleet.units if u.serves]
                outside = sum(map(len, self._lines)) / max(1, len(there))
                stats[name] = [replace(u.stats(LOOK_S), outside=outside) for u in there]
                have[name] = self._aims[role]
            moment = self._on.begins + timedelta(seconds=self._now)
            wanted = self._policy.decide(self._now, moment, stats, have)
            for role in self._fleets:
                self._resize(role, wanted[UNIT_NAMES[role]])
        if self._going_on:
            self._at(self._now + LOOK_S, self._look, None)

    def _resize(self, role: Role, wanted: int) -> None:
        staying = [u for u in self._fleets[role].units if not u.leaves]
        self._aims[role] = wanted
        self._start(role, wanted - len(staying))
        for _ in range(len(staying) - wanted):
            unit = least_aboard(staying)
            staying.remove(unit)
            unit.leaves = True
            self._fleets[role].open(unit, False)
            self._count_places()
            if not unit.aboard and not unit.stepping:
                self._remove(role, unit)

    # ---- the record ----

    def _record(self, pause: float) -> None:
        units = {role: len(fleet.units) for role, fleet in self._fleets.items()}
        tokens = self._out.tokens_of(self._fleets)
        self._out.moments.append(Moment(self._now, units, tokens))
        if self._now + pause <= self._until:
            self._at(self._now + pause, self._record, pause)

    def _close(self, _: None) -> None:
        """The time that counts is over; what is under way is still answered."""
        self._out.close(self._until, self._fleets)


def rooflines(config: Config, model: ModelConfig) -> dict[Role, StepTimes]:
    """Step times of a GPU config's units, by the cost model."""
    return {
        role: Roofline(unit_cost(config, model, role), config.engine.draft_tokens)
        for role in config.units
    }
