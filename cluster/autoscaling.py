"""How many units and expert ranks the load needs. Pure functions, and Serve's policy around them.

Demand is a number of units, with a fraction: what the units do now, over what one of them should
do. `Steady` turns demands into decisions: up when more was expected all through the last `up_s`,
by how demand grows and how long units take to start; down by one when less was enough all through
the last `down_s`, and then not again before the one that went has drained. Ingress replicas are
fixed: their proxies reload when they change.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any

from rayseek.cluster.config import Config
from rayseek.cluster.layout import UNIT_NAMES
from rayseek.cluster.scaling_settings import AutoscalingSettings, Range

MARGIN = 0.15  # of the demand: a unit goes only if those that stay have this much room
BALANCED = 1.2  # an imbalance above this is for the balancer to mend, not for more ranks
CROWD = 0.1  # of those that run: fewer waiting only wait for the next step
GRAIN_S = 1.0  # demands closer than this are one sample
START_S = 60.0  # that a unit takes to start, until one has been seen to
TREND_S = 60.0  # for so long, at least, it is looked back to see how demand grows
MOST_GROWTH = 1.5  # that a trend is believed
FEWEST = 6  # samples that tell


@dataclass(frozen=True, slots=True)
class UnitStats:
    """What a unit's leader reports (UnitReport.to_scale_by).

    prompt_tokens_per_s: that its ranks compute while they compute prompts; busy: part of the time
    that they compute; step_s: of its slowest rank; kv_used: part of its pages. waiting: in its
    engines, without those that are parked until others have computed their prompts; outside: its
    share of what the ingresses hold back, which give it no more than it has places. expert_busy:
    part of the time that its dedicated expert ranks compute, on average.
    """

    prompt_tokens_queued: float = 0.0
    prompt_tokens_per_s: float = 0.0
    busy: float = 0.0
    running: float = 0.0
    waiting: float = 0.0
    parked: float = 0.0
    outside: float = 0.0
    places: float = 0.0
    kv_used: float = 0.0
    step_s: float = 0.0
    experts: float = 0.0
    expert_busy: float = 0.0
    expert_imbalance: float = 1.0


def prefill_demand(units: Sequence[UnitStats], aims: AutoscalingSettings) -> float:
    """Units that keep up with the prompts that come, and clear the queue within `queue_s`."""
    rates = [u.prompt_tokens_per_s for u in units if u.prompt_tokens_per_s > 0]
    queued = sum(u.prompt_tokens_queued for u in units)
    keeping_up = sum(u.busy for u in units) / aims.prefill_busy
    if not rates:  # nobody has computed a prompt yet: how fast they are is unknown
        return float(len(units))
    return keeping_up + max(0.0, queued / (sum(rates) / len(rates)) / aims.queue_s - 1)


def decode_demand(units: Sequence[UnitStats], aims: AutoscalingSettings) -> float:
    """Units whose pages are `kv_used` full, whose steps take `inter_token_s`, where few wait.

    Those that wait outside need places only as far as the places are not taken by sequences that
    wait for prefill units: the same part of them would only wait for those as well.

    A step is taken to shrink as its batch does: too much to hope for when steps are mostly fixed
    cost, so an aim that a lone sequence misses leads to as many units as are allowed.
    """
    pages = sum(u.kv_used for u in units) / aims.kv_used
    steps = sum(u.step_s for u in units if u.running) / aims.inter_token_s
    running, waiting = sum(u.running for u in units), sum(u.waiting for u in units)
    parked, outside = sum(u.parked for u in units), sum(u.outside for u in units)
    crowded = waiting > CROWD * running > 0  # though ingresses give no more than there are places
    room = running if crowded else sum(u.places for u in units)
    wanted = running + waiting + outside * running / max(1.0, running + parked)
    return max(pages, steps, len(units) * wanted / room if room else 0.0)


def expert_demand(units: Sequence[UnitStats], aims: AutoscalingSettings) -> float:
    """Expert ranks of each unit, such that the busiest computes `expert_busy` of the time."""
    return max(
        (
            u.experts * u.expert_busy * min(u.expert_imbalance, BALANCED) / aims.expert_busy
            for u in units
        ),
        default=0.0,
    )


@dataclass(frozen=True, slots=True)
class Steady:
    """Demands lately, oldest first, as (time, demand, what it is expected to become), and how long
    units take to start."""

    samples: tuple[tuple[float, float, float], ...] = ()
    began: float = math.inf
    went: float = -math.inf  # when one was let go
    asked: tuple[float, int] | None = None  # when one was that has not come, and beside how many
    start_s: float = START_S

    def decide(
        self,
        now: float,
        demand: float,
        have: int,
        serving: int,
        bounds: Range,
        aims: AutoscalingSettings,
    ) -> tuple[int, Steady]:
        """How many there should be, and the state to decide with next time.

        have: that are wanted so far; serving: that answer.
        """
        asked, start_s = self.asked, self.start_s
        if asked is not None and serving > asked[1]:
            start_s, asked = now - asked[0], None
        ahead = aims.up_s + start_s
        back = max(ahead, TREND_S)
        samples = tuple(s for s in self.samples if s[0] >= now - max(back, aims.down_s))
        more = ahead * growth([*samples, (now, demand)], now - back)
        if now - self.began < back:  # the load itself has just begun
            more = 0.0
        expected = min(demand + more, MOST_GROWTH * demand)
        sample = now, demand, expected
        if samples and now - samples[-1][0] < GRAIN_S:
            at, highest, lowest = samples[-1]
            sample = at, max(demand, highest), min(expected, lowest)
            samples = samples[:-1]
        samples = (*samples, sample)
        after = replace(
            self, samples=samples, began=min(self.began, now), asked=asked, start_s=start_s
        )
        count = have
        if now - after.began >= aims.up_s:
            lately = _since(samples, now - aims.up_s)
            count = max(count, math.ceil(min(s[2] for s in lately) - 1e-9))
        if count == have and now - after.began >= aims.down_s:
            lately = _since(samples, now - aims.down_s)
            enough = math.ceil(max(s[1] for s in lately) * (1 + MARGIN) - 1e-9)
            if enough < have and now - self.went >= aims.drain_s:
                count, after = have - 1, replace(after, went=now)
        if count > bounds.most:  # at nightfall: one after the other as well
            count = max(bounds.most, have)
            if have > bounds.most and now - self.went >= aims.drain_s:
                count, after = have - 1, replace(after, went=now)
        count = max(bounds.least, count)
        if count < have or (count > have and asked is None):
            after = replace(after, asked=(now, have) if count > have else None)
        return count, after


def growth(samples: Sequence[tuple[float, ...]], begin: float) -> float:
    """Units a second by which demand grew since then, as the straight line through the samples
    says; 0 if it did not, or if there are too few to tell."""
    lately = [s for s in samples if s[0] >= begin]
    if len(lately) < FEWEST:
        return 0.0
    middle = sum(s[0] for s in lately) / len(lately)
    spread = sum((s[0] - middle) ** 2 for s in lately)
    return max(0.0, sum((s[0] - middle) * s[1] for s in lately) / spread)


def _since(
    samples: tuple[tuple[float, float, float], ...], begin: float
) -> Sequence[tuple[float, float, float]]:
    """Those that are not older, and the last one in any case."""
    return [s for s in samples if s[0] >= begin] or samples[-1:]


class Policy:
    """All deployments of the application at once: Serve's application-level policy.

    Serve makes one in its controller, from the Serve config file, and calls it with a context for
    each deployment that has an `autoscaling_config`; the numbers are in `aggregated_metrics`.
    expert_ranks, spares: of each unit, by role; of those with dedicated experts only.
    """

    def __init__(
        self,
        autoscaling: Mapping[str, Any],
        expert_ranks: Mapping[str, int] | None = None,
        spares: Mapping[str, int] | None = None,
        units: Mapping[str, int] | None = None,
    ) -> None:
        """units: of the roles that do not scale."""
        self._aims = AutoscalingSettings.model_validate(autoscaling)
        self._expert_ranks, self._spares = dict(expert_ranks or {}), dict(spares or {})
        self._units = dict(units or {})
        self._steady: dict[str, Steady] = {}

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, Any]]:
        now, moment = time.monotonic(), datetime.now(UTC)
        by_name = {context.deployment_name: (key, context) for key, context in contexts.items()}
        stats = {name: stats_of(context) for name, (_, context) in by_name.items()}
        have = {name: context.target_num_replicas for name, (_, context) in by_name.items()}
        found = self.decide(now, moment, stats, have)
        return {by_name[name][0]: count for name, count in found.items()}, {}

    def decide(
        self,
        now: float,
        moment: datetime,
        stats: Mapping[str, Sequence[UnitStats]],
        have: Mapping[str, int],
    ) -> dict[str, int]:
        """Replicas of each deployment in `have`."""
        units, found = dict(self._units), dict(have)
        for role, name in (("prefill", "Prefill"), ("decode", "Decode")):
            bounds = self._aims.bounds(role, moment)
            if name not in have or bounds is None:
                continue
            seen = stats.get(name, ())
            demand_of = prefill_demand if role == "prefill" else decode_demand
            # Those that do not answer yet count as they are wanted: they are on their way.
            demand = demand_of(seen, self._aims) if seen else float(have[name])
            units[role] = found[name] = self._settled(
                name, now, demand, have[name], len(seen), bounds
            )
        if "Experts" in have:
            found["Experts"] = sum(
                units.get(role, 0)
                * (self._experts_of(role, now, stats) + self._spares.get(role, 0))
                for role in self._expert_ranks
            )
        return found

    def _experts_of(self, role: str, now: float, stats: Mapping[str, Sequence[UnitStats]]) -> int:
        """Expert ranks of each unit of a role."""
        fixed, bounds = self._expert_ranks[role], self._aims.experts
        if role != "decode" or bounds is None:
            return fixed
        seen = [u for u in stats.get("Decode", ()) if u.experts]
        have = round(max((u.experts for u in seen), default=fixed)) - self._spares.get(role, 0)
        demand = expert_demand(seen, self._aims) if seen else float(have)
        return self._settled("experts", now, demand, max(1, have), have, bounds)

    def _settled(
        self, name: str, now: float, demand: float, have: int, serving: int, bounds: Range
    ) -> int:
        steady = self._steady.get(name, Steady())
        count, self._steady[name] = steady.decide(now, demand, have, serving, bounds, self._aims)
        return count


def stats_of(context: Any) -> list[UnitStats]:
    """The reports of a deployment's running replicas, out of Serve's context."""
    known = [field.name for field in fields(UnitStats)]
    reported = context.aggregated_metrics or {}
    replicas = {replica for values in reported.values() for replica in values}
    return [
        UnitStats(**{n: reported[n][r] for n in known if r in reported.get(n, {})})
        for r in sorted(replicas, key=str)
    ]


def autoscaling_policy(config: Config) -> dict[str, Any] | None:
    """Serve's application-level policy (cluster/autoscaling.py); None: nothing scales."""
    settings = config.autoscaling
    if not (settings.prefill or settings.decode or settings.experts):
        return None
    units = config.units
    return {
        "policy_function": f"{Policy.__module__}:{Policy.__name__}",
        "policy_kwargs": {
            "autoscaling": settings.model_dump(mode="json", exclude_defaults=True),
            "expert_ranks": {role: u.expert_ranks for role, u in units.items() if u.expert_ranks},
            "spares": {role: u.spares for role, u in units.items() if u.spares},
            "units": {role: u.units for role, u in units.items()},
        },
    }


def replica_ranges(config: Config) -> dict[str, tuple[int, int]]:
    """Of each deployment that scales, the fewest and the most replicas ever."""
    found, experts = {}, [0, 0]
    for role, unit in config.units.items():
        widest = config.autoscaling.widest(role)
        least, most = (widest.least, widest.most) if widest else (unit.units, unit.units)
        if widest:
            found[UNIT_NAMES[role]] = (least, most)
        elastic = config.autoscaling.experts if role == "decode" else None
        if unit.expert_ranks:
            experts[0] += least * (unit.expert_ranks + unit.spares)
            experts[1] += most * ((elastic.most if elastic else unit.expert_ranks) + unit.spares)
    if experts[0] < experts[1]:
        found["Experts"] = (experts[0], experts[1])
    return found


def serve_scaling(scales: tuple[int, int], initial: int) -> dict[str, Any]:
    """Serve's `autoscaling_config` of a deployment; the policy is the application's, and it is the
    one that waits before it decides."""
    return {
        "min_replicas": scales[0],
        "max_replicas": scales[1],
        "initial_replicas": initial,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "metrics_interval_s": 1,
        "look_back_period_s": 5,
    }
