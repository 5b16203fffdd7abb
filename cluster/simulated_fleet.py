"""The units of one role in virtual time, and what the ingresses know of their ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

import numpy as np
from numpy.typing import NDArray

from rayseek.cluster.autoscaling import UnitStats
from rayseek.cluster.dispatch import backlog, candidates, pressure
from rayseek.cluster.simulated_unit import SimulatedUnit
from rayseek.cluster.unit_report import MEMORY


@dataclass(eq=False, slots=True)
class FleetUnit:
    """A unit from the decision that it should be to its end. slot: where its ranks are in the
    fleet's arrays. parked: requests on each rank that wait for their pages."""

    number: int
    slot: int
    sim: SimulatedUnit
    born: float
    parked: NDArray[np.int64]
    serves: bool = False
    leaves: bool = False  # it takes nothing more, and ends when it is empty
    gone: bool = False
    stepping: bool = False
    aboard: set[int] = field(default_factory=set)  # numbers of requests
    busy: float = 0.0
    rate: float = 0.0
    _before: tuple[float, float, int, int] = (0.0, 0.0, 0, 0)

    def stats(self, passed: float) -> UnitStats:
        """As UnitReport.to_scale_by has it after so many seconds of pulses."""
        sim, weight = self.sim, 1 - (1 - MEMORY) ** passed
        now = sim.busy_s, sim.step_s, sim.steps, sim.prompt_rows
        busy, spent, steps, rows = (a - b for a, b in zip(now, self._before, strict=True))
        self._before = now
        part = min(1.0, busy / passed)
        self.busy = self.busy + weight * (part - self.busy) if self.busy else part
        if rows and busy:
            rate = rows / busy
            self.rate = self.rate + weight * (rate - self.rate) if self.rate else rate
        return UnitStats(
            prompt_tokens_queued=float(sim.tokens_queued.sum()),
            prompt_tokens_per_s=self.rate,
            busy=self.busy,
            running=float(sim.running),
            waiting=float(sim.queued.sum()),
            parked=float(self.parked.sum()),
            places=float(len(self.parked) * sim.limits.max_batch),
            kv_used=float(sim.used.mean()) / sim.pages,
            step_s=spent / steps if steps else 0.0,
        )


class Fleet:
    """Slots are used again, by the next unit."""

    def __init__(self, ranks: int, ingresses: int, random: Random) -> None:
        self._random = random
        self.ranks = ranks
        self.units: list[FleetUnit] = []  # all that are not gone
        self._ours = np.zeros((ingresses, 0), np.int64)  # requests, or tokens of prompts
        self._heard = np.zeros((2, 0), np.int64)  # of each rank, in its last frame
        self._open = np.zeros(0, np.bool_)  # ranks that take requests
        self._at: list[FleetUnit | None] = []  # by slot

    def add(self, number: int, sim: SimulatedUnit, now: float) -> FleetUnit:
        if None not in self._at:
            self._at.append(None)
            ours = np.zeros((len(self._ours), self.ranks), np.int64)
            self._ours = np.hstack([self._ours, ours])
            self._heard = np.hstack([self._heard, ours[:1].repeat(2, 0)])
            self._open = np.append(self._open, np.zeros(self.ranks, np.bool_))
        slot = self._at.index(None)
        unit = FleetUnit(number, slot, sim, now, np.zeros(self.ranks, np.int64))
        self._at[slot] = unit
        self._ours[:, self._of(unit)] = 0
        self._heard[:, self._of(unit)] = 0
        self.units.append(unit)
        return unit

    def open(self, unit: FleetUnit, serves: bool) -> None:
        unit.serves = serves
        self._open[self._of(unit)] = serves

    def remove(self, unit: FleetUnit) -> None:
        self.open(unit, False)
        unit.gone = True
        self._at[unit.slot] = None
        self.units.remove(unit)

    def hear(self, unit: FleetUnit, prompts: bool) -> None:
        """A frame with the unit's load arrives. prompts: it computes them for others."""
        where, sim = self._of(unit), unit.sim
        self._heard[0, where] = sim.tokens_queued if prompts else sim.queued + unit.parked
        self._heard[1, where] = sim.used

    def least_pressed(self, ingress: int) -> tuple[FleetUnit, int] | None:
        """Where the dispatcher sends a request: a unit and its rank. None: nobody serves."""
        (there,) = np.nonzero(self._open)
        first, second = pressure(self._ours[ingress], self._heard[0], self._heard[1])
        for values in (first, second):
            if len(there) > 1:
                of = values[there]
                there = there[of == of.min()]
        return self._rank(int(there[self._random.randrange(len(there))])) if len(there) else None

    def least_behind(self, ingress: int) -> tuple[FleetUnit, int] | None:
        """Who the dispatcher names to compute a prompt."""
        (there,) = np.nonzero(self._open)
        behind = backlog(self._heard[0], self._ours[ingress])
        two = [int(there[i]) for i in candidates(len(there), self._random)]
        return self._rank(min(two, key=behind.__getitem__)) if two else None

    def count(self, ingress: int, unit: FleetUnit, rank: int, change: int) -> None:
        """Requests of an ingress on a rank, or tokens of prompts that it was named for."""
        if not unit.gone:
            self._ours[ingress, unit.slot * self.ranks + rank] += change

    def _rank(self, index: int) -> tuple[FleetUnit, int]:
        slot, rank = divmod(index, self.ranks)
        unit = self._at[slot]
        assert unit is not None
        return unit, rank

    def _of(self, unit: FleetUnit) -> slice:
        return slice(unit.slot * self.ranks, (unit.slot + 1) * self.ranks)


def least_aboard(units: Iterable[FleetUnit]) -> FleetUnit:
    """Who goes when one must: who does not serve yet, else who has the fewest requests."""
    return min(units, key=lambda u: (u.serves, len(u.aboard), -u.number))
