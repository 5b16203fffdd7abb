"""The placement that follows another: who keeps what, who takes over, and whether memory allows it.

Pure. What a holder gets is loaded beside what it has, for that computes until all have adopted the
new placement; only when the group is broken anyway do the old experts make room for the new ones,
layer by layer. So a death can be taken over in memory in which a rebalance cannot be done at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rayseek.cluster.placement import (
    ExpertPlacement,
    Loads,
    arranged,
    held_before,
    holder_loads,
    make_placement,
    settle,
    without,
)

if TYPE_CHECKING:
    from rayseek.cluster.plan import Member, Wanted


@dataclass(frozen=True, slots=True)
class Room:
    """A holder's memory for experts: `slots` of each MoE layer, those in use included while others
    are loaded. whole_layers: the experts of a layer are one piece of memory, as on a GPU, so that
    a layer in which anything changes is there twice meanwhile."""

    slots: int
    whole_layers: bool = False


def next_placement(
    current: ExpertPlacement | None,
    before: Sequence[Member],
    holders: Sequence[Member],
    wanted: Wanted,
    loads: Loads,
    rebalance: bool,
    broken: bool,
) -> ExpertPlacement | str:
    """What `holders` will hold, or a sentence that says why they cannot hold all experts.

    before: the holders of `current`. broken: their group is, so what they hold may go at once.
    """
    names = [m.name for m in holders]
    if current is None:
        for placement in _anew(None, {}, holders, wanted, loads):
            if _fits(None, placement, {}, wanted, broken):
                return placement
        return _too_small(names, wanted)
    old = [m.name for m in before]
    if names == old and not rebalance:
        return current
    became = {i: names.index(name) for i, name in enumerate(old) if name in names}
    for placement in _choices(current, became, before, holders, wanted, loads, rebalance):
        if _fits(current, placement, became, wanted, broken):
            return placement
    if names == old:
        return _partly(current, wanted, loads)
    return _too_small(names, wanted)


def _choices(
    current: ExpertPlacement,
    became: Mapping[int, int],
    before: Sequence[Member],
    holders: Sequence[Member],
    wanted: Wanted,
    loads: Loads,
    rebalance: bool,
) -> Iterator[ExpertPlacement]:
    """The best first."""
    if not rebalance:
        gone = [i for i in range(len(before)) if i not in became]
        kept = without(current, gone) if len(became) == len(holders) else None
        if kept is not None:
            yield kept
        if len(holders) == len(before):
            yield _succeeded(current, became, before, holders)
    yield from _anew(current, became, holders, wanted, loads)
    if len(became) < len(holders) and not current.uncovered(became):
        yield _extended(current, became, _nodes(holders), loads)


def _anew(
    current: ExpertPlacement | None,
    became: Mapping[int, int],
    holders: Sequence[Member],
    wanted: Wanted,
    loads: Loads,
) -> Iterator[ExpertPlacement]:
    """Spread by load; and again with as few copies as can be, where memory is short."""
    for redundant in dict.fromkeys((wanted.redundant, 0)):
        placement = make_placement(
            loads, _nodes(holders), redundant, wanted.groups, current.version + 1 if current else 0
        )
        yield settle(current, placement, became) if current else placement


def peak(
    old: ExpertPlacement | None,
    new: ExpertPlacement,
    became: Mapping[int, int],
    whole_layers: bool = False,
    release: bool = False,
) -> int:
    """The most expert slots, of all layers, that a holder has in memory on its way to `new`.

    One layer is made after the other, and one that stays is kept. release: a layer of `old` ends
    when its successor is there, and both at once are workspace, which nobody else uses then; else
    all of `old` stays until the end.
    """
    held, most = held_before(old, new, became) if old else {}, 0
    for h in range(len(new.nodes)):
        total = 0
        for layer in new.slots:
            has, gets = held.get((layer, h), ()), new.experts_of(h, layer)
            total += len(gets)
            if has != gets and not release:
                total += len(has) if whole_layers else len({*has} - {*gets})
        most = max(most, total)
    return most


def _fits(
    old: ExpertPlacement | None,
    new: ExpertPlacement,
    became: Mapping[int, int],
    wanted: Wanted,
    broken: bool,
) -> bool:
    room = wanted.room
    if room is None:
        return True
    return peak(old, new, became, room.whole_layers, broken) <= room.slots * len(new.slots)


def _succeeded(
    current: ExpertPlacement,
    became: Mapping[int, int],
    before: Sequence[Member],
    holders: Sequence[Member],
) -> ExpertPlacement:
    """Newcomers take the places of those who are gone, of their own node first."""
    origin = {holder: old for old, holder in became.items()}
    empty = [old for old in range(len(before)) if old not in became]
    for h, member in enumerate(holders):
        if h not in origin:
            origin[h] = min(empty, key=lambda old: before[old].node != member.node)
            empty.remove(origin[h])
    return arranged(current, [origin[h] for h in range(len(holders))], _nodes(holders))


def _extended(
    current: ExpertPlacement, became: Mapping[int, int], nodes: Sequence[int], loads: Loads
) -> ExpertPlacement:
    """Those who stay keep what they have; newcomers get copies of what has the most rows a copy."""
    origin = {holder: old for old, holder in became.items()}
    slots = {}
    for layer in current.slots:
        copies = np.zeros(current.experts)
        for old in became:
            copies[list(current.experts_of(old, layer))] += 1
        mine: list[int] = []
        for h in range(len(nodes)):
            if h in origin:
                mine += current.experts_of(origin[h], layer)
                continue
            order = np.argsort(-np.asarray(loads[layer]) / copies, kind="stable")
            taken = order[: current.slots_per_holder]
            copies[taken] += 1
            mine += taken.tolist()
        slots[layer] = tuple(mine)
    return replace(current, version=current.version + 1, slots=slots, nodes=tuple(nodes))


def _partly(current: ExpertPlacement, wanted: Wanted, loads: Loads) -> ExpertPlacement:
    """A rebalance of as many layers as there is room for, those that win most by it first."""
    assert wanted.room is not None, "whatever there is room for is done at once"
    holders = len(current.nodes)
    copies = current.slots_per_holder * holders - wanted.num_experts
    target = make_placement(loads, current.nodes, copies, wanted.groups, current.version + 1)
    target = settle(current, target)
    won = holder_loads(current, loads).max(1) - holder_loads(target, loads).max(1)
    same, found = {h: h for h in range(holders)}, current
    for index in np.argsort(-won, kind="stable"):
        layer = list(current.slots)[index]
        more = replace(target, slots={**found.slots, layer: target.slots[layer]})
        if won[index] > 0 and _fits(current, more, same, wanted, broken=False):
            found = more
    return found


def _nodes(holders: Sequence[Member]) -> list[int]:
    names = sorted({m.node for m in holders})
    return [names.index(m.node) for m in holders]


def _too_small(names: Sequence[str], wanted: Wanted) -> str:
    room = wanted.room.slots if wanted.room else 0
    return (
        f"{wanted.num_experts} experts of a layer do not fit into the memory of {len(names)} "
        f"ranks, {room} in each: waiting for another rank"
    )
