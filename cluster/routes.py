"""The way of a row to its experts in one epoch: which members it is sent to, and in how many hops.

Flat: from its home to every member that holds one of its experts, once however many those are.
Hierarchical: one copy to each node that holds some, to the member there that has the home's own
place on its node, and from that one to the others of the node. Products return directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rayseek.cluster.placement import ExpertPlacement


@dataclass(frozen=True, slots=True)
class Hop:
    """One exchange of rows, seen by one member.

    member_of_slot: int64 [slots + 1], whom a row goes to for a slot; the number of members stands
    for nobody, and the last entry, for slot -1, is that. targets: all it may go to. carried: for
    each member, the homes of the rows that come from it.
    """

    member_of_slot: Tensor
    targets: tuple[int, ...]
    carried: tuple[tuple[int, ...], ...]

    def to_all(self, rows: int) -> list[int]:
        """How many go to each member if all that it has may be wanted anywhere."""
        return [rows if member in self.targets else 0 for member in range(len(self.carried))]


def make_hops(
    placement: ExpertPlacement,
    me: int,
    holders: Sequence[int],
    nodes: Sequence[int],
    hierarchical: bool,
    device: torch.device,
) -> list[Hop]:
    """The hops of member `me`. holders: the members with expert slots; nodes: of every member."""
    members = range(len(nodes))

    def hop(target_of_holder: Sequence[int], carried: Sequence[tuple[int, ...]]) -> Hop:
        per_slot = [m for m in target_of_holder for _ in range(placement.slots_per_holder)]
        targets = sorted(set(target_of_holder) - {len(nodes)})
        lookup = torch.tensor([*per_slot, len(nodes)], device=device)
        return Hop(lookup, tuple(targets), tuple(carried))

    if not hierarchical:
        return [hop(holders, [(m,) if me in holders else () for m in members])]

    def relay(home: int, node: int) -> int:
        there = [h for h in holders if nodes[h] == node]
        place = sum(nodes[m] == nodes[home] for m in range(home))
        return there[place % len(there)]

    mine = nodes[me]
    near = [h if nodes[h] == mine else len(nodes) for h in holders]
    relayed: list[tuple[int, ...]] = [() for _ in members]
    if me in holders:
        for r in holders:
            relayed[r] = tuple(m for m in members if nodes[r] == mine and relay(m, mine) == r)
    here = me in holders
    return [
        hop(
            [relay(me, nodes[h]) for h in holders],
            [(m,) if here and relay(m, mine) == me else () for m in members],
        ),
        hop(near if here else [len(nodes)] * len(holders), relayed),
    ]
