"""The units of one role in virtual time, and what the ingresses know of their ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rayseek.cluster.autoscaling import UnitStats
from rayseek.cluster.dispatch import backlog, pressure
from rayseek.cluster.simulated_unit import SimulatedUnit
from rayseek.cluster.unit_report import MEMORY

_CLOSED = 2**40  # more than any load: a rank that is not there, or takes nothing more


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
    _before: tuple[float, int, int] = (0.0, 0, 0)

    def stats(self, passed: float) -> UnitStats:
        """As UnitReport.to_scale_by has it after so many seconds of pulses."""
        sim, weight = self.sim, 1 - (1 - MEMORY) ** passed
        now = sim.busy_s, sim.steps, sim.prompt_rows
        spent, steps, rows = (a - b for a, b in zip(now, self._before, strict=True))
        self._before = now
        part = min(1.0, spent / passed)
        self.busy = self.busy + weight * (part - self.busy) if self.busy else part
        if rows and spent:
            rate = rows / spent
            self.rate = self.rate + weight * (rate - self.rate) if self.rate else rate
        return UnitStats(
            prompt_tokens_queued=float(sim.tokens_queued.sum()),
            prompt_tokens_per_s=self.rate,
            busy=self.busy,
            running=float(sim.running),
            waiting=float((sim.queued + self.parked).sum()),
            kv_used=float(sim.used.mean()) / sim.pages,
            step_s=spent / steps if steps else 0.0,
        )


class Fleet:
    """Slots are used again, by the next unit."""

    def __init__(self, ranks: int, ingresses: int) -> None:
        self.ranks = ranks
        self.units: list[FleetUnit] = []  # all that are not gone
        self._ours = np.zeros((ingresses, 0), np.int64)  # requests, or tokens of prompts
        self._heard = np.zeros((2, 0), np.int64)  # of each rank, in its last frame
        self._closed = np.zeros(0, np.int64)
        self._at: list[FleetUnit | None] = []  # by slot

    def add(self, number: int, sim: SimulatedUnit, now: float) -> FleetUnit:
        if None not in self._at:
            self._at.append(None)
            ours = np.zeros((len(self._ours), self.ranks), np.int64)
            self._ours = np.hstack([self._ours, ours])
            self._heard = np.hstack([self._heard, ours[:1].repeat(2, 0)])
            self._closed = np.append(self._closed, np.full(self.ranks, _CLOSED))
        slot = self._at.index(None)
        unit = FleetUnit(number, slot, sim, now, np.zeros(self.ranks, np.int64))
        self._at[slot] = unit
        self._ours[:, self._of(unit)] = 0
        self._heard[:, self._of(unit)] = 0
        self.units.append(unit)
        return unit

    def open(self, unit: FleetUnit, serves: bool) -> None:
        unit.serves = serves
        self._closed[self._of(unit)] = 0 if serves else _CLOSED

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
        first, second = pressure(self._ours[ingress], self._heard[0], self._heard[1])
        return self._least(first, second)

    def least_behind(self, ingress: int) -> tuple[FleetUnit, int] | None:
        """Who the dispatcher names to compute a prompt."""
        return self._least(backlog(self._heard[0], self._ours[ingress]))

    def count(self, ingress: int, unit: FleetUnit, rank: int, change: int) -> None:
        """Requests of an ingress on a rank, or tokens of prompts that it was named for."""
        if not unit.gone:
            self._ours[ingress, unit.slot * self.ranks + rank] += change

    def _least(
        self, first: NDArray[np.int64], second: NDArray[np.int64] | None = None
    ) -> tuple[FleetUnit, int] | None:
        if not len(first):
            return None
        first = first + self._closed
        best = int(first.argmin())
        if second is not None:
            (same,) = np.nonzero(first == first[best])
            best = int(same[second[same].argmin()])
        slot, rank = divmod(best, self.ranks)
        unit = self._at[slot]
        return (unit, rank) if unit is not None and unit.serves else None

    def _of(self, unit: FleetUnit) -> slice:
        return slice(unit.slot * self.ranks, (unit.slot + 1) * self.ranks)


def least_aboard(units: Iterable[FleetUnit]) -> FleetUnit:
    """Who goes when one must: who does not serve yet, else who has the fewest requests."""
    return min(units, key=lambda u: (u.serves, len(u.aboard), -u.number))
