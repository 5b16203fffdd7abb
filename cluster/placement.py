"""Which expert is in which slot of which holder: the immutable, versioned map of a unit.

Owns making a placement from loads, going from one to the next with few copies, and the choice of
a replica. A holder is a member of the unit that has expert slots; holders are numbered in member
order. Slot s of a layer is on holder s // slots_per_holder. Layers are numbered as in the
checkpoint; the MTP module's is the last. No choice made here can change a token (an expert's row
depends on its input row only), so everything is about balance and traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from rayseek.cluster.assignment import assign
from rayseek.cluster.eplb import Floats, Ints, balance, separate

Loads: TypeAlias = Mapping[int, Sequence[float]]  # MoE layer -> load of each logical expert


@dataclass(frozen=True, slots=True)
class Home:
    """A member whose tokens look for experts: its index in the unit, its node, and which holder
    it is itself, if it is one."""

    index: int
    node: int = 0
    holder: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """Replicas to use for one layer and home: row t takes slot table[expert, t % count[expert]].

    table: int32 [experts, R]; what lies beyond an expert's count repeats. count: int32 [experts].
    """

    table: NDArray[np.int32]
    count: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """See the file's docstring. Compare by value; safe to share and to send."""

    version: int
    slots: Mapping[int, tuple[int, ...]]  # MoE layer -> the logical expert in each slot
    slots_per_holder: int
    nodes: tuple[int, ...]  # of each holder

    @property
    def experts(self) -> int:
        """Logical experts of a layer."""
        return max(next(iter(self.slots.values()))) + 1

    def holder_of(self, slot: int) -> int:
        return slot // self.slots_per_holder

    def experts_of(self, holder: int, layer: int) -> tuple[int, ...]:
        """What a holder has, in the order of its slots."""
        begin = holder * self.slots_per_holder
        return self.slots[layer][begin : begin + self.slots_per_holder]

    def replicas(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """For each logical expert its slots, ascending."""
        found: list[list[int]] = [[] for _ in range(self.experts)]
        for slot, expert in enumerate(self.slots[layer]):
            found[expert].append(slot)
        return tuple(map(tuple, found))

    def uncovered(self, alive: Collection[int]) -> dict[int, tuple[int, ...]]:
        """Layer -> experts that no holder in `alive` has; a layer where none is lost is absent."""
        there = set(alive)
        return self._with_homes(lambda homes: not homes & there)

    def single_homed(self) -> dict[int, tuple[int, ...]]:
        """Layer -> experts that one holder alone has: with it, they are gone until loaded."""
        return self._with_homes(lambda homes: len(homes) == 1)

    def _with_homes(self, wanted: Callable[[set[int]], bool]) -> dict[int, tuple[int, ...]]:
        found = {
            layer: tuple(
                expert
                for expert, slots in enumerate(self.replicas(layer))
                if wanted({self.holder_of(s) for s in slots})
            )
            for layer in self.slots
        }
        return {layer: experts for layer, experts in found.items() if experts}

    def choose(self, layer: int, home: Home) -> Choice:
        """Replicas for the tokens of `home`: on itself if it can, else on its node, else anywhere.

        Homes start at different entries, so that those with one token each spread as well.
        """
        chosen = [self._nearest(slots, home) for slots in self.replicas(layer)]
        width = max(map(len, chosen))
        table = [[c[(home.index + j) % len(c)] for j in range(width)] for c in chosen]
        return Choice(np.array(table, np.int32), np.array(list(map(len, chosen)), np.int32))

    def _nearest(self, slots: Sequence[int], home: Home) -> Sequence[int]:
        own = [s for s in slots if self.holder_of(s) == home.holder]
        return own or [s for s in slots if self.nodes[self.holder_of(s)] == home.node] or slots


def slots_per_holder(experts: int, holders: int, redundant: int) -> int:
    """Slots of each holder in a layer: enough for all experts and `redundant` further copies, but
    never more than there are experts: no holder has one twice."""
    return min(experts, -(-(experts + redundant) // holders))


def make_placement(
    loads: Loads,
    nodes: Sequence[int],
    redundant: int = 0,
    n_group: int = 1,
    version: int = 0,
) -> ExpertPlacement:
    """Place the experts of each layer by their loads onto holders, whose nodes are `nodes`.

    No holder gets an expert twice. The n_group groups of experts stay on
    one node each (hierarchical) where nodes are alike, divide the groups and have as many experts
    as a holder has slots; else all holders are one pool (global). A layer that the balancer
    would not improve keeps the plain order.
    """
    sizes = {len(load) for load in loads.values()}
    if not nodes or redundant < 0 or len(sizes) != 1 or min(sizes) % n_group:
        raise ValueError(
            f"cannot place {len(loads)} layers of {sizes} experts in {n_group} groups, {redundant} "
            f"redundant, on {len(nodes)} holders"
        )
    (experts,) = sizes
    per_holder = slots_per_holder(experts, len(nodes), redundant)
    per_node = [list(nodes).count(node) for node in dict.fromkeys(nodes)]
    pools = len(per_node)
    if len(set(per_node)) > 1 or n_group % pools or per_holder > experts // pools:
        pools, n_group = 1, 1
    # The balancer numbers holders pool by pool.
    order = sorted(range(len(nodes)), key=lambda h: nodes[h]) if pools > 1 else range(len(nodes))
    slots = {}
    for layer, load in loads.items():
        weight = np.asarray(load, np.float64)
        found = _place(weight, per_holder * len(nodes), n_group, pools, len(nodes))
        at = np.empty((len(nodes), per_holder), np.int64)
        at[list(order)] = found.reshape(len(nodes), per_holder)
        slots[layer] = tuple(int(e) for e in at.reshape(-1))
    return ExpertPlacement(version, slots, per_holder, tuple(nodes))


def _place(load: Floats, slots: int, groups: int, pools: int, holders: int) -> Ints:
    """One layer: the balancer's slots, or the plain order if that is as good."""
    experts, inside = len(load), holders // pools
    plain = np.concatenate(
        [
            np.arange(slots // pools) % (experts // pools) + p * (experts // pools)
            for p in range(pools)
        ]
    )
    packed = balance(load, slots, groups, pools, holders)
    parted = [separate(pool, load, inside) for pool in packed.reshape(pools, -1)]
    return min((plain, np.concatenate(parted)), key=lambda s: _heaviest(s, load, holders))


def _heaviest(slots: Ints, load: Floats, holders: int) -> float:
    share = load / np.bincount(slots, minlength=len(load))
    return float(share[slots].reshape(holders, -1).sum(1).max())


def holder_loads(placement: ExpertPlacement, loads: Loads) -> Floats:
    """[MoE layers, holders]: the load of each holder when replicas share their expert's evenly."""
    shape = (len(placement.nodes), placement.slots_per_holder)
    found = []
    for layer, slots in placement.slots.items():
        share = np.asarray(loads[layer], np.float64) / np.bincount(slots)
        found.append(share[list(slots)].reshape(shape).sum(1))
    return np.array(found)


def without(placement: ExpertPlacement, dead: Collection[int]) -> ExpertPlacement | None:
    """The survivors as they are, renumbered, one version later; None if an expert is lost."""
    alive = [h for h in range(len(placement.nodes)) if h not in dead]
    if placement.uncovered(alive):
        return None
    return arranged(placement, alive, [placement.nodes[h] for h in alive])


def settle(
    old: ExpertPlacement, new: ExpertPlacement, became: Mapping[int, int] | None = None
) -> ExpertPlacement:
    """`new` with the contents of holders of one node exchanged among them, layer by layer, so that
    the fewest experts are loaded; what a holder keeps stays in its slot.

    became: which holder of `new` a holder of `old` is, those who left are absent; None: all are
    the same in both.
    """
    held = held_before(old, new, became)
    width, slots = new.slots_per_holder, {}
    for layer in new.slots:
        contents = [new.experts_of(h, layer) for h in range(len(new.nodes))]
        settled: list[tuple[int, ...]] = list(contents)
        for node in dict.fromkeys(new.nodes):
            members = [h for h, n in enumerate(new.nodes) if n == node]
            kept = [[len({*contents[c]} & {*held[layer, h]}) for c in members] for h in members]
            for h, choice in zip(members, assign(-np.array(kept, np.float64)), strict=True):
                settled[h] = _in_place(contents[members[choice]], held[layer, h][:width])
        slots[layer] = tuple(expert for content in settled for expert in content)
    return replace(new, slots=slots)


def arranged(old: ExpertPlacement, origin: Sequence[int], nodes: Sequence[int]) -> ExpertPlacement:
    """The holders of `old` in this order, one version later."""
    slots = {
        layer: tuple(e for before in origin for e in old.experts_of(before, layer))
        for layer in old.slots
    }
    return replace(old, version=old.version + 1, slots=slots, nodes=tuple(nodes))


def held_before(
    old: ExpertPlacement, new: ExpertPlacement, became: Mapping[int, int] | None
) -> dict[tuple[int, int], tuple[int, ...]]:
    """(layer, holder of `new`) -> the experts that it has now, in its slots' order."""
    if became is None:
        became = {h: h for h in range(len(old.nodes))}
    origin = {new_holder: holder for holder, new_holder in became.items()}
    if old.slots.keys() != new.slots.keys() or not {*origin} <= {*range(len(new.nodes))}:
        raise ValueError(
            "expected placements of the same layers, and a new holder for each old one"
        )
    return {
        (layer, h): old.experts_of(origin[h], layer) if h in origin else ()
        for layer in new.slots
        for h in range(len(new.nodes))
    }


def _in_place(content: tuple[int, ...], held: tuple[int, ...]) -> tuple[int, ...]:
    """`content` in an order that leaves what is in `held` where it is."""
    rest = iter([expert for expert in content if expert not in held])
    result = [e if e in content else None for e in held] + [None] * (len(content) - len(held))
    return tuple(next(rest) if e is None else e for e in result)
