"""What a unit's leader tells of its ranks: metrics, the cluster page, numbers to scale by.

Fed with a round of pulses a second. No Ray and no clock of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from rayseek.cluster.expert_load import imbalance
from rayseek.cluster.metrics import Meter, Totals
from rayseek.cluster.placement import ExpertPlacement, Loads, holder_loads
from rayseek.cluster.plan import ITS_END, ExpertRows, Member, Pulse, UnitPlan, Wanted
from rayseek.cluster.spec import UnitRole
from rayseek.cluster.step_clock import IDLE

MEMORY = 0.2  # weight of the newest second in a measured rate
QUEUE_S = 10.0  # what an ingress said of its queue counts for so long
# What a process says of the moment: 0 when it is gone. Only the first are an expert rank's as well.
MOMENTARY = (
    "rank_at_seconds", "kv_pages_used", "batch_sequences", "rank_requests_waiting",
    "prompt_tokens_queued",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RankView:
    """One process. `place`: "attention0", "expert3", or "spare". Seconds are since its start."""

    name: str
    place: str
    node: str
    where: str
    idle: bool
    since_s: float
    running: int = 0
    waiting: int = 0
    prompt_tokens_queued: int = 0
    pages_held: int = 0
    pages_total: int = 0
    steps: int = 0
    rows_per_s: float = 0.0  # of prompts and decoding sequences
    step_s: float = 0.0  # mean of the last second's steps
    step_seconds: Mapping[str, float] = field(default_factory=dict)
    exchange_seconds: Mapping[str, float] = field(default_factory=dict)
    exchange_bytes: int = 0
    drafted: int = 0
    accepted: int = 0
    pages_fetched: int = 0
    pages_sent: int = 0


@dataclass(frozen=True, slots=True)
class ExpertsView:
    """rows: lately, by layer and expert. slots: by layer, the expert in each; `slots_per_holder`
    of them belong to each of `holders` in turn. imbalance: of each layer, 1 is perfect."""

    version: int
    layers: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    slots: tuple[tuple[int, ...], ...]
    slots_per_holder: int
    holders: tuple[str, ...]
    imbalance: tuple[float, ...]
    overall: float


@dataclass(frozen=True, slots=True)
class UnitView:
    """A unit as the cluster page shows it."""

    unit: str
    role: UnitRole
    epoch: int
    problems: tuple[str, ...]
    deaths: int
    wanted: Mapping[str, int]  # ranks, by kind
    ranks: tuple[RankView, ...]
    experts: ExpertsView | None


class UnitState(NamedTuple):
    """What a report is made of, beside pulses. placement: None where nobody knows it yet."""

    plan: UnitPlan | None
    present: Sequence[Member]
    placement: ExpertPlacement | None
    loads: Loads
    problems: Sequence[str]
    deaths: int

    @property
    def members(self) -> Sequence[Member]:
        """Who takes part: all who are there, as long as there is no plan."""
        return self.plan.members if self.plan else self.present


@dataclass(slots=True)
class _Rates:
    """What one rank does in a second, smoothed."""

    at: float
    pulse: Pulse
    rows_per_s: float = 0.0
    prompt_rows_per_s: float = 0.0  # of the time that steps take
    step_s: float = 0.0
    busy: float = 0.0  # part of the time that steps take
    expert_share: float = 0.0  # part of the time that experts compute


class UnitReport:
    """`take` a round of pulses, then `publish`; `view` and `to_scale_by` answer whoever asks."""

    def __init__(
        self, unit: str, role: UnitRole, wanted: Wanted, meter: Meter, places: int = 0
    ) -> None:
        """places: of each attention rank, for sequences."""
        self._places = places
        self._unit, self._role, self._wanted, self._meter = unit, role, wanted, meter
        self._totals = Totals(meter)
        self._rates: dict[str, _Rates] = {}
        self._shown: set[str] = set()  # places of which anything was published
        self._labels = {"unit": unit, "role": role}
        self._queues: dict[str, tuple[float, float]] = {}  # by ingress: when heard, and how many

    def take(
        self, now: float, pulses: Mapping[str, Pulse | None], members: Sequence[Member]
    ) -> None:
        """now: monotonic seconds. Who did not answer is shown as it was. members: who takes
        part."""
        self._rates = {name: rates for name, rates in self._rates.items() if name in pulses}
        self._totals.forget({**self._rates, "": None})
        self._queues = {n: q for n, q in self._queues.items() if now - q[0] < QUEUE_S}
        places = places_of(members)
        for name, pulse in pulses.items():
            if pulse is None or pulse.where == ITS_END:
                continue
            before = self._rates.get(name)
            self._rates[name] = _next(before, now, pulse)
            if name in places:
                self._publish_rank(name, places[name], pulse)
        there = {places[name] for name in self._rates if name in places}
        for place in self._shown - there:  # until a successor is there
            for gauge in MOMENTARY if place.startswith("attention") else MOMENTARY[:1]:
                self._meter.set(gauge, 0, **self._labels, rank=place)
        self._shown = there

    def hear_of_queue(self, ingress: str, waiting: float, now: float) -> None:
        """An ingress holds back so many sequences that this unit would have."""
        self._queues[ingress] = now, waiting

    @property
    def requests(self) -> int:
        """On board of all ranks, as they said last."""
        loads = [rates.pulse.load for rates in self._rates.values()]
        return sum(load.running + load.waiting for load in loads if load)

    def count_experts(self, placement: ExpertPlacement, holder: int, rows: ExpertRows) -> None:
        """Rows that a holder's slots got since the last time."""
        counts = np.zeros(placement.experts)
        for layer, of_slots in zip(placement.slots, rows.rows, strict=True):
            np.add.at(counts, list(placement.experts_of(holder, layer)), of_slots)
        for expert in np.flatnonzero(counts):
            self._meter.add(
                "expert_rows", float(counts[expert]), **self._labels, expert=str(expert)
            )

    def publish(self, state: UnitState) -> None:
        """What is true of the whole unit."""
        labels, meter = self._labels, self._meter
        plan, placement, loads = state.plan, state.placement, state.loads
        for kind, wanted in self._kinds.items():
            have = sum(m.role == kind for m in state.members)
            meter.set("unit_ranks", have, **labels, kind=kind)
            meter.set("unit_ranks_wanted", wanted, **labels, kind=kind)
        meter.set("unit_problems", len(state.problems), **labels)
        meter.set("unit_epoch", plan.epoch if plan else 0, **labels)
        self._totals.take("", "rank_deaths", state.deaths, **labels)
        if placement is None:
            return
        meter.set("placement_version", placement.version, **labels)
        meter.set("unit_expert_imbalance", imbalance(placement, loads), **labels)
        for layer, value in zip(placement.slots, _by_layer(placement, loads), strict=True):
            meter.set("expert_imbalance", value, **labels, layer=str(layer))

    def view(self, state: UnitState) -> UnitView:
        """All of it for the cluster page."""
        plan, placement, loads = state.plan, state.placement, state.loads
        places = places_of(state.members)
        ranks = [self._rank_view(m, places.get(m.name, "spare")) for m in state.present]
        experts = None
        if placement is not None:
            holders = [plan.members[rank].name for rank in plan.holders] if plan else list(places)
            experts = ExpertsView(
                version=placement.version,
                layers=tuple(placement.slots),
                rows=tuple(tuple(map(round, loads[layer])) for layer in placement.slots),
                slots=tuple(placement.slots.values()),
                slots_per_holder=placement.slots_per_holder,
                holders=tuple(places.get(name, "gone") for name in holders),
                imbalance=tuple(round(x, 3) for x in _by_layer(placement, loads)),
                overall=round(imbalance(placement, loads), 3),
            )
        return UnitView(
            self._unit, self._role, plan.epoch if plan else -1, tuple(state.problems), state.deaths,
            self._kinds, tuple(sorted(ranks, key=lambda r: _numbered(r.place))), experts,
        )  # fmt: skip

    def to_scale_by(self, placement: ExpertPlacement | None, loads: Loads) -> dict[str, float]:
        """For the autoscaling policy (cluster/autoscaling.py: UnitStats)."""
        engines = [(r, r.pulse.load) for r in self._rates.values() if r.pulse.load]
        experts = [r for r in self._rates.values() if not r.pulse.load]
        pages = [(load.pages_held / load.pages_total) for _, load in engines]
        return {
            "prompt_tokens_queued": float(sum(x.prompt_tokens_queued for _, x in engines)),
            "prompt_tokens_per_s": sum(r.prompt_rows_per_s for r, _ in engines),
            "busy": sum(r.busy for r, _ in engines) / len(engines) if engines else 0.0,
            "running": float(sum(x.running for _, x in engines)),
            "waiting": float(sum(x.waiting - x.parked for _, x in engines)),
            "parked": float(sum(x.parked for _, x in engines)),
            "outside": float(sum(waiting for _, waiting in self._queues.values())),
            "places": float(len(engines) * self._places),
            "kv_used": sum(pages) / len(pages) if pages else 0.0,
            "step_s": max((r.step_s for r, x in engines if x.running), default=0.0),
            "experts": float(len(experts)),
            "expert_busy": sum(r.expert_share for r in experts) / len(experts) if experts else 0.0,
            "expert_imbalance": imbalance(placement, loads) if placement else 1.0,
        }

    @property
    def _kinds(self) -> dict[str, int]:
        return {"attention": self._wanted.attention, "expert": self._wanted.experts}

    def _publish_rank(self, name: str, place: str, pulse: Pulse) -> None:
        labels, meter = {**self._labels, "rank": place}, self._meter
        meter.set("rank_at_seconds", 0 if pulse.idle else pulse.since_s, **labels)
        if (load := pulse.load) is not None:
            meter.set("kv_pages", load.pages_total, **labels)
            meter.set("kv_pages_used", load.pages_held, **labels)
            meter.set("batch_sequences", load.running, **labels)
            meter.set("rank_requests_waiting", load.waiting, **labels)
            meter.set("prompt_tokens_queued", load.prompt_tokens_queued, **labels)
            meter.set("draft_depth", load.draft_depth, **labels)
            for depth, predicted in enumerate(load.draft_rates):
                meter.set("draft_tokens_predicted", predicted, **labels, depth=str(depth))
            for depth, (drafted, accepted) in enumerate(
                zip(load.drafted, load.accepted, strict=True), start=1
            ):
                at = {**labels, "depth": str(depth)}
                self._totals.take(name, "drafted_tokens", drafted, **at)
                self._totals.take(name, "accepted_draft_tokens", accepted, **at)
        if (work := pulse.work) is not None:
            self._totals.take(name, "steps", work.steps, **labels)
            self._totals.take(name, "preemptions", work.preemptions, **labels)
            self._totals.take(name, "rows", work.prompt_rows, **labels, kind="prompt")
            self._totals.take(name, "rows", work.decode_rows, **labels, kind="decode")
            for stage, seconds in work.seconds.items():
                self._totals.take(name, "step_seconds", seconds, **labels, stage=stage)
        if (exchanged := pulse.exchanged) is not None:
            self._totals.take(name, "exchange_bytes", exchanged.bytes, **labels)
            for stage, seconds in exchanged.seconds.items():
                self._totals.take(name, "exchange_seconds", seconds, **labels, stage=stage)
        if (taken := pulse.taken) is not None:
            counts = {"copied": taken.copied, "read": taken.read, "refused": taken.refused}
            for how, count in counts.items():
                self._totals.take(name, "experts_taken", count, **labels, how=how)
            for how, count in {"copied": taken.copied_bytes, "read": taken.read_bytes}.items():
                self._totals.take(name, "expert_bytes_taken", count, **labels, how=how)
        if (done := pulse.transfers) is not None:
            requests = {"fetched": done.fetched, "partly": done.partly, "fallback": done.fallbacks}
            for outcome, count in requests.items():
                self._totals.take(name, "transfer_requests", count, **labels, outcome=outcome)
            pages = {
                "fetched": done.pages, "sent": done.sent,
                "corrupted": done.corrupted, "repeated": done.repeated,
            }  # fmt: skip
            for what, count in pages.items():
                self._totals.take(name, "transfer_pages", count, **labels, what=what)
            self._totals.take(name, "transfer_bytes", done.bytes, **labels)
            self._totals.take(name, "transfer_seconds", done.seconds, **labels)
            for what, count in {"timeout": done.timeouts, "connection": done.broken}.items():
                self._totals.take(name, "transfer_failures", count, **labels, what=what)

    def _rank_view(self, member: Member, place: str) -> RankView:
        rates = self._rates.get(member.name)
        if rates is None:
            return RankView(member.name, place, member.node, "start", True, 0.0)
        pulse = rates.pulse
        load, work, exchanged, moved = pulse.load, pulse.work, pulse.exchanged, pulse.transfers
        return RankView(
            member.name, place, member.node, pulse.where, pulse.idle, round(pulse.since_s, 1),
            running=load.running if load else 0,
            waiting=load.waiting if load else 0,
            prompt_tokens_queued=load.prompt_tokens_queued if load else 0,
            pages_held=load.pages_held if load else 0,
            pages_total=load.pages_total if load else 0,
            steps=work.steps if work else pulse.passes,
            rows_per_s=round(rates.rows_per_s, 1),
            step_s=round(rates.step_s, 5),
            step_seconds=_rounded(work.seconds) if work else {},
            exchange_seconds=_rounded(exchanged.seconds) if exchanged else {},
            exchange_bytes=exchanged.bytes if exchanged else 0,
            drafted=sum(load.drafted) if load else 0,
            accepted=sum(load.accepted) if load else 0,
            pages_fetched=moved.pages if moved else 0,
            pages_sent=moved.sent if moved else 0,
        )  # fmt: skip


def places_of(members: Sequence[Member]) -> dict[str, str]:
    """Names that mean the same over generations of processes, for those who take part."""
    places: dict[str, str] = {}
    for role in ("attention", "expert"):
        of_role = [m.name for m in members if m.role == role]
        places |= {name: f"{role}{i}" for i, name in enumerate(of_role)}
    return places


def _next(before: _Rates | None, now: float, pulse: Pulse) -> _Rates:
    """The rates after one more pulse."""
    if before is None or now <= before.at:
        return _Rates(now, pulse)
    passed, was = now - before.at, before.pulse
    rates = _Rates(
        now, pulse, before.rows_per_s, before.prompt_rows_per_s, before.step_s, before.busy,
        before.expert_share,
    )  # fmt: skip
    if pulse.work is not None and was.work is not None:
        prompt = pulse.work.prompt_rows - was.work.prompt_rows
        decode = pulse.work.decode_rows - was.work.decode_rows
        steps = pulse.work.steps - was.work.steps
        busy = _busy(pulse.work.seconds) - _busy(was.work.seconds)
        rates.rows_per_s = (prompt + decode) / passed
        rates.busy = _smooth(before.busy, busy / passed)
        if steps and busy > 0:
            rates.step_s = busy / steps
        if prompt and busy > 0:  # steps that also decode compute fewer: it is a cautious rate
            rates.prompt_rows_per_s = _smooth(before.prompt_rows_per_s, prompt / busy)
    if pulse.exchanged is not None and was.exchanged is not None:
        spent = pulse.exchanged.seconds.get("experts", 0) - was.exchanged.seconds.get("experts", 0)
        rates.expert_share = _smooth(before.expert_share, max(0.0, spent) / passed)
    return rates


def _smooth(old: float, new: float) -> float:
    return old + MEMORY * (new - old) if old else new


def _busy(seconds: Mapping[str, float]) -> float:
    return sum(spent for stage, spent in seconds.items() if stage != IDLE)


def _by_layer(placement: ExpertPlacement, loads: Loads) -> list[float]:
    """Rows of the busiest holder over the mean, in each layer; 1 without any."""
    of_holders = holder_loads(placement, loads)
    mean = of_holders.mean(1)
    return [
        float(m) for m in np.divide(of_holders.max(1), mean, np.ones_like(mean), where=mean > 0)
    ]


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {stage: round(spent, 3) for stage, spent in seconds.items()}


def _numbered(place: str) -> tuple[str, int]:
    digits = place.lstrip("abcdefghijklmnopqrstuvwxyz")
    return place[: len(place) - len(digits)], int(digits or 0)
