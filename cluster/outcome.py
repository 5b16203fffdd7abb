"""What a simulation found: latencies, tokens, GPU hours, what limited it."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayseek.cluster.capacity import Targets
from rayseek.cluster.config import Role
from rayseek.cluster.simulated_fleet import Fleet, FleetUnit
from rayseek.cluster.traffic import Arrival

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Moment:
    """At a time: units of each role (that are paid for), and tokens so far."""

    at: float
    units: dict[Role, int]
    tokens: float


@dataclass(slots=True)
class Outcome:
    """unit_s: seconds that units were there, by role. seconds, tokens, unit_s: until the time
    that counts was over; requests are all that came, and all are answered.

    moved: requests whose unit died. limited: part of the units' time, by what limited the steps.
    held_up: plans that left prompts waiting, by why.
    """

    targets: Targets
    unit_s: dict[Role, float]
    seconds: float = 0.0
    tokens: float = 0.0
    requests: int = 0
    deaths: int = 0
    moved: int = 0
    preemptions: int = 0
    moments: list[Moment] = field(default_factory=list)
    limited: dict[Role, Counter[str]] = field(default_factory=dict)
    held_up: dict[Role, Counter[str]] = field(default_factory=dict)
    _arrived: Any = field(default_factory=lambda: array("d"))
    _waited: Any = field(default_factory=lambda: array("d"))
    _between: Any = field(default_factory=lambda: array("d"))  # of answers of one token: nan
    _tokens_gone: float = 0.0
    _closed: bool = False

    # ---- while it runs ----

    def ended(self, arrival: Arrival, first: float, now: float) -> None:
        self._arrived.append(arrival.at)
        self._waited.append(first - arrival.at)
        more = arrival.output - 1
        self._between.append((now - first) / more if more else np.nan)

    def gone(self, role: Role, unit: FleetUnit, now: float) -> None:
        """A unit has ended, or the time has."""
        if not self._closed:
            self.unit_s[role] += now - unit.born
        self._tokens_gone += unit.sim.tokens
        self._note(role, unit)

    def close(self, now: float, fleets: Mapping[Role, Fleet]) -> None:
        self.seconds, self.tokens = now, self.tokens_of(fleets)
        for role, fleet in fleets.items():
            self.unit_s[role] += sum(now - unit.born for unit in fleet.units)
        self._closed = True

    def collect(self, fleets: Mapping[Role, Fleet]) -> None:
        """At the very end."""
        for role, fleet in fleets.items():
            for unit in fleet.units:
                self._note(role, unit)

    def tokens_of(self, fleets: Mapping[Role, Fleet]) -> float:
        return self._tokens_gone + sum(u.sim.tokens for f in fleets.values() for u in f.units)

    def _note(self, role: Role, unit: FleetUnit) -> None:
        self.preemptions += unit.sim.preemptions
        self.limited.setdefault(role, Counter()).update(unit.sim.limited)
        self.held_up.setdefault(role, Counter()).update(unit.sim.held_up)

    # ---- afterwards ----

    @property
    def answered(self) -> int:
        return len(self._arrived)

    @property
    def arrived(self) -> Floats:
        """Of each answered request; `first_token` and `between_tokens` have the same order."""
        return np.asarray(self._arrived)

    @property
    def first_token(self) -> Floats:
        """Seconds that each request waited for it."""
        return np.asarray(self._waited)

    @property
    def between_tokens(self) -> Floats:
        """Seconds from token to token in each answer, in the mean; nan for those of one token."""
        return np.asarray(self._between)

    @property
    def violations(self) -> Floats:
        """1 for each request that missed a target, else 0."""
        missed = self.first_token > self.targets.first_token_s
        missed |= self.between_tokens > self.targets.token_s
        found: Floats = missed.astype(np.float64)
        return found

    @property
    def tokens_s(self) -> float:
        return self.tokens / self.seconds

    def mean_units(self, role: Role) -> float:
        return self.unit_s[role] / self.seconds
