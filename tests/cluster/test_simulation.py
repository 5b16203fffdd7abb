"""The simulated cluster: nothing is lost, nothing idles beside work, the same run twice is the
same, and it agrees with the real scheduler's whole plans and with published figures."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayseek.cluster.capacity import Load, Targets, needs
from rayseek.cluster.config import Config, load_config
from rayseek.cluster.cost import DEVICES, Cost
from rayseek.cluster.dispatch import candidates
from rayseek.cluster.outcome import Outcome
from rayseek.cluster.scaling_settings import AutoscalingSettings, Range
from rayseek.cluster.scheduler import Limits, SequenceView, plan_step
from rayseek.cluster.simulated_unit import Job, SimulatedUnit
from rayseek.cluster.simulation import Conditions, Simulation, rooflines
from rayseek.cluster.step_times import Roofline, StepWork
from rayseek.cluster.traffic import Arrival, Traffic, recorded
from rayseek.kernels.kv_format import PAGE_TOKENS
from rayseek.model.official import DEEPSEEK_V3

CELL, NODE = load_config("h800-cell-18"), load_config("h200-8")
TARGETS = Targets(3.0, 0.1)
CALM = Conditions()
FIXED = AutoscalingSettings()


class Rows:
    """A step takes as many seconds as it has rows, and one more."""

    def __init__(self) -> None:
        self.works: list[StepWork] = []

    def of(self, work: StepWork) -> tuple[float, str]:
        self.works.append(work)
        return 1.0 + work.batch + work.rows, "rows"


def fleet(config: Config, scaling: AutoscalingSettings = FIXED, **units: int) -> Config:
    changes: dict[str, object] = {
        role: getattr(config, role).model_copy(update={"units": n}) for role, n in units.items()
    }
    return config.model_copy(update={**changes, "autoscaling": scaling})


def run(
    config: Config, arrivals: Iterable[Arrival], seconds: float, on: Conditions = CALM
) -> Outcome:
    return Simulation(config, DEEPSEEK_V3, rooflines(config, DEEPSEEK_V3), TARGETS, on).run(
        arrivals, seconds
    )


def few(rate: float, seed: int = 0, seconds: float = 60) -> list[Arrival]:
    return list(Traffic(Load(rate, 2000, 200, 0.5)).arrivals(seconds, seed))


jobs = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 150)), min_size=1, max_size=12)


@settings(max_examples=60)
@given(jobs, st.integers(9, 30), st.integers(1, 6), st.sampled_from([1.0, 1.6, 2.5]))
def test_a_unit_does_all_that_it_was_given(
    asked: list[tuple[int, int]], pages: int, batch: int, kept: float
) -> None:
    """Whatever is preempted: every job ends, with all its tokens; no page is held afterwards, nor
    more than there are at any time; and while there is work, steps have rows."""
    times = Rows()
    unit = SimulatedUnit(2, Limits(batch, 128, 32), pages, kept, times)
    for number, (known, left) in enumerate(asked):
        unit.add(Job(number, known, left, 0, None), number % 2)
    done: list[Job] = []
    now = 0.0
    while (then := unit.begin(now, math.inf)) < math.inf:
        assert (unit.used <= pages).all() and (unit.used >= 0).all()
        assert times.works[-1].batch or times.works[-1].rows
        assert times.works[-1].batch <= batch
        done += unit.end()[1]
        now = then
    assert sorted(job.number for job in done) == list(range(len(asked)))
    assert not unit.used.any() and not unit.batch.any() and not unit.queued.any()
    assert unit.tokens >= sum(left for _, left in asked)


@given(
    st.integers(0, 5), st.integers(1, 4), st.integers(0, 60),
    st.lists(st.tuples(st.integers(2, 300), st.integers(0, 200)), max_size=3),
    st.lists(st.integers(1, 300), max_size=4),
)  # fmt: skip
def test_one_sequence_stands_in_for_all_that_decode(
    decoding: int, more: int, available: int,
    begun: list[tuple[int, int]], waiting: list[int],
) -> None:  # fmt: skip
    """With pages for the next tokens, prompts are planned as in the plan of all sequences."""
    limits = Limits(decoding + more, 256, 64)
    full = [SequenceView(f"d{i}", (0, i), 65 + i, 64 + i, 2) for i in range(decoding)]
    prompts = [
        SequenceView(f"p{i}", (0, 50 + i), n, min(c, n - 2), -(-n // PAGE_TOKENS))
        for i, (n, c) in enumerate(begun)
    ]
    news = [SequenceView(f"w{i}", (0, 90 + i), n, 0, 0) for i, n in enumerate(waiting)]
    whole = plan_step([*full, *prompts], news, available, limits)
    standing = replace(limits, max_batch=limits.max_batch - max(0, decoding - 1))
    short = plan_step([*full[:1], *prompts], news, available, standing)
    of_prompts = tuple(c for c in whole.chunks if not c[0].startswith("d"))
    assert of_prompts == tuple(c for c in short.chunks if not c[0].startswith("d"))
    assert (whole.admitted, whole.take) == (short.admitted, short.take)


@pytest.mark.parametrize("config", [fleet(CELL), fleet(NODE, decode=2)], ids=["split", "whole"])
def test_no_request_is_lost_though_units_die(config: Config) -> None:
    arrivals = few(20)
    calm = run(config, arrivals, 60)
    deadly = run(config, arrivals, 60, Conditions(start_s=20, lifetime_h=0.005))
    assert calm.answered == deadly.answered == len(arrivals)
    assert deadly.deaths and deadly.moved and not calm.deaths
    assert deadly.first_token.mean() > calm.first_token.mean()


def test_the_same_run_twice() -> None:
    config, on = fleet(CELL), Conditions(seed=3, lifetime_h=0.05, start_s=10)
    one, two = (run(config, few(10, seed=5), 60, on) for _ in range(2))
    assert np.array_equal(one.first_token, two.first_token)
    assert np.array_equal(one.between_tokens, two.between_tokens, equal_nan=True)
    assert one.limited == two.limited
    other = run(config, few(10, seed=6), 60, on)
    assert not np.array_equal(one.first_token, other.first_token)


def test_more_units_are_never_worse() -> None:
    arrivals = few(12, seconds=120)
    waits = [run(fleet(NODE, decode=n), arrivals, 120) for n in (1, 2, 4)]
    for fewer, more in zip(waits, waits[1:], strict=False):
        assert more.first_token.mean() <= fewer.first_token.mean()
        assert np.nanmean(more.between_tokens) <= np.nanmean(fewer.between_tokens)
        assert more.violations.mean() <= fewer.violations.mean()


def test_what_a_published_unit_makes() -> None:
    """DeepSeek's profile of decoding (EP128, 128 sequences a GPU of 4096 tokens): the whole
    simulation, not only its step times, comes to the published tokens/s."""
    cost = Cost(DEEPSEEK_V3, DEVICES["H800"], 128, 2)
    unit = SimulatedUnit(16, Limits(128, 512, 256), 20_000, 1.6, Roofline(cost, 1))
    for number in range(16 * 128):
        unit.add(Job(number, 3600, 1000, 3600, None), number % 16)
    now = tokens = span = 0.0
    while not span or unit.batch.min() == 128:
        full, began, before = unit.batch.min() == 128, now, unit.tokens
        now = unit.begin(now, math.inf)
        unit.end()
        if full:
            tokens, span = tokens + unit.tokens - before, span + now - began
    assert tokens / 16 / span == pytest.approx(18598 / 8, rel=0.15)


@pytest.mark.parametrize(
    ("config", "load", "seconds"),
    [(NODE, Load(30, 4000, 800, 0.5), 200), (NODE, Load(10, 2000, 300), 90),
     (CELL, Load(150, 4000, 400, 0.5), 30)],
)  # fmt: skip
def test_what_is_planned_is_what_happens(config: Config, load: Load, seconds: float) -> None:
    """Latencies by formula against simulated ones, with as many units as are planned."""
    needed = dict(
        zip(("prefill", "decode"), needs(config, DEEPSEEK_V3, load, TARGETS), strict=True)
    )
    units = {role: needed[role].units for role in config.units}
    out = run(fleet(config, **units), Traffic(load).arrivals(seconds), seconds)
    assert np.median(out.first_token) == pytest.approx(needed["prefill"].seconds, rel=0.3)
    assert np.nanmedian(out.between_tokens) == pytest.approx(needed["decode"].seconds, rel=0.3)


def test_policies_beat_a_fixed_fleet_of_their_mean_size() -> None:
    """On a wave, so short that units must start fast: fewer missed targets at the same size."""
    aims = AutoscalingSettings(
        decode=Range(least=1, most=12), up_s=15, down_s=60, drain_s=15, inter_token_s=0.15
    )
    on = Conditions(start_s=20, part=8)
    traffic = Traffic(Load(40 / on.part, 2000, 300, 0.5), "wave", peak=1.9, period_s=900)
    scaled = run(fleet(NODE, aims, decode=1), traffic.arrivals(900), 900, on)
    mean = round(scaled.mean_units("decode"))
    fixed = run(fleet(NODE, decode=mean), traffic.arrivals(900), 900, on)
    assert scaled.requests == fixed.requests == scaled.answered == fixed.answered
    assert scaled.mean_units("decode") == pytest.approx(mean, rel=0.2)
    assert scaled.violations.mean() < 0.2 * fixed.violations.mean()
    sizes = [moment.units["decode"] for moment in scaled.moments]
    assert min(sizes) == 1 and max(sizes) > mean


def test_what_waits_at_ingresses_brings_units() -> None:
    """Pages and steps are far from their limits; what is missing is places, and a rank never gets
    more sequences than it has, so its own queue tells nobody."""
    engine = NODE.engine.model_copy(update={"max_batch": 4})
    aims = AutoscalingSettings(
        decode=Range(least=1, most=6), up_s=10, down_s=60, drain_s=15, inter_token_s=9
    )
    config = fleet(NODE, aims, decode=1).model_copy(update={"engine": engine})
    out = run(config, few(10, seconds=300), 300, Conditions(start_s=20))
    assert max(moment.units["decode"] for moment in out.moments) >= 3
    assert np.median(out.first_token[out.arrived > 200]) < 1


def test_ingresses_do_not_herd() -> None:
    """Two of the ranks, any two: nobody is left out, and one rank alone is taken."""
    draw = Random(0)
    seen = {i for _ in range(200) for i in candidates(6, draw)}
    assert seen == set(range(6)) and candidates(1, draw) == [0] and candidates(0, draw) == []
    assert all(len(set(candidates(6, draw))) == 2 for _ in range(50))


def test_a_request_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        run(fleet(NODE), [Arrival(0.0, 10**6, 10)], 10)


# ---- traffic ----


@pytest.mark.parametrize("shape", ["even", "poisson", "wave", "burst"])
def test_traffic_keeps_its_means(shape: str) -> None:
    load = Load(2.0, 1000, 300, 0.25)
    traffic = Traffic(load, shape, peak=1.8, period_s=3600)  # type: ignore[arg-type]
    found = list(traffic.arrivals(7200, 1))
    assert [a.at for a in found] == sorted(a.at for a in found)
    assert len(found) / 7200 == pytest.approx(2.0, rel=0.05)
    assert np.mean([a.prompt for a in found]) == pytest.approx(1000, rel=0.05)
    assert np.mean([a.output for a in found]) == pytest.approx(300, rel=0.05)
    assert found == list(traffic.arrivals(7200, 1))
    busiest = max(np.histogram([a.at for a in found], 24)[0]) / 300
    assert busiest == pytest.approx(2.0 if shape in ("even", "poisson") else 3.6, rel=0.2)


def test_recorded_traffic() -> None:
    lines = [
        '{"at": 7, "prompt": 10, "output": 3}', "",
        '{"time": "1970-01-01T00:00:09.000+00:00", "prompt_tokens": 20, "cached_tokens": 8, '
        '"tokens": 5, "seconds": {"request": 4.0}}',
        '{"time": "1970-01-01T00:00:09.000+00:00", "message": "another line of the log"}',
    ]  # fmt: skip
    assert recorded(lines) == [Arrival(0.0, 20, 5, 8), Arrival(2.0, 10, 3)]
    with pytest.raises(ValueError, match="line 1"):
        recorded(['{"at": 1, "prompt": 0, "output": 3}'])
    with pytest.raises(ValueError, match="no requests"):
        recorded(["{}"])
