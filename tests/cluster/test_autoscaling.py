"""Policies in virtual time: waves, bursts, ramps, loads that flap; and what Serve's hook makes of
its contexts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rayseek.cluster.autoscaling import (
    MOST_GROWTH,
    Policy,
    Steady,
    UnitStats,
    autoscaling_policy,
    decode_demand,
    expert_demand,
    prefill_demand,
    replica_ranges,
)
from rayseek.cluster.config import Config
from rayseek.cluster.scaling_settings import AutoscalingSettings, Night, Range

AIMS = AutoscalingSettings(prefill=Range(least=1, most=12), decode=Range(least=1, most=12))
NOON = datetime(2025, 3, 24, 4, 0, tzinfo=UTC)  # in Shanghai
HOUR, DAY = 3600, 24 * 3600
STEP_S, START_S = 5, 90  # of the simulation; until a new unit works
RATE = 20_000.0  # prompt tokens/s of a prefill unit


@dataclass
class Fleet:
    """Prefill units that share one queue. Those that are let go end at once: the worst case."""

    policy: Policy
    units: list[float]  # when each begins to work
    queued: float = 0.0
    waits: list[float] = None  # type: ignore[assignment]
    changes: int = 0
    unit_s: float = 0.0

    def run(self, load: Callable[[float], float], seconds: int) -> Fleet:
        """load: prompt tokens/s at a time."""
        self.waits = []
        for now in range(0, seconds, STEP_S):
            working = [u for u in self.units if u <= now]
            can = RATE * len(working) * STEP_S
            done = min(self.queued + load(now) * STEP_S, can)
            self.queued += load(now) * STEP_S - done
            self.waits.append(self.queued / (RATE * len(working)) if working else math.inf)
            stats = [
                UnitStats(
                    prompt_tokens_queued=self.queued / len(working),
                    prompt_tokens_per_s=RATE,
                    busy=done / can,
                )
                for _ in working
            ]
            have = len(self.units)
            found = self.policy.decide(now, NOON, {"Prefill": stats}, {"Prefill": have})["Prefill"]
            assert 1 <= found <= 12 and found >= have - 1, "whole units, one at a time"
            self.changes += found != have
            self.units = sorted(self.units)[:found] + [now + START_S] * max(0, found - have)
            self.unit_s += len(self.units) * STEP_S
        return self


def fleet(units: int = 1, aims: AutoscalingSettings = AIMS) -> Fleet:
    return Fleet(Policy(aims.model_dump(mode="json", exclude_defaults=True)), [0.0] * units)


def wave(now: float) -> float:
    """A day from 0.5 to 7.5 units' worth."""
    return RATE * (4 - 3.5 * math.cos(2 * math.pi * now / DAY))


def quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[int(q * (len(values) - 1))]


def test_daily_wave() -> None:
    """Far fewer unit hours than a fleet for the peak, and the prompts hardly wait. A fixed fleet
    of the same mean size drowns."""
    scaled = fleet().run(wave, DAY)
    assert quantile(scaled.waits, 0.99) <= AIMS.queue_s
    peak = math.ceil(7.5 / AIMS.prefill_busy)
    assert scaled.unit_s < 0.7 * peak * DAY
    assert scaled.changes < 60
    mean = round(scaled.unit_s / DAY)
    fixed_aims = AIMS.model_copy(update={"prefill": Range(least=mean, most=mean)})
    fixed = fleet(mean, fixed_aims).run(wave, DAY)
    assert quantile(fixed.waits, 0.99) >= quantile(scaled.waits, 0.99)


def test_burst_and_ramp() -> None:
    """Up within the window and a start; the queue is gone soon after; down one after the other."""
    burst = fleet().run(lambda now: RATE * (6 if 600 <= now < 1800 else 0.3), 2 * HOUR)
    late = burst.waits[(600 + AIMS.up_s.__ceil__() + 4 * START_S) // STEP_S : 1800 // STEP_S]
    assert max(late) < AIMS.queue_s
    assert len(burst.units) == 1
    ramp = fleet().run(lambda now: RATE * 8 * now / (2 * HOUR), 2 * HOUR)
    assert quantile(ramp.waits, 0.95) < AIMS.queue_s and len(ramp.units) >= 8


@pytest.mark.parametrize("period", [10, 20, 40])
def test_flapping_load_moves_nothing(period: int) -> None:
    """Between one and nearly three units' worth, faster than `up_s`: no unit comes and goes."""
    load = fleet(4).run(lambda now: RATE * (2.7 if now // (period / 2) % 2 else 1.0), HOUR)
    assert load.changes <= 2, "it settles once"
    late = fleet(len(load.units)).run(
        lambda now: RATE * (2.7 if now // (period / 2) % 2 else 1.0), HOUR
    )
    assert late.changes == 0


@given(
    st.lists(st.tuples(st.floats(0.1, 120), st.floats(0, 20)), max_size=60),
    st.integers(1, 9), st.integers(0, 5), st.floats(0, 100), st.floats(0, 300),
)  # fmt: skip
def test_decisions_hold_to_the_bounds(
    demands: list[tuple[float, float]], least: int, more: int, up_s: float, down_s: float
) -> None:
    aims = AutoscalingSettings(up_s=up_s, down_s=down_s, drain_s=30)
    bounds, steady, have, now = Range(least=least, most=least + more), Steady(), least, 0.0
    went = -math.inf
    asked: list[float] = []
    for wait, demand in demands:
        now += wait
        asked.append(demand)
        count, steady = steady.decide(now, demand, have, have, bounds, aims)
        assert bounds.least <= count <= bounds.most
        growing = any(b > a for a, b in zip(asked, asked[1:], strict=False))
        limit = math.ceil(max(asked) * (MOST_GROWTH if growing else 1))
        assert count <= max(have, limit), "no more than somebody wanted, or may come to"
        if count < have:
            assert count == have - 1 and now - went >= aims.drain_s
            went = now
        have = count


@settings(max_examples=25)
@given(
    st.floats(0, 0.04), st.floats(0.5, 6), st.floats(0, 60), st.floats(5, 200),
    st.sampled_from([0.7, 5.0]),
)  # fmt: skip
def test_units_are_there_before_a_steady_growth_needs_them(
    slope: float, first: float, up_s: float, start_s: float, look_s: float
) -> None:
    """Whatever the wait and the start, as long as it does not grow too much meanwhile. And not many
    more than that."""
    aims = AutoscalingSettings(up_s=up_s)
    bounds, steady = Range(least=1, most=99), Steady(start_s=start_s)
    units = [0.0] * math.ceil(first)  # when each serves
    for look in range(int(1200 / look_s)):
        now = look * look_s
        demand = first + slope * max(0, now - 300)
        serving = sum(at <= now for at in units)
        ahead = slope * (up_s + start_s)
        if now > 300 + 2 * max(60, up_s + start_s) and ahead < (demand - ahead) * (MOST_GROWTH - 1):
            assert serving >= demand - slope * 10 - 1e-6, "two looks late at most"
        count, steady = steady.decide(now, demand, len(units), serving, bounds, aims)
        assert count <= max(len(units), math.ceil(demand + ahead + slope * 10 + 1e-6))
        units += [now + start_s] * (count - len(units))


def test_demands() -> None:
    unit = UnitStats(prompt_tokens_per_s=1000, busy=0.7, kv_used=0.75, step_s=0.05, running=8)
    assert prefill_demand([unit] * 3, AIMS) == pytest.approx(3)
    backlog = replace(unit, prompt_tokens_queued=6000)
    assert prefill_demand([backlog], AIMS) == pytest.approx(1 + 2)
    assert prefill_demand([UnitStats(prompt_tokens_queued=9e9)] * 2, AIMS) == 2, "rate unknown"
    assert decode_demand([unit] * 4, AIMS) == pytest.approx(4)
    assert decode_demand([replace(unit, step_s=0.1)] * 2, AIMS) == pytest.approx(4)
    assert decode_demand([replace(unit, kv_used=0.9)] * 5, AIMS) == pytest.approx(6)
    assert decode_demand([replace(unit, waiting=8, kv_used=0)] * 2, AIMS) == pytest.approx(4)
    busy = replace(unit, waiting=0.5, kv_used=0, step_s=0)
    assert decode_demand([busy] * 2, AIMS) == 0, "one that waits for the next step is no crowd"
    full = replace(unit, kv_used=0.1, step_s=0, running=100, places=100)
    assert decode_demand([full] * 2, AIMS) == pytest.approx(2), "all have a place"
    assert decode_demand([replace(full, outside=50)] * 2, AIMS) == pytest.approx(3)
    held = replace(full, running=20, parked=80, outside=50)
    assert decode_demand([held] * 2, AIMS) < 1, "it is prefill units that are missing"
    crowded = replace(full, running=50, waiting=50, outside=50)
    assert decode_demand([crowded] * 2, AIMS) == pytest.approx(6), "places without room for all"
    assert decode_demand([UnitStats()], AIMS) == 0
    experts = UnitStats(experts=4, expert_busy=0.6)
    assert expert_demand([experts], AIMS) == pytest.approx(4)
    assert expert_demand([replace(experts, expert_imbalance=9)], AIMS) == pytest.approx(4.8)


def test_night() -> None:
    night = Night.model_validate(
        {"begins": "22:00", "ends": "07:00", "decode": {"least": 1, "most": 2}}
    )
    aims = AutoscalingSettings(decode=Range(least=3, most=8), night=night, drain_s=100)
    for hour, bounds in ((4, (3, 8)), (14, (1, 2)), (22, (1, 2)), (23, (3, 8))):  # UTC; +8 there
        found = aims.bounds("decode", datetime(2025, 3, 24, hour, tzinfo=UTC))
        assert found is not None and (found.least, found.most) == bounds
    assert aims.bounds("prefill", NOON) is None
    policy = Policy(aims.model_dump(mode="json", exclude_defaults=True))
    busy, have = [UnitStats(kv_used=0.9, running=9)] * 5, 5
    seen = []
    for second in range(0, 400, 50):  # at nightfall they go one after the other
        moment = NOON + timedelta(hours=11, seconds=second)
        have = policy.decide(second, moment, {"Decode": busy[:have]}, {"Decode": have})["Decode"]
        seen.append(have)
    assert seen == [4, 4, 3, 3, 2, 2, 2, 2]
    assert policy.decide(999, NOON, {"Decode": busy[:2]}, {"Decode": 2})["Decode"] == 3


def test_experts_follow_units_and_load() -> None:
    aims = {"decode": {"least": 1, "most": 4}, "experts": {"least": 2, "most": 6}, "up_s": 10}
    policy = Policy(aims, {"decode": 2}, {"decode": 1}, {"decode": 2})
    have = {"Decode": 2, "Experts": 6}
    units = [UnitStats(experts=3, expert_busy=0.9, kv_used=0.5, running=5)] * 2
    for second in range(0, 9, 3):
        assert policy.decide(second, NOON, {"Decode": units}, have) == have
    # Three compute 0.9 of the time where 0.6 is aimed at: 5 of each unit, and its spare.
    assert policy.decide(12, NOON, {"Decode": units}, have)["Experts"] == 2 * (5 + 1)
    assert policy.decide(13, NOON, {}, have)["Decode"] == 2, "nobody answers: nothing changes"


def test_serves_hook() -> None:
    policy = Policy({"decode": {"least": 1, "most": 4}, "up_s": 0}, units={"decode": 1})
    context = SimpleNamespace(
        deployment_name="Decode", target_num_replicas=1,
        aggregated_metrics={"kv_used": {"r1": 0.95}, "running": {"r1": 3.0}, "other": {"r1": 1.0}},
    )  # fmt: skip
    assert policy({"id": context}) == ({"id": 2}, {})
    assert policy({"id": SimpleNamespace(**{**vars(context), "aggregated_metrics": None})}) == (
        {"id": 1}, {},
    )  # fmt: skip


def test_config() -> None:
    split = {"experts": "dedicated", "expert_ranks": 2, "spares": 1, "units": 2}
    config = Config.model_validate(
        {"decode": split, "autoscaling": {"decode": {"least": 1, "most": 4},
                                          "experts": {"least": 2, "most": 6}}}
    )  # fmt: skip
    assert replica_ranges(config) == {"Decode": (1, 4), "Experts": (3, 28)}
    policy = autoscaling_policy(config)
    assert policy is not None
    made = Policy(**policy["policy_kwargs"])
    assert made.decide(0, NOON, {}, {"Decode": 2, "Experts": 6}) == {"Decode": 2, "Experts": 6}
    assert autoscaling_policy(Config()) is None and replica_ranges(Config()) == {}
    for wrong in (
        {"autoscaling": {"decode": {"least": 3, "most": 2}}},
        {"autoscaling": {"decode": {"least": 2, "most": 3}}},
        {"autoscaling": {"prefill": {"least": 1, "most": 3}}},
        {"autoscaling": {"experts": {"least": 1, "most": 3}}},
        {"autoscaling": {"night": {"begins": "22:00", "ends": "7:00", "time_zone": "Nowhere"}}},
    ):
        with pytest.raises(ValidationError):
            Config.model_validate(wrong)
