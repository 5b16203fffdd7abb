"""Requests as they come over time: steady, at random, in a daily wave, in bursts, or as recorded.

Made a second at a time, so an hour of a large cluster needs no memory. The same arguments give the
same requests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from rayseek.cluster.capacity import Load

Shape: TypeAlias = Literal["even", "poisson", "wave", "burst"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
DAY_S = 86400.0
BURST_S, BURST_EVERY_S = 300.0, 3600.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request at `at` seconds: tokens of its prompt, of these in a cache, and of its answer."""

    at: float
    prompt: int
    output: int
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """`load` has the means. peak: the highest rate over the mean, of a wave or in bursts.

    spread: standard deviation of the lengths over their mean (log-normal); 0: all are equal.
    longest: most tokens of a prompt and its answer. A wave is at its lowest at 0 and at its mean
    over each `period_s`.
    """

    load: Load
    shape: Shape = "poisson"
    peak: float = 1.5
    spread: float = 0.5
    longest: int = 131072
    period_s: float = DAY_S

    def rate(self, at: float) -> float:
        """Requests/s."""
        mean = self.load.requests_s
        if self.shape == "wave":
            return mean * (1 - (self.peak - 1) * math.cos(2 * math.pi * at / self.period_s))
        if self.shape == "burst":
            part = BURST_S / BURST_EVERY_S
            between = max(0.0, (1 - part * self.peak) / (1 - part))
            late = at % BURST_EVERY_S >= BURST_EVERY_S - BURST_S
            return mean * (self.peak if late else between)
        return mean

    def arrivals(self, seconds: float, seed: int = 0) -> Iterator[Arrival]:
        """In order of time. Raises ValueError for a peak that no such traffic has."""
        if self.shape == "wave" and not 1 <= self.peak <= 2:
            raise ValueError(f"a wave's peak is 1 to 2 times its mean, not {self.peak:g}")
        if self.shape == "burst" and not 1 <= self.peak <= BURST_EVERY_S / BURST_S:
            raise ValueError(f"a burst's peak is 1 to 12 times the mean, not {self.peak:g}")
        random, owed = np.random.default_rng(seed), 0.5
        for second in range(math.ceil(seconds)):
            rate = self.rate(second + 0.5)
            if self.shape == "even":
                owed += rate
                count = int(owed)
                owed -= count
                times = second + (np.arange(count) + 0.5) / max(1, count)
            else:
                count = int(random.poisson(rate))
                times = second + np.sort(random.random(count))
            prompts = self._lengths(random, self.load.prompt, count)
            outputs = self._lengths(random, self.load.output, count)
            for at, prompt, output in zip(
                times.tolist(), prompts.tolist(), outputs.tolist(), strict=True
            ):
                if at < seconds:
                    answer = min(output, self.longest - 1)
                    asked = min(prompt, self.longest - answer)
                    yield Arrival(at, asked, answer, int(asked * self.load.cached))

    def _lengths(self, random: np.random.Generator, mean: int, count: int) -> Any:
        if not self.spread:
            return np.full(count, mean)
        variance = math.log1p(self.spread**2)
        drawn = random.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), count)
        return np.maximum(1, np.rint(drawn)).astype(np.int64)


def recorded(lines: Iterable[str]) -> list[Arrival]:
    """Out of JSON lines: objects with `at` (s), `prompt`, `output` and perhaps `cached`, or an
    ingress's log, whose other lines are passed over. The first request comes at 0.

    Raises ValueError.
    """
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line) if line.strip() else {}
            arrival = _arrival(entry)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"line {number} of the trace: {error!r}") from None
        if arrival is not None:
            found.append(arrival)
    if not found:
        raise ValueError("the trace has no requests")
    found.sort(key=lambda a: a.at)
    began = found[0].at
    return [Arrival(a.at - began, a.prompt, a.output, a.cached) for a in found]


def _arrival(entry: dict[str, Any]) -> Arrival | None:
    if "at" in entry:
        prompt, output = int(entry["prompt"]), int(entry["output"])
        arrival = Arrival(float(entry["at"]), prompt, output, int(entry.get("cached", 0)))
    elif "prompt_tokens" in entry and entry.get("tokens"):
        ended = datetime.fromisoformat(entry["time"]).timestamp()
        arrival = Arrival(
            ended - entry.get("seconds", {}).get("request", 0.0), int(entry["prompt_tokens"]),
            int(entry["tokens"]), int(entry.get("cached_tokens", 0)),
        )  # fmt: skip
    else:
        return None
    if min(arrival.prompt, arrival.output) < 1 or not 0 <= arrival.cached <= arrival.prompt:
        raise ValueError(f"no such request: {arrival}")
    return arrival
