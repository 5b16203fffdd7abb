"""DeepSeek's expert-parallel load balancer (spec section 7.3): from loads to slots, one layer.

Owns the arithmetic only: which experts get a second copy, and which copies share a holder. Every
function is deterministic; equal loads are told apart by the lower index.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def balanced_packing(weight: Floats, packs: int) -> tuple[Ints, Ints]:
    """Put n items into `packs` packs of n / packs: heaviest first, each into the lightest pack.

    Returns the pack of each item [n] and its place in that pack [n]. Raises ValueError if the
    items do not fill the packs evenly.
    """
    room, rest = divmod(len(weight), packs)
    if rest:
        raise ValueError(f"{len(weight)} items do not fill {packs} packs evenly")
    pack, place = np.zeros(len(weight), np.int64), np.zeros(len(weight), np.int64)
    if room == 1:
        return np.arange(packs), place
    open_packs = [(0.0, p) for p in range(packs)]
    filled = [0] * packs
    for item in np.argsort(-weight, kind="stable"):
        load, p = heapq.heappop(open_packs)
        pack[item], place[item] = p, filled[p]
        filled[p] += 1
        if filled[p] < room:
            heapq.heappush(open_packs, (load + float(weight[item]), p))
    return pack, place


def replicate_experts(weight: Floats, replicas: int, limit: int) -> tuple[Ints, Ints]:
    """One replica of each of E experts, then one more each time for the heaviest per replica.

    No expert gets more than `limit`. Returns the expert of each replica [replicas] and the
    replicas of each expert [E]. Raises ValueError if that many can not be made.
    """
    experts = len(weight)
    if not experts <= replicas <= experts * limit:
        raise ValueError(
            f"{replicas} replicas of {experts} experts: expected {experts} to {experts * limit}"
        )
    count = np.ones(experts, np.int64)
    more = []
    for _ in range(replicas - experts):
        share = np.where(count < limit, weight / count, -1.0)
        chosen = int(np.argmax(share))
        count[chosen] += 1
        more.append(chosen)
    return np.concatenate([np.arange(experts), np.array(more, np.int64)]), count


def balance(weight: Floats, slots: int, groups: int, nodes: int, holders: int) -> Ints:
    """The expert in each of `slots` slots [slots]; holders, and nodes of them, follow each other.

    Groups are packed onto nodes, experts replicated inside their node, replicas packed onto its
    holders: a group stays on one node, as node-limited routing wants. With `groups` = `nodes` = 1
    it is the global policy. Raises ValueError if something does not divide.
    """
    experts = len(weight)
    if experts % groups or groups % nodes or holders % nodes or slots % holders:
        raise ValueError(
            f"{experts} experts in {groups} groups, {slots} slots on {holders} holders of {nodes} "
            "nodes: groups must divide experts, nodes must divide groups and holders, holders slots"
        )
    group_size, node_experts, node_slots = experts // groups, experts // nodes, slots // nodes
    node_of_group, place = balanced_packing(weight.reshape(groups, -1).sum(1), nodes)
    order = np.lexsort((place, node_of_group))  # groups, node after node
    expert_at = (order[:, None] * group_size + np.arange(group_size)).reshape(nodes, node_experts)
    result = np.empty((nodes, node_slots), np.int64)
    for node in range(nodes):
        load = weight[expert_at[node]]
        replica, count = replicate_experts(load, node_slots, holders // nodes)
        holder, slot = balanced_packing((load / count)[replica], holders // nodes)
        result[node, holder * (slots // holders) + slot] = expert_at[node, replica]
    return result.reshape(-1)


def separate(slots: Ints, weight: Floats, holders: int) -> Ints:
    """Swap slots between holders until none has two replicas of one expert: the second is idle.

    slots: [slots] of one node, no expert more often than there are holders. Such a placement
    exists then, and each swap takes away one repetition, so this ends. Of the possible swaps it
    makes the one that moves the least load.
    """
    at = slots.reshape(holders, -1).copy()
    share = weight / np.maximum(1, np.bincount(slots, minlength=len(weight)))
    while True:
        twice = next(
            ((h, i) for h in range(holders) for i, e in enumerate(at[h]) if e in at[h, :i]), None
        )
        if twice is None:
            return at.reshape(-1)
        h, i = twice
        expert = at[h, i]
        swaps = [
            (abs(float(share[expert] - share[f])), other, j)
            for other in range(holders)
            if expert not in at[other]
            for j, f in enumerate(at[other])
            if f not in at[h] or f in np.delete(at[other], j)
        ]
        _, other, j = min(swaps)
        at[h, i], at[other, j] = at[other, j], expert
