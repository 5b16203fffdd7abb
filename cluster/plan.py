"""Who belongs to a unit, and who holds which experts: the plan that all its processes follow.

Pure: the leader makes a new plan whenever somebody comes, dies or hangs, or when the experts are to
be spread anew. Plans are numbered by epoch; a process follows the newest one it was given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from rayseek.cluster.copies import Sources, Taken
from rayseek.cluster.placement import ExpertPlacement, Loads
from rayseek.cluster.step_clock import Work
from rayseek.cluster.succession import Room, next_placement
from rayseek.cluster.transfer_counters import Transfers

if TYPE_CHECKING:  # torch stays out of the leader's process
    from rayseek.cluster.engine import Load

Role = Literal["attention", "expert"]
ITS_END = "its end"  # where a process is that has died
LATER_S = 0.05  # so that a deadline has passed when it is looked at


@dataclass(frozen=True, slots=True)
class Member:
    """A process that takes part. `name` is new for every process; `store`: host:port of the
    key-value store it offers for meeting the others. copies: where it gives copies of experts."""

    name: str
    role: Role
    node: str
    store: str
    copies: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the config asks of a unit. experts 0: the attention ranks hold them (colocated)."""

    attention: int
    experts: int
    redundant: int  # expert slots beyond one per expert
    num_experts: int
    groups: int  # expert groups of the router
    layers: tuple[int, ...]  # with experts, the MTP module's included
    least_experts: int | None = None  # how many `experts` may come down to; None: not below
    room: Room | None = None  # of a holder; None: nobody knows, so whatever is needed

    @property
    def needed_experts(self) -> int:
        """Fewer than these are a problem."""
        return self.experts if self.least_experts is None else self.least_experts


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """members: attention ranks first. Their order is their rank in the epoch's process group.
    sources: of experts, for those who get new ones. broken: the group before this plan is, so
    that nobody needs the experts it computed with."""

    epoch: int
    members: tuple[Member, ...]
    placement: ExpertPlacement
    dedicated: bool
    sources: Sources | None = None
    broken: bool = False

    @property
    def holders(self) -> tuple[int, ...]:
        """Group ranks of the members that hold expert slots, in the placement's order."""
        role: Role = "expert" if self.dedicated else "attention"
        return tuple(rank for rank, m in enumerate(self.members) if m.role == role)

    def rank_of(self, name: str) -> int | None:
        return next((rank for rank, m in enumerate(self.members) if m.name == name), None)

    def holder_of(self, name: str) -> int | None:
        """Which holder a member is; None: it holds no experts, or is no member."""
        rank = self.rank_of(name)
        return self.holders.index(rank) if rank in self.holders else None


def next_plan(
    current: UnitPlan | None,
    present: Sequence[Member],
    wanted: Wanted,
    loads: Loads,
    *,
    rebalance: bool = False,
    complete: bool = False,
    epoch: int | None = None,
    broken: bool = False,
) -> UnitPlan | str:
    """The plan for those who are present, or why there is none.

    Experts stay where they are if they can: a dead holder's experts are taken over by their
    replicas when every expert has one left, or by its successor, and else spread anew over the
    survivors, if these have the memory.
    rebalance: spread by load even if nobody came or went. complete: wait for all that are wanted.
    epoch: of the plan, larger than any before; None: the next after the current one's.
    broken: a member of the current plan is dead, or its group has broken.
    """
    attention = _first([m for m in present if m.role == "attention"], wanted.attention, current)
    experts = _first([m for m in present if m.role == "expert"], wanted.experts, current)
    dedicated = wanted.experts > 0
    holders = experts if dedicated else attention
    if not attention:
        return "no attention rank is up"
    if not holders:
        return "no expert rank is up"
    missing = wanted.attention - len(attention) + max(0, wanted.needed_experts - len(experts))
    if complete and missing > 0:
        return f"waiting for {missing} more ranks"
    if epoch is None:
        epoch = 0 if current is None else current.epoch + 1
    before = [current.members[rank] for rank in current.holders] if current else []
    placement = next_placement(
        current.placement if current else None, before, holders, wanted, loads, rebalance, broken
    )
    if isinstance(placement, str):
        return placement
    sources = _sources(current, present) if current else None
    return UnitPlan(epoch, (*attention, *experts), placement, dedicated, sources, broken)


def _sources(current: UnitPlan, present: Sequence[Member]) -> Sources:
    there = {m.name: m.copies for m in present}
    holders = (current.members[rank].name for rank in current.holders)
    return Sources(current.placement, tuple(there.get(name, "") for name in holders))


def _first(present: Sequence[Member], count: int, current: UnitPlan | None) -> list[Member]:
    """`count` of them, those in the current plan first and in its order; the rest are spares."""
    known = {m.name: i for i, m in enumerate(current.members)} if current else {}
    return sorted(present, key=lambda m: known.get(m.name, len(known)))[:count]


def problems(plan: UnitPlan | None, present: Sequence[Member], wanted: Wanted) -> list[str]:
    """One sentence for each way in which the unit is less than the config asks for, but for its
    `thin_spots`."""
    if plan is None:
        return ["the unit is not complete yet"]
    sentences = []
    for role, want in (("attention", wanted.attention), ("expert", wanted.needed_experts)):
        have = sum(m.role == role for m in plan.members)
        if have < want:
            sentences.append(f"{have} of {want} {role} ranks take part")
    gone = [m.name for m in plan.members if m.name not in {p.name for p in present}]
    if gone:
        sentences.append(f"gone, and being replaced: {', '.join(gone)}")
    return sentences


def thin_spots(plan: UnitPlan, wanted: Wanted) -> list[str]:
    """A sentence if more experts than planned have one rank only. It takes milliseconds, and stays
    true as long as the plan."""
    if not wanted.redundant:
        return []
    homes = plan.placement.single_homed()
    layer, alone = max(homes.items(), key=lambda item: len(item[1]), default=(0, ()))
    planned = max(wanted.num_experts - wanted.redundant, 0)
    if len(alone) <= planned:
        return []
    return [
        f"{len(alone)} of {wanted.num_experts} experts run on one rank only, not "
        f"{planned}; in layer {layer}: {_spans(alone)}"
    ]


def _spans(numbers: Sequence[int]) -> str:
    """Ascending numbers, as "0-3, 7"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a member says of itself when asked.

    epoch: of the group it is in; -1: in none. waits: it stands in an exchange, for others; idle:
    it has nothing to do. since_s: for how long it has been at `where`.
    """

    epoch: int
    passes: int
    where: str
    waits: bool
    idle: bool
    since_s: float
    load: Load | None = None  # of an attention rank's engine
    expert_rows: ExpertRows | None = None  # of a holder, since it was asked last
    transfers: Transfers | None = None  # of an attention rank
    work: Work | None = None  # of an attention rank's engine
    exchanged: Exchanged | None = None  # of one that is not alone
    taken: Taken | None = None  # likewise


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What a member spent on the exchange since its start: bytes sent, seconds by stage."""

    bytes: int
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Rows that a holder computed: [MoE layers, its slots], under the placement of this version."""

    version: int
    rows: NDArray[np.int64]


def culprits(pulses: Mapping[str, Pulse | None], deadline_s: float) -> dict[str, str]:
    """Whom to kill, and why, when members stand still. None: it did not answer in time.

    Who waits in an exchange is a victim as long as somebody else is not in it. When all of them
    wait, nobody is to blame: the group's own time limit ends it.
    """
    silent = {name: "it does not answer" for name, pulse in pulses.items() if pulse is None}
    stuck = {
        name: f"it has been at {pulse.where} for {pulse.since_s:.0f} s"
        for name, pulse in pulses.items()
        if pulse and not pulse.waits and not pulse.idle and pulse.since_s > deadline_s
    }
    return silent | stuck


def next_look(pulses: Mapping[str, Pulse | None], deadline_s: float, at_most_s: float) -> float:
    """In how many seconds to ask again: when the first who stands still is at its deadline."""
    left = [deadline_s - p.since_s for p in pulses.values() if p and not p.waits and not p.idle]
    return min([at_most_s, *(max(s, 0.0) + LATER_S for s in left)])
